"""Running sums along the row and through the cache, which replace `Terms.sum` before a backend reads the terms."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from polygpt.attention.kernels.recurrence import segment_starts
from polygpt.attention.scores import Terms
from polygpt.errors import SpecError


def accumulated(terms: Terms, segment_BT: jax.Array, before: tuple[dict[str, jax.Array], jax.Array] | None) -> Terms:
    """The terms, with the running sums of `terms.sum` added to the query and key terms.

    Args:
        terms: the terms of the positions of a call.
        segment_BT: their packed examples; 0 is padding.
        before: the result of `cache.last` for the positions before the call; None if there are none.

    Raises:
        SpecError: if a sum has the name of another term.
    """
    if not terms.sum:
        return terms
    if taken := terms.sum.keys() & (terms.query.keys() | terms.key.keys() | terms.head.keys() | terms.pair.keys()):
        raise SpecError(f"term {min(taken)!r} is a running sum and another term: choose another name for one of them")
    sums = {
        name: running_sum(amount_BHT, segment_BT, before and before[0][name], before and before[1])
        for name, amount_BHT in terms.sum.items()
    }
    return dataclasses.replace(terms, query=terms.query | sums, key=terms.key | sums, sum={})


def running_sum(amount_BHT: jax.Array, segment_BT: jax.Array, so_far_BH1: Any = None, last_B: Any = None) -> jax.Array:
    """The cumulative sum within each example, including the position itself, float32 [B, H, T].

    Sums restart at segment starts instead of being differences of sums over the row, so packing after a long example
    does not change their rounding.

    Args:
        amount_BHT: the amount of each position; padding is ignored.
        segment_BT: packed examples; 0 is padding, which may be anywhere.
        so_far_BH1: the sum at the previous position, used if the example continues; None for 0.
        last_B: the segment of the previous position; None or 0 if there is none.
    """
    B, H, _ = amount_BHT.shape
    so_far_BH1 = jnp.zeros((B, H, 1)) if so_far_BH1 is None else so_far_BH1
    starts = segment_starts(segment_BT, jnp.zeros(B, jnp.int32) if last_B is None else last_B)
    amount_BHT = jnp.where(starts.real_BT[:, None], amount_BHT.astype(jnp.float32), 0)
    start_B1T = jnp.pad(starts.start_BT, ((0, 0), (1, 0)))[:, None]
    amounts = jnp.concatenate([so_far_BH1.astype(jnp.float32), amount_BHT], axis=2)

    def combine(one, other):
        (any_start, before), (start, amount) = one, other
        return any_start | start, jnp.where(start, amount, before + amount)

    start_BHT = jnp.broadcast_to(start_B1T, amounts.shape)
    return jax.lax.associative_scan(combine, (start_BHT, amounts), axis=2)[1][:, :, 1:]
