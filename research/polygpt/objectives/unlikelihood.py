"""Unlikelihood of repeated tokens."""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.objectives.base import Objective, own_weight, require_hidden_targets
from polygpt.objectives.positions import per_position
from polygpt.sequence import TEXT, Batch

LEAST = 1e-5
"""Smallest probability of not writing a token, as in the authors' code: the loss stays finite."""


@dataclasses.dataclass(frozen=True)
class Unlikelihood(Objective):
    """Minus the log-probability, in nats, of not writing a token that the example has already had, summed over these
    tokens without the target: Welleck et al. (1908.04319), equations 3 and 5."""

    prompt: bool = True
    """Whether tokens of the prompt count as well, and not only those with a loss weight of their own."""

    def check_with(self, model, layout) -> None:
        require_hidden_targets(model)

    def total(self, outputs, batch: Batch) -> jax.Array:
        T = batch.shape[1]
        tokens_BT, segment_BT = batch.tokens_BT, batch.segment_BT
        counted_BT = batch.modality_BT == TEXT
        if not self.prompt:
            counted_BT &= own_weight(batch) != 0
        order_T = jnp.arange(T)
        earlier_1TT = (order_T[:, None] > order_T[None])[None]
        same_BTT = (tokens_BT[:, :, None] == tokens_BT[:, None]) & (segment_BT[:, :, None] == segment_BT[:, None])
        first_BT = counted_BT & ~jnp.any(same_BTT & earlier_1TT & counted_BT[:, None], axis=-1)

        def unlikely(logits_BCV, target_BC, segment_BC, order_BC):
            log_p_BCV = jax.nn.log_softmax(logits_BCV, axis=-1)
            index_BCT = jnp.broadcast_to(tokens_BT[:, None], (*target_BC.shape, T))
            p_BCT = jnp.exp(jnp.take_along_axis(log_p_BCV, index_BCT, axis=-1))
            candidate_BCT = first_BT[:, None] & (segment_BC[..., None] == segment_BT[:, None])
            candidate_BCT &= (order_T[None, None] <= order_BC[..., None]) & (index_BCT != target_BC[..., None])
            return -jnp.sum(jnp.where(candidate_BCT, jnp.log1p(-jnp.minimum(p_BCT, 1 - LEAST)), 0), axis=-1)

        order_BT = jnp.broadcast_to(order_T[None], batch.shape)
        given = batch.target_BT, segment_BT, order_BT
        found_BT = per_position(unlikely, (outputs,), batch.weight_BT != 0, *given)
        return jnp.sum(batch.weight_BT * found_BT)
