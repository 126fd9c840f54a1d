"""Linear recurrences over the positions of a row, with a matrix of fixed size as the state.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T                      y_t = S_t^T q_t          `linear_recurrence`
    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T    y_t = S_t^T q_t    `delta_rule`

A single position is computed directly. Longer inputs are split into chunks: interactions within chunks are matrix
products, computed for all chunks at once, and a scan carries S across chunks. This is the chunkwise form of Hua et al.
(2202.10447), Sun et al. (2307.08621, eq. 7), Yang et al. (2312.06635, section 4; 2406.06484, section 3) and Dao and Gu
(2405.21060, section 6).

Decays are passed as logarithms, at most 0, which are only ever added, never subtracted. The sum between two positions
of a chunk is composed of sums over blocks of 1, 2, 4 ... positions: from the earlier position to the end of its block,
and from the start of the next block to the later one. Hence no exponential exceeds 1, strong decay causes no
cancellation, and a per-channel decay can be multiplied into queries and keys on either side of the block boundary,
which turns the computation into a matrix product. At segment starts the decay is 0; padding has decay 1 and a zero key.

Axis letters: B rows, K heads of queries and keys, H heads (a multiple of K), T positions, d width of keys, e of values;
internally, N chunks of C positions and R = H / K. Everything is computed in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp

RESET = -1e9
"""The log decay at segment starts: its exponential is 0, and sums of it are finite."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SegmentStarts:
    """Segment starts and padding among the positions of a call.

    Attributes:
        real_BT: bool, False for padding.
        start_BT: bool, True at the first position of a segment, where the state is reset.
        last_B: int32, the segment of the last real position so far; 0 if there is none.
    """

    real_BT: jax.Array
    start_BT: jax.Array
    last_B: jax.Array


def segment_starts(segment_BT: jax.Array, last_B: jax.Array) -> SegmentStarts:
    """The segment starts in `segment_BT`, given the segment `last_B` of the previous position. Ignores padding."""
    before = jnp.concatenate([last_B[:, None], segment_BT], axis=1)
    latest = jax.lax.associative_scan(lambda a, b: jnp.where(b > 0, b, a), before, axis=1)
    return SegmentStarts(segment_BT > 0, latest[:, 1:] != latest[:, :-1], latest[:, -1])


