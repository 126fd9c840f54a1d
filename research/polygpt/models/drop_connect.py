"""DropConnect: drops elements of matrices in training."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax

from polygpt.models.initial import chosen
from polygpt.nn.dropout import dropout
from polygpt.parameters import Traits, paths, tree_of
from polygpt.spec import Spec, check_pattern

HEADS = ("head/", "heads/")
"""How the names of the parameters of heads begin."""


@dataclasses.dataclass(frozen=True)
class DropConnect(Spec):
    """Zeroes elements of matrices with probability `rate` and scales the rest by 1 / (1 - rate), in training.

    Wan et al., DropConnect (ICML 2013), section 3, in inverted form. All rows of a microbatch share the mask. Heads are
    not dropped: losses read them apart from the forward pass.
    """

    rate: float = 0.1
    """Probability of dropping an element."""
    pattern: str = "kernel$"
    """Regular expression, searched in names such as "decoder/blocks/mlp/up/kernel"."""

    def validate(self):
        check_pattern(self, "pattern")
        self.require(0 <= self.rate < 1, "rate", "at least 0 and below 1")

    def names(self, traits: Mapping[str, Traits]) -> list[str]:
        """The matrices that `pattern` matches. Raises SpecError if there are none."""
        inner = {name: own for name, own in traits.items() if not name.startswith(HEADS)}
        return chosen("model.drop_connect.pattern", self.pattern, inner)

    def dropped(self, params: Mapping[str, Any], traits: Mapping[str, Traits], key: jax.Array) -> dict[str, Any]:
        """The parameters with elements dropped. Raises SpecError if `pattern` matches no matrix."""
        values = paths(params)
        for name in self.names(traits):
            values[name] = dropout(values[name], self.rate, jax.random.fold_in(key, zlib.crc32(name.encode())))
        return tree_of(values)
