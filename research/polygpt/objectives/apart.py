"""A view in which the modalities of an example do not see each other."""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.objectives.view import View
from polygpt.sequence import TEXT, Batch

NUMBERS = 128
"""No modality has a number above this: they are int8."""


@dataclasses.dataclass(frozen=True)
class Apart(View):
    """Each modality of an example becomes an example of its own, so that none sees another.

    Its positions are counted from 0 without gaps: the text around a medium would tell its length otherwise.
    """

    bidirectional: bool = True
    """Whether the positions of a modality see each other in both directions; false keeps the spans of the data."""

    def __call__(self, batch: Batch, keys_B: jax.Array | None) -> Batch:
        modality_BT = batch.modality_BT.astype(jnp.int32)
        real_BT = batch.segment_BT > 0
        segment_BT = jnp.where(real_BT, (batch.segment_BT - 1) * NUMBERS + modality_BT + 1, 0)
        same_BTS = segment_BT[:, :, None] == segment_BT[:, None]
        span_BT = real_BT.astype(batch.span_BT.dtype) if self.bidirectional else batch.span_BT
        position_BT = jnp.where(real_BT, jnp.sum(jnp.tril(same_BTS, -1), axis=-1), 0)
        text_BT1 = (real_BT & (modality_BT == TEXT))[..., None]
        return batch.replace(
            segment_BT=segment_BT,
            position_BT=position_BT,
            span_BT=span_BT,
            coordinate_BT3=jnp.where(text_BT1, position_BT[..., None], batch.coordinate_BT3),
        )


def number_apart(batch: Batch) -> Batch:
    """The batch with the segments and positions of `Apart`, to find and pool the positions of each modality."""
    return Apart(bidirectional=False)(batch, None)


def example_of(batch: Batch) -> jax.Array:
    """The packed example of each position of this view, int32 [B, T] from 1; 0 is padding."""
    return (batch.segment_BT + NUMBERS - 1) // NUMBERS


def last_of(batch: Batch, modality: int, examples: int) -> tuple[jax.Array, jax.Array]:
    """Where each example of a row of this view has its last position of a modality, int32 [B, E]; whether it has any.

    `bos` and `eos`, which every example has, are no text by themselves.

    Args:
        batch: the view.
        modality: 0 is text, adapters count from 1.
        examples: E, the number of examples to look for in a row.
    """
    wanted_E = jnp.arange(examples) * NUMBERS + modality + 1
    here_BET = batch.segment_BT[:, None] == wanted_E[None, :, None]
    there_BE = jnp.sum(here_BET, axis=-1) > (2 if modality == TEXT else 0)
    return jnp.max(jnp.where(here_BET, jnp.arange(batch.shape[1]), 0), axis=-1), there_BE
