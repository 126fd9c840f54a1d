"""Base of contrastive objectives: embeddings of two modalities of each example, compared over the whole batch."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from polygpt.errors import SpecError
from polygpt.objectives.apart import Apart, last_of, number_apart
from polygpt.objectives.base import BatchObjective
from polygpt.objectives.forward import OWN
from polygpt.objectives.needs import Needs
from polygpt.sequence import Batch
from polygpt.spec import nearest

RESIDUAL = "residual"
"""The site of the outputs of blocks, see `blocks/capture.py`."""
SHORTEST = 3
"""An example of two modalities and `bos` has at least this many positions."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compared:
    """What is compared. N is the number of examples in the global batch, and of places that may hold one.

    Attributes:
        left, right: unit vectors of both modalities, float32 [N, K].
        valid: bool [N], whether the example has both modalities.
        scale, bias: learned numbers: the similarity is scale * (cosine) + bias.
    """

    left: jax.Array
    right: jax.Array
    valid: jax.Array
    scale: jax.Array
    bias: jax.Array


@dataclasses.dataclass(frozen=True)
class Contrastive(BatchObjective):
    """Compares two modalities of each example with those of all others in the global batch.

    The model reads each modality alone (`Apart`). The embedding is what a `ProjectionHead` gives at the last position
    of the modality, so its `pool` should be "mean" if positions see each other in both directions.

    With `layer`, it reads the rows of the data, in the pass that other objectives read too: CoCa, Yu et al.
    (2205.01917), section 3.2, where text sees the picture only in later layers. Positions are then those of the row,
    which tell how long a medium before the text is.
    """

    heads: tuple[str, str]
    """Names of the projections in `model.heads` of both modalities, which may be the same. The temperature is that of
    the first."""
    between: tuple[int, int] = (1, 0)
    """Numbers of the modalities: 0 is text, adapters count from 1 in the model's order."""
    bidirectional: bool = True
    """Whether the positions of a modality see each other in both directions; false keeps the spans of the data, as
    `layer` always does."""
    layer: int | None = None
    """The block whose output is projected, from 0; up to it, blocks must keep modalities apart, as `WithinModality`
    does. null: the model reads each modality alone, in a pass of its own, and its last vectors are projected."""
    per_row: int | None = None
    """Number of packed examples of a row that are compared; null for as many as fit. A small number saves memory; if
    the first rows of a run have more, it says how many are left out."""
    chunk: int | None = None
    """Number of examples whose similarities to all others exist at a time; null for all. Recomputed in the backward
    pass."""

    def validate(self):
        different = len(set(self.between)) == 2 and min(self.between) >= 0
        self.require(different, "between", "two different modalities, each at least 0")
        self.require(self.layer is None or self.layer >= 0, "layer", "null or at least 0")
        self.require(self.per_row is None or self.per_row >= 1, "per_row", "null or at least 1")
        self.require(self.chunk is None or self.chunk >= 1, "chunk", "null or at least 1")

    @classmethod
    def small(cls) -> "Contrastive":
        return cls(("image", "text"))

    @property
    def needs(self) -> Needs:
        scalars = {"temperature": 0.5, "max_scale": 100.0, "bias": -1.0}
        head = {"class": "polygpt.heads.projection:ProjectionHead", "outputs": 4, "pool": "mean", **scalars}
        model = {"heads": json.dumps({name: head for name in self.heads})}
        if self.layer is not None:
            model["decoder.attention"] = "polygpt.attention.within_modality:WithinModality"
        return Needs("projections of both modalities", model)

    def scored(self, model) -> str:
        names = dict(enumerate(("text", *model.adapters)))
        left, right = (names.get(modality, f"modality {modality}") for modality in self.between)
        return f"examples that have both {left} and {right} (between)"

    @property
    def view(self) -> Apart | None:
        return Apart(self.bidirectional) if self.layer is None else None

    @property
    def captures(self) -> Mapping[str, Sequence[str]]:
        return {} if self.layer is None else {OWN: (RESIDUAL,)}

    def check_with(self, model, layout) -> None:
        require_heads(self.heads, self.between, model)
        require_apart(self.layer, model)
        if self.layer is None and self.bidirectional and model.decoder.mask == "causal":
            raise SpecError("is bidirectional, but model.decoder.mask is 'causal': set that to 'spans', or it to false")

    def sum_over(self, compared: Compared) -> jax.Array:
        """The sum of the loss over all examples, float32 scalar. Use `by_chunks` for large batches."""
        raise NotImplementedError(f"{type(self).__name__} defines no sum_over")

    def embed(self, outputs, batch: Batch) -> dict[str, Any]:
        found, E = {}, self._examples(batch)
        projected = self._projections(outputs, batch)
        batch = self._apart(batch)
        valid_BE = jnp.ones((batch.shape[0], E), bool)
        for side, head, modality in zip(("left", "right"), self.heads, self.between, strict=True):
            at_BE, there_BE = last_of(batch, modality, E)
            found[side] = jnp.take_along_axis(projected[head], at_BE[..., None], axis=1)
            valid_BE &= there_BE
        for side in ("left", "right"):
            found[side] = jnp.where(valid_BE[..., None], found[side], 0)
        scalars = outputs.head_scalars(self.heads[0])
        if "scale" not in scalars:
            raise SpecError(
                f"model.heads.{self.heads[0]} has no temperature: use polygpt.heads.projection:ProjectionHead"
            )
        # Every row bears the learned numbers, because only rows are gathered; their mean has the gradient of each.
        shared = {"scale": scalars["scale"], "bias": scalars.get("bias", jnp.float32(0))}
        rows = {name: jnp.broadcast_to(value, batch.shape[:1]) for name, value in shared.items()}
        return found | rows | {"valid": valid_BE.astype(jnp.float32)}

    def _projections(self, outputs, batch: Batch) -> dict[str, jax.Array]:
        """The outputs of both heads, float32 [B, T, K] by name."""
        if self.layer is None:
            return {name: outputs.head(name) for name in self.heads}
        vectors_BTD, apart = outputs.captured(RESIDUAL)[self.layer], self._apart(batch)
        return {
            name: outputs.once((name, self.layer), functools.partial(outputs.head, name, vectors_BTD, apart))
            for name in self.heads
        }

    def _apart(self, batch: Batch) -> Batch:
        """The batch whose segments are the modalities of each example."""
        return batch if self.layer is None else number_apart(batch)

    def compare(self, embedded: dict[str, Any]) -> jax.Array:
        left, right = (embedded[side].reshape(-1, embedded[side].shape[-1]) for side in ("left", "right"))
        valid_N = jax.lax.stop_gradient(embedded["valid"]).reshape(-1) > 0
        return self.sum_over(Compared(left, right, valid_N, embedded["scale"].mean(), embedded["bias"].mean()))

    def weight(self, batch: Batch) -> jax.Array:
        """The number of examples with both modalities that are compared."""
        return self._paired(batch, self._examples(batch))

    def left_out(self, batch: Batch) -> jax.Array:
        """Number of examples with both modalities beyond the first `per_row` of a row."""
        return self._paired(batch, self._places(batch)) - self.weight(batch)

    def _paired(self, batch: Batch, examples: int) -> jax.Array:
        batch = self._apart(batch)
        left, right = (last_of(batch, modality, examples)[1] for modality in self.between)
        return jnp.sum(left & right, dtype=jnp.float32)

    def _examples(self, batch: Batch) -> int:
        return min(self.per_row or batch.shape[1], self._places(batch))

    def _places(self, batch: Batch) -> int:
        return max(1, batch.shape[1] // SHORTEST)

    def by_chunks(self, function, *rows_N: jax.Array) -> jax.Array:
        """The sum of `function(*rows)`, a scalar, over chunks of the rows; rows that fill the last chunk are zeros."""
        N = rows_N[0].shape[0]
        if self.chunk is None or self.chunk >= N:
            return function(*rows_N)
        count = -(-N // self.chunk)

        def split(x):
            padded = jnp.pad(x, [(0, count * self.chunk - N), *[(0, 0)] * (x.ndim - 1)])
            return padded.reshape(count, self.chunk, *x.shape[1:])

        return jnp.sum(jax.lax.map(jax.checkpoint(lambda rows: function(*rows)), tuple(map(split, rows_N))))


def require_heads(heads: tuple[str, str], between: tuple[int, int], model) -> None:
    """Raises SpecError unless the model (`ModelSpec`) has both projections, of equal size, and both modalities."""
    for name in heads:
        if name not in model.heads:
            there = nearest(name, model.heads) if model.heads else "there are none"
            raise SpecError(f"reads the head {name!r}, which is not in model.heads: {there}")
    left, right = (model.heads[name].outputs for name in heads)
    if left != right:
        raise SpecError(f"compares the heads {heads[0]!r} and {heads[1]!r}: {left} and {right} outputs")
    if max(between) > len(model.adapters):
        there = ", ".join(f"{number} {name}" for number, name in enumerate(("text", *model.adapters)))
        raise SpecError(
            f"compares the modalities {list(between)} and the model reads {there}: change between, or add an adapter "
            "to model.adapters"
        )


def require_apart(layer: int | None, model) -> None:
    """Raises SpecError unless the blocks of the model (`ModelSpec`) up to `layer` keep modalities apart."""
    if layer is None:
        return
    blocks = model.decoder.layers()
    if layer >= len(blocks):
        raise SpecError(f"reads block {layer}: model.decoder has the blocks 0 to {len(blocks) - 1}")
    remedy = "set its attention to polygpt.attention.within_modality:WithinModality in model.decoder.pattern"
    for number, one in enumerate(blocks[: layer + 1]):
        if one.attention.mixes_modalities() or one.block.reads_source:
            raise SpecError(f"reads block {layer}, but in block {number} modalities may see each other: {remedy}")
