"""The metadata of positions: what masks, scores and kernels know of a query or a key besides its vector."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from polygpt.errors import SpecError
from polygpt.spec import nearest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Meta:
    """The metadata of positions that masks can use; each array is [B, T].

    Attributes:
        index: the index in the row (or in the cache), which defines the order in time.
        position: position id, restarted for each packed example.
        segment: packed example, from 1; 0 is padding.
        span: bidirectional span; 0 for none.
        modality: as in `polygpt.sequence`.
        extra: labels that masks read, by name (`Mask.labels`), int32; -1 where a position has none.
    """

    index: jax.Array
    position: jax.Array
    segment: jax.Array
    span: jax.Array
    modality: jax.Array
    extra: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    @classmethod
    def empty(cls, B: int, T: int, labels: Iterable[str] = ()) -> "Meta":
        """T positions of padding per row; each array has its own buffer, which can be donated."""

        def zeros():
            return jnp.zeros((B, T), jnp.int32)

        return cls(*(zeros() for _ in range(5)), {name: zeros() for name in labels})

    def only(self, labels: Iterable[str]) -> "Meta":
        """The metadata with these labels only. Raises SpecError if one is not there."""
        for name in labels:
            if name not in self.extra:
                there = nearest(name, self.extra) if self.extra else "there are none"
                raise SpecError(f"a mask reads the label {name!r}, which these positions do not have: {there}")
        return dataclasses.replace(self, extra={name: self.extra[name] for name in labels})