def linear_recurrence(
    starts: SegmentStarts,
    query_BKTd: jax.Array,
    key_BKTd: jax.Array,
    value_BHTe: jax.Array,
    log_decay: jax.Array,
    state_BHde: jax.Array,
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t.

    Args:
        starts: segment starts and padding.
        query_BKTd, key_BKTd, value_BHTe: each of the K key heads serves H / K successive value heads.
        log_decay: log a_t <= 0, [B, H or 1, T, d or 1].
        state_BHde: S before the first position.
        chunk: C, a power of two. The result does not depend on it.

    Returns:
        (y, float32 [B, H, T, e], zero at padding; S after the last position, float32).
    """
    key_BKTd, log_decay = _mask_inputs(starts, key_BKTd, log_decay)
    if query_BKTd.shape[2] == 1:
        q, k = (_repeat_heads(x, state_BHde.shape[1])[:, :, 0] for x in (query_BKTd, key_BKTd))
        v = value_BHTe.astype(jnp.float32)[:, :, 0]
        state_BHde = jnp.exp(log_decay[:, :, 0, :, None]) * state_BHde + k[..., None] * v[:, :, None]
        return _mask_outputs(starts, _read(q, state_BHde)), state_BHde

    q, k, v, log_decay = _chunks((query_BKTd, key_BKTd, value_BHTe, log_decay), query_BKTd.shape[1], chunk)
    if log_decay.shape[-1] == 1:
        since, until, between = _between(log_decay)
        y = ((q @ k.mT) * between) @ v
    else:
        since, until, y = _by_blocks(q, k, v, log_decay)
    added = (k * jnp.exp(until)).mT @ v
    kept = jnp.exp(since[..., -1:, :]).mT

    def advance(state, change):
        kept, added = change
        return kept * state + added, state

    state, before = jax.lax.scan(advance, state_BHde.reshape(added.shape[1:]), (kept, added))
    y = y + (q * jnp.exp(since)) @ before
    return _mask_outputs(starts, _merge_chunks(y, query_BKTd.shape[2])), state.reshape(state_BHde.shape)


def delta_rule(
    starts: SegmentStarts,
    query_BHTd: jax.Array,
    key_BHTd: jax.Array,
    value_BHTe: jax.Array,
    beta_BHT1: jax.Array,
    log_decay: jax.Array,
    state_BHde: jax.Array,
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, y_t = S_t^T q_t.

    With u_t = beta_t (v_t - a_t S_{t-1}^T k_t), this is S_t = a_t S_{t-1} + k_t u_t^T. The u of a chunk depend linearly
    on each other and on the S before the chunk: a triangular system, solved once for both parts, u = U - W S. This is
    the UT transform of Yang et al. (2406.06484, eq. 10 and 11; with decay 2412.06464, section 3.3).

    Args:
        beta_BHT1: fraction of the value stored at the key to replace, 0 to 1.
        log_decay: log a_t <= 0, [B, H or 1, T, 1].
        starts, query_BHTd, key_BHTd, value_BHTe, state_BHde, chunk: as in `linear_recurrence`.

    Returns:
        As in `linear_recurrence`.
    """
    key_BHTd, log_decay = _mask_inputs(starts, key_BHTd, log_decay)
    if query_BHTd.shape[2] == 1:
        q, k, v, beta = (x.astype(jnp.float32)[:, :, 0] for x in (query_BHTd, key_BHTd, value_BHTe, beta_BHT1))
        state_BHde = jnp.exp(log_decay[:, :, 0, :, None]) * state_BHde
        u = beta * (v - _read(k, state_BHde)[:, :, 0])
        state_BHde = state_BHde + k[..., None] * u[:, :, None]
        return _mask_outputs(starts, _read(q, state_BHde)), state_BHde

    arrays = (query_BHTd, key_BHTd, value_BHTe, beta_BHT1, log_decay)
    q, k, v, beta, log_decay = _chunks(arrays, query_BHTd.shape[1], chunk)
    since, until, between = _between(log_decay)
    overlap = beta * (k @ k.mT) * between  # only entries below the diagonal are used
    known = jnp.concatenate([beta * v, beta * k * jnp.exp(since)], axis=-1)
    U, W = jnp.split(_inverse(overlap) @ known, [v.shape[-1]], axis=-1)
    onto, kept = (k * jnp.exp(until)).mT, jnp.exp(since[..., -1:, :]).mT

    def advance(state, change):
        U, W, onto, kept = change
        u = U - W @ state
        return kept * state + onto @ u, (state, u)

    state, (before, u) = jax.lax.scan(advance, state_BHde[:, :, None], (U, W, onto, kept))
    y = ((q @ k.mT) * between) @ u + (q * jnp.exp(since)) @ before
    return _mask_outputs(starts, _merge_chunks(y, query_BHTd.shape[2])), state.reshape(state_BHde.shape)


# --- padding, examples, chunks ----------------------------------------------------------------------------------------


def _mask_inputs(starts, key_BKTd, log_decay):
    """Zero keys and no decay at padding; reset decay at segment starts."""
    real, start = starts.real_BT[:, None, :, None], starts.start_BT[:, None, :, None]
    log_decay = jnp.where(start, RESET, jnp.where(real, log_decay.astype(jnp.float32), 0))
    return jnp.where(real, key_BKTd, 0), log_decay


def _mask_outputs(starts, y_BHTe):
    """Zero outputs at padding."""
    return jnp.where(starts.real_BT[:, None, :, None], y_BHTe, 0)


def _read(query_BHd, state_BHde):
    """S^T q, [B, H, 1, e]."""
    return query_BHd[:, :, None] @ state_BHde


def _repeat_heads(x_BKTd, H):
    """float32 [B, H, T, d]: each of the K heads repeated H / K times."""
    return jnp.repeat(x_BKTd.astype(jnp.float32), H // x_BKTd.shape[1], axis=1)


def _chunks(arrays, K, size):
    """Splits each [B, heads, T, c] into float32 [N, B, K or 1, R or 1, C, c], padded with zeros without effect."""
    T = arrays[0].shape[2]
    C = min(size, 1 << (T - 1).bit_length())

    def cut(x):
        B, G, _, c = x.shape
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, 0), (0, -T % C), (0, 0)))
        return jnp.moveaxis(x.reshape(B, min(G, K), G // min(G, K), -1, C, c), 3, 0)

    return [cut(x) for x in arrays]


def _merge_chunks(y, T):
    """[N, B, K, R, C, e] -> [B, H, T, e]."""
    N, B, K, R, C, e = y.shape
    return jnp.moveaxis(y, 0, 3).reshape(B, K * R, N * C, e)[:, :, :T]


# --- decays within a chunk --------------------------------------------------------------------------------------------


def _halves(x, h):
    """Splits [..., C, c] into blocks of 2 h positions; returns their first and second halves, [..., C / 2h, h, c]."""
    x = x.reshape(*x.shape[:-2], -1, 2, h, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _merge_halves(first, second):
    """The inverse of `_halves`."""
    x = jnp.concatenate([first, second], axis=-2)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _levels(log_decay):
    """For blocks of h = 1, 2, 4 ... C positions: (h, sums since the start of the block, sums until its end).

    Both are [..., C, c]; the first includes the decay of the position itself, the second does not.
    """
    since, until, h = log_decay, jnp.zeros_like(log_decay), 1
    levels = [(h, since, until)]
    while h < log_decay.shape[-2]:
        (since0, since1), (until0, until1) = _halves(since, h), _halves(until, h)
        since = _merge_halves(since0, since1 + since0[..., -1:, :])
        until = _merge_halves(until0 + since1[..., -1:, :], until1)
        h *= 2
        levels.append((h, since, until))
    return levels


def _between(log_decay):
    """(since, until, decay from each position to each later one, [..., C (later), C]) of log decays [..., C, 1]."""
    *levels, (_, since, until) = _levels(log_decay)
    between = jnp.ones((*log_decay.shape, 1), jnp.float32)
    for h, since_block, until_block in levels:
        across = jnp.exp(_halves(since_block, h)[1] + _halves(until_block, h)[0].mT)
        between = _lower(between[..., 0::2, :, :], across, between[..., 1::2, :, :])
    return since, until, between[..., 0, :, :]


def _lower(first, across, second):
    """The block matrix [[first, 0], [across, second]]."""
    above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([across, second], axis=-1)], axis=-2)


def _inverse(x):
    """(1 + strictly lower triangle of x [..., C, C])^-1, built up from blocks of 1, 2, 4 ... positions.

    [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]: forward substitution by matrix products.
    """
    C = x.shape[-1]
    inverse = jnp.ones((*x.shape[:-2], C, 1, 1), x.dtype)
    while (h := inverse.shape[-1]) < C:
        n = C // (2 * h)
        blocks = x.reshape(*x.shape[:-2], n, 2, h, n, 2, h)[..., 1, :, :, 0, :]  # [..., n, h, n, h]
        below = jnp.einsum("...ntns->...nts", blocks)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        inverse = _lower(first, -second @ below @ first, second)
    return inverse[..., 0, :, :]


def _by_blocks(q, k, v, log_decay):
    """(since, until, outputs due to positions of the same chunk, [..., C, e]), for one decay per channel.

    The second half of each block reads the first, with the decays on either side of the boundary multiplied into
    queries and keys: one matrix product per level, and no array of shape [C, C, d].
    """
    *levels, (_, since, until) = _levels(log_decay)
    y = jnp.sum(q * k, axis=-1, keepdims=True) * v
    for h, since_block, until_block in levels:
        later = _halves(q * jnp.exp(since_block), h)[1]
        earlier = _halves(k * jnp.exp(until_block), h)[0]
        first, second = _halves(y, h)
        y = _merge_halves(first, second + (later @ earlier.mT) @ _halves(v, h)[0])
    return since, until, y
