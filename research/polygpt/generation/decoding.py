"""Compiled generation: one program prefills the prompts, another decodes in a loop.

Axis letters: B rows, T prompt positions, S maximum number of generated tokens, V vocabulary.

The model is a static argument of both programs, so jax.jit caches them by model and shape. The KV cache is an explicit
pytree: right-padded prompts fill its first T slots, and each generated token takes the next slot in every row. A row
attends only to its own segment of the cache, never to padding; its position ids continue from the prompt's own length.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from polygpt.generation.sampling import Sampling, choose
from polygpt.sequence import PADDING, TEXT, Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """The state of a generation in progress.

    Attributes:
        cache: the model's KV cache.
        step: int32 scalar, the number of tokens that each unfinished row has.
        tokens_BS: int32, the generated tokens, including the end token; 0 beyond `count_B`.
        count_B: int32, the number of tokens generated in each row.
        limit_B: int32, the maximum number of tokens per row.
        done_B: bool, whether the row is finished.
        position_B: int32, position id of the row's first generated token.
        coordinate_B: int32, its coordinate on all three axes: one more than the largest coordinate before it.
        segment_B: int32, the row's segment.
        extra: labels of each row's last position by name, [B, ...], which generated positions have too.
        seen_BV: bool, text tokens that already occur in the row, for the repetition penalty; [B, 0] without a penalty.
        key_B: the row's random key.
    """

    cache: Any
    step: jax.Array
    tokens_BS: jax.Array
    count_B: jax.Array
    limit_B: jax.Array
    done_B: jax.Array
    position_B: jax.Array
    coordinate_B: jax.Array
    segment_B: jax.Array
    extra: dict[str, jax.Array]
    seen_BV: jax.Array
    key_B: jax.Array


@partial(jax.jit, static_argnames="model")
def prepared(model, params):
    """The parameters for `prefill` and `decode` of `model.merged`, see `Model.unstacked`."""
    return model.unstacked(params)


@partial(jax.jit, static_argnames=("model", "sampling", "size"))
def prefill(
    model, sampling: Sampling, size: int, params, batch: Batch, eos, seed, index_B, limit_B, used=None
) -> Decoding:
    """Reads the prompts and generates the first token of each row.

    Args:
        model: the model, hashable.
        sampling: the result of `Sampling.choice`.
        size: S, the capacity for generated tokens.
        params: the model's parameters.
        batch: the prompts, one per row, right-padded.
        eos: int32 scalar, the token that ends a text.
        seed: uint32 scalar.
        index_B: int32, the index of each prompt; together with the seed it determines the row's random key.
        limit_B: int32, the maximum number of tokens per row, at most S; 0 for rows without a prompt.
        used: int32 scalar, only ids below it can be chosen; None allows all.
    """
    B, T = batch.shape
    last_B = jnp.maximum((batch.segment_BT > 0).sum(axis=1) - 1, 0)
    logits_B1V, cache = model.decode(params, batch, model.init_cache(B, T + size), last_B)
    row_B = jnp.arange(B)
    V = logits_B1V.shape[-1] if sampling.repetition_penalty != 1 else 0
    segment_B = batch.segment_BT[row_B, last_B]
    position_BT3 = jnp.broadcast_to(batch.position_BT[..., None], (B, T, 3))
    coordinate_BT3 = position_BT3 if batch.coordinate_BT3 is None else batch.coordinate_BT3
    before_BT = batch.segment_BT == segment_B[:, None]
    text_BT = batch.modality_BT == TEXT
    seen_BV = jnp.zeros((B, V), bool).at[row_B[:, None], batch.tokens_BT].max(text_BT, mode="drop")
    state = Decoding(
        cache=cache,
        step=jnp.int32(0),
        tokens_BS=jnp.zeros((B, size), jnp.int32),
        count_B=jnp.zeros(B, jnp.int32),
        limit_B=limit_B,
        done_B=limit_B == 0,
        position_B=batch.position_BT[row_B, last_B] + 1,
        coordinate_B=jnp.where(before_BT[..., None], coordinate_BT3, 0).max(axis=(1, 2)) + 1,
        segment_B=segment_B,
        extra={name: jnp.asarray(x)[row_B, last_B] for name, x in batch.extra.items()},
        seen_BV=seen_BV,
        key_B=jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(index_B),
    )
    return _replicated(model, _append(state, logits_B1V[:, 0], sampling, eos, used))


@partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="state")
def decode(model, sampling: Sampling, params, state: Decoding, eos, until, used=None) -> Decoding:
    """Generates tokens until every row is finished or has `until` tokens. Donates `state`.

    Args:
        model, sampling, params, eos, used: as in `prefill`.
        state: the state of the generation so far.
        until: int32 scalar, the number of tokens to stop at.
    """

    def unfinished(state: Decoding):
        return (state.step < until) & ~state.done_B.all()

    def next_token(state: Decoding) -> Decoding:
        token_B = jax.lax.dynamic_index_in_dim(state.tokens_BS, state.step - 1, axis=1, keepdims=False)
        segment_B = jnp.where(state.done_B, 0, state.segment_B)
        nth = state.step - 1
        batch = _one_position(token_B, state.position_B + nth, state.coordinate_B + nth, segment_B)
        batch = batch.replace(extra={name: x[:, None] for name, x in state.extra.items()})
        logits_B1V, cache = model.decode(params, batch, state.cache)
        return _append(dataclasses.replace(state, cache=cache), logits_B1V[:, 0], sampling, eos, used)

    return _replicated(model, jax.lax.while_loop(unfinished, next_token, state))


def _replicated(model, state: Decoding) -> Decoding:
    """Replicates the fields that the host reads."""
    read = model.replicated((state.tokens_BS, state.count_B, state.done_B))
    return dataclasses.replace(state, **dict(zip(("tokens_BS", "count_B", "done_B"), read, strict=True)))


def _append(state: Decoding, logits_BV, sampling: Sampling, eos, used) -> Decoding:
    """Chooses each row's next token from its logits and appends it to unfinished rows."""
    if used is not None:  # training makes the ids that pad the vocabulary unlikely, but not impossible
        logits_BV = jnp.where((jnp.arange(logits_BV.shape[-1]) < used)[None], logits_BV, -jnp.inf)
    key_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.key_B, state.step)
    token_B = jnp.where(state.done_B, 0, choose(logits_BV, state.seen_BV, key_B, sampling))
    count_B = jnp.where(state.done_B, state.count_B, state.step + 1)
    rows = jnp.arange(len(token_B))
    return dataclasses.replace(
        state,
        step=state.step + 1,
        tokens_BS=jax.lax.dynamic_update_index_in_dim(state.tokens_BS, token_B, state.step, axis=1),
        count_B=count_B,
        done_B=state.done_B | (token_B == eos) | (count_B >= state.limit_B),
        seen_BV=state.seen_BV.at[rows, token_B].max(~state.done_B, mode="drop"),
    )


def _one_position(token_B, position_B, coordinate_B, segment_B) -> Batch:
    """One text token per row; rows with segment 0 are padding."""
    zero_B1 = jnp.zeros_like(token_B)[:, None]
    return Batch(
        tokens_BT=token_B[:, None],
        modality_BT=jnp.where(segment_B > 0, TEXT, PADDING).astype(jnp.int8)[:, None],
        slot_BT=zero_B1,
        position_BT=position_B[:, None],
        segment_BT=segment_B[:, None],
        span_BT=zero_B1,
        target_BT=zero_B1,
        weight_BT=zero_B1.astype(jnp.float32),
        media={},
        coordinate_BT3=jnp.broadcast_to(coordinate_B[:, None, None], (len(token_B), 1, 3)),
    )
