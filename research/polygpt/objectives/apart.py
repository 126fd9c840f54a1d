"""A view in which the modalities of an example do not see each other."""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.objectives.view import View
from polygpt.sequence import Batch

NUMBERS = 128
"""No modality has a number above this: they are int8."""


@dataclasses.dataclass(frozen=True)
class Apart(View):
    """Each modality of an example becomes an example of its own, from position 0 on, so that none sees another."""

    bidirectional: bool = True
    """Whether the positions of a modality see each other in both directions; false keeps the spans of the data."""

    def __call__(self, batch: Batch, keys_B: jax.Array) -> Batch:
        modality_BT = batch.modality_BT.astype(jnp.int32)
        real_BT = batch.segment_BT > 0
        segment_BT = jnp.where(real_BT, (batch.segment_BT - 1) * NUMBERS + modality_BT + 1, 0)
        same_BTS = segment_BT[:, :, None] == segment_BT[:, None]
        first_BT = jnp.min(jnp.where(same_BTS, batch.position_BT[:, None], jnp.iinfo(jnp.int32).max), axis=-1)
        span_BT = real_BT.astype(batch.span_BT.dtype) if self.bidirectional else batch.span_BT
        position_BT = jnp.where(real_BT, batch.position_BT - first_BT, 0)
        return batch.replace(segment_BT=segment_BT, position_BT=position_BT, span_BT=span_BT)


def example_of(batch: Batch) -> jax.Array:
    """The packed example of each position of this view, int32 [B, T] from 1; 0 is padding."""
    return (batch.segment_BT + NUMBERS - 1) // NUMBERS


def last_of(batch: Batch, modality: int, examples: int) -> tuple[jax.Array, jax.Array]:
    """Where each example of a row of this view has its last position of a modality, int32 [B, E]; whether it has any.

    Args:
        batch: the view.
        modality: 0 is text, adapters count from 1.
        examples: E, the number of examples to look for in a row.
    """
    wanted_E = jnp.arange(examples) * NUMBERS + modality + 1
    here_BET = batch.segment_BT[:, None] == wanted_E[None, :, None]
    return jnp.max(jnp.where(here_BET, jnp.arange(batch.shape[1]), 0), axis=-1), here_BET.any(axis=-1)
