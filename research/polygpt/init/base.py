"""Where the initial parameters of a run come from."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Protocol

import jax

from polygpt.parameters import Traits
from polygpt.spec import Spec, check_pattern


class Source(Protocol):
    """Parameters that exist somewhere, under the names of their own model.

    Attributes:
        origin: what they are and where, for messages: "runs/text, step 300".
        shapes: shape and dtype of each parameter, by name.
        tokenizer: JSON of the tokenizer that they were trained with, or None if it is unknown.
    """

    origin: str
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    tokenizer: Any

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, jax.Array]:
        """Reads some of the parameters, each with the dtype and the sharding of its entry in `wanted`."""
        ...


@dataclasses.dataclass(frozen=True)
class Init(Spec):
    """Base of all initialisations: `Random`, and subclasses of `Weights`."""


@dataclasses.dataclass(frozen=True)
class Random(Init):
    """Random values, as each layer defines them, from the experiment's seed."""


@dataclasses.dataclass(frozen=True)
class Weights(Init):
    """Parameters of a `Source`. A new kind of source is a subclass with `open`.

    Names are those of this model, such as "decoder/blocks/attention/query/kernel". A parameter of the source gets its
    name by `rename`. It is used if `include` matches that name and `exclude` does not.
    """

    include: str | None = None
    """Regular expression, searched in the name: fill these parameters only; null fills all."""
    exclude: str | None = None
    """Regular expression, searched in the name: leave these random, and those of the source unused."""
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Regular expressions and their replacements (as in `re.sub`), applied in order to each name of the source."""
    strict: bool = True
    """Whether it is an error if `include` and `exclude` select a parameter that the source lacks, or one of the source
    that this model lacks. false reports them in the table only. Shapes must always agree."""

    def validate(self):
        for field in ("include", "exclude"):
            check_pattern(self, field)
        for pattern in self.rename:
            try:
                re.compile(pattern)
            except re.error as error:
                self.require(False, "rename", f"regular expressions and replacements ({pattern!r}: {error})")

    def model(self) -> Any:
        """The specification of the model whose parameters these are, or None if it is unknown."""
        return None

    def fit(self, source: Source, taken: Mapping[str, str], traits: Mapping[str, Traits]) -> Source:
        """The source, changed to the shapes of this model; by default unchanged.

        Args:
            source: what `open` returned.
            taken: names in the source, by names in the model.
            traits: the traits of the model's parameters, by name.

        Raises:
            UserError: for a parameter that cannot be changed to its shape.
        """
        return source

    def open(self) -> Source:
        """The source. Raises UserError if it is missing or damaged."""
        raise NotImplementedError(f"{type(self).__name__} defines no open")
