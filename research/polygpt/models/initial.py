"""Initial values of the matrices that a pattern matches, in place of those of their layers."""

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from polygpt.errors import SpecError
from polygpt.parameters import Traits, paths, tree_of
from polygpt.spec import Spec, check_pattern


@dataclasses.dataclass(frozen=True)
class Initial(Spec):
    """How some matrices, or embedding tables, are initialised. A parameter of a stack is one matrix per layer."""

    pattern: str
    """Regular expression, searched in names such as "decoder/blocks/attention/query/kernel"."""
    kind: Literal["fixed", "fan_in", "orthogonal"]
    """fixed: normal with standard deviation `scale`. fan_in: normal with variance scale^2 / inputs; He et al.
    (1502.01852), eq. 10, has scale 2^0.5. orthogonal: random matrices with orthonormal rows or columns, times `scale`:
    Saxe et al. (1312.6120), section 3."""
    scale: float = 1.0
    """See `kind`; 0 gives zeros."""
    depth_scaled: bool = False
    """Whether to divide by (2 L)^0.5, where L is the depth of the decoder: GPT-2, section 2.3, for the matrices at the
    end of residual branches."""

    def validate(self):
        check_pattern(self, "pattern")
        self.require(self.scale >= 0, "scale", "at least 0")

    def values(self, key: jax.Array, shape: tuple[int, ...], depth: int) -> jax.Array:
        """Random values [..., inputs, outputs] of `shape`, float32, in a decoder of this depth."""
        *outer, inputs, outputs = shape
        scale = self.scale / (2 * max(depth, 1)) ** 0.5 if self.depth_scaled else self.scale
        if self.kind != "orthogonal":
            return scale * (inputs**-0.5 if self.kind == "fan_in" else 1.0) * jax.random.normal(key, shape)
        make = jax.nn.initializers.orthogonal(scale)
        keys = jax.random.split(key, math.prod(outer))
        return jax.vmap(lambda key: make(key, (inputs, outputs)))(keys).reshape(shape)


def is_matrix(own: Traits) -> bool:
    """Whether a parameter is a matrix or a table, possibly stacked, and not a vector."""
    return own.trained and len(own.shape) > 1 and (own.decays or "vocabulary" in own.axes)


def chosen(field: str, pattern: str, traits: Mapping[str, Traits]) -> list[str]:
    """The names of the matrices that a pattern matches. Raises SpecError, naming the field, if there are none."""
    matrices = [name for name, own in traits.items() if is_matrix(own)]
    found = [name for name in matrices if re.search(pattern, name)]
    if not found:
        raise SpecError(f"{field} {pattern!r} matches no matrix: names are like {matrices[0]}")
    return found


def initialised(
    initial: Sequence[Initial], params: Mapping[str, Any], traits: Mapping[str, Traits], key: jax.Array, depth: int
) -> dict[str, Any]:
    """The parameters, with the matrices that a specification matches drawn by the first that does.

    Raises:
        SpecError: if one matches no matrix, or only those of earlier ones.
    """
    values, taken = paths(params), set()
    for number, one in enumerate(initial):
        names = [name for name in chosen(f"model.initial[{number}].pattern", one.pattern, traits) if name not in taken]
        if not names:
            raise SpecError(
                f"model.initial[{number}].pattern {one.pattern!r} matches only matrices of earlier patterns"
            )
        for name in names:
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            values[name] = one.values(own, values[name].shape, depth)
        taken.update(names)
    return tree_of(values)
