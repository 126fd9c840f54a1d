"""Running sums along the row and through the cache: what becomes of `Terms.sum` before a backend reads terms."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from polygpt.attention.kernels.recurrence import segment_starts
from polygpt.attention.scores import Terms
from polygpt.errors import SpecError


def accumulated(terms: Terms, segment_BT: jax.Array, before: tuple[dict[str, jax.Array], jax.Array] | None) -> Terms:
    """The terms with the running sums of `terms.sum` among those of queries and keys.

    Args:
        terms: of the positions of a call.
        segment_BT: their packed examples; 0 is padding.
        before: what `cache.last` says of the positions before the call; None means that there are none.

    Raises:
        SpecError: a sum has the name of another term.
    """
    if not terms.sum:
        return terms
    if taken := terms.sum.keys() & (terms.query.keys() | terms.key.keys() | terms.head.keys() | terms.pair.keys()):
        raise SpecError(
            f"term {min(taken)!r} is a running sum and another term too: choose another name for one of them"
        )
    sums = {
        name: running_sum(amount_BHT, segment_BT, before and before[0][name], before and before[1])
        for name, amount_BHT in terms.sum.items()
    }
    return dataclasses.replace(terms, query=terms.query | sums, key=terms.key | sums, sum={})


def running_sum(amount_BHT: jax.Array, segment_BT: jax.Array, so_far_BH1: Any = None, last_B: Any = None) -> jax.Array:
    """The sum of what the positions of an example have given so far, each itself included, float32 [B, H, T].

    It starts anew with each example, and is not the difference of two sums over the row: an example packed behind a
    long one has sums of the same digits as one alone.

    Args:
        amount_BHT: what each position adds; of padding nothing is added.
        segment_BT: 0 is padding, wherever it lies.
        so_far_BH1: the sum at the last position before, which counts where the example goes on; None means 0.
        last_B: the segment of that position; None or 0 means that there is none.
    """
    B, H, _ = amount_BHT.shape
    so_far_BH1 = jnp.zeros((B, H, 1)) if so_far_BH1 is None else so_far_BH1
    starts = segment_starts(segment_BT, jnp.zeros(B, jnp.int32) if last_B is None else last_B)
    amount_BHT = jnp.where(starts.real_BT[:, None], amount_BHT.astype(jnp.float32), 0)
    start_B1T = jnp.pad(starts.start_BT, ((0, 0), (1, 0)))[:, None]
    amounts = jnp.concatenate([so_far_BH1.astype(jnp.float32), amount_BHT], axis=2)

    def joined(one, other):
        (fresh, before), (starts, amount) = one, other
        return fresh | starts, jnp.where(starts, amount, before + amount)

    fresh = jnp.broadcast_to(start_B1T, amounts.shape)
    return jax.lax.associative_scan(joined, (fresh, amounts), axis=2)[1][:, :, 1:]
