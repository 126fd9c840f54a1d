"""Linear recurrences over the positions of a row: a matrix of fixed size is the memory of all that was read.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T                      y_t = S_t^T q_t          `linear_recurrence`
    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T    y_t = S_t^T q_t    `delta_rule`

One position is computed as it is written here. More are cut into chunks: what positions of a chunk do to each other is
a product of matrices, all chunks at once; a scan carries S over the chunks. That is the chunkwise form of Hua et al.
(2202.10447), Sun et al. (2307.08621, eq. 7), Yang et al. (2312.06635, section 4; 2406.06484, section 3) and Dao and Gu
(2405.21060, section 6).

Decays come as logarithms, at most 0, and are only ever added, never subtracted. The sum between two positions of a
chunk is put together from sums over blocks of 1, 2, 4 ... positions: from the earlier position to the end of its block
and from the beginning of the next block to the later one. So no exponential exceeds 1, no small difference of large
numbers is taken however strong the decay, and the decay of a channel can be multiplied into queries and keys on either
side of the border between two blocks, which makes a matrix product of it. A new example is a decay of zero; padding is
a decay of one and a key of zero.

Axis letters: B rows, K heads of queries and keys, H heads (a multiple of K), T positions, d width of keys, e of values;
inside, N chunks of C positions and R = H / K. All is computed in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp

RESET = -1e9
"""The logarithm of a decay that forgets everything: its exponential is zero, and sums of it are finite."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Course:
    """How the positions of a call follow each other.

    Attributes:
        real_BT: bool, False for padding.
        fresh_BT: bool, where an example begins: what was read before is forgotten.
        last_B: int32, the segment of the last position that is no padding; 0 before the first.
    """

    real_BT: jax.Array
    fresh_BT: jax.Array
    last_B: jax.Array


def course(segment_BT: jax.Array, last_B: jax.Array) -> Course:
    """The course of positions of these segments after one of segment `last_B`; padding in between changes nothing."""
    before = jnp.concatenate([last_B[:, None], segment_BT], axis=1)
    held = jax.lax.associative_scan(lambda a, b: jnp.where(b > 0, b, a), before, axis=1)
    return Course(segment_BT > 0, held[:, 1:] != held[:, :-1], held[:, -1])


def linear_recurrence(
    course: Course,
    query_BKTd: jax.Array,
    key_BKTd: jax.Array,
    value_BHTe: jax.Array,
    log_decay: jax.Array,
    state_BHde: jax.Array,
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t.

    Args:
        course: where examples begin and what is padding.
        query_BKTd, key_BKTd, value_BHTe: each of the K heads of keys serves H / K successive heads of values.
        log_decay: log a_t <= 0, [B, H or 1, T, d or 1].
        state_BHde: S before the first position.
        chunk: C, a power of two. The result does not depend on it.

    Returns:
        (y, float32 [B, H, T, e], zero for padding; S after the last position, float32).
    """
    key_BKTd, log_decay = _quiet(course, key_BKTd, log_decay)
    if query_BKTd.shape[2] == 1:
        q, k = (_spread(x, state_BHde.shape[1])[:, :, 0] for x in (query_BKTd, key_BKTd))
        v = value_BHTe.astype(jnp.float32)[:, :, 0]
        state_BHde = jnp.exp(log_decay[:, :, 0, :, None]) * state_BHde + k[..., None] * v[:, :, None]
        return _heard(course, _read(q, state_BHde)), state_BHde

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
    return _heard(course, _joined(y, query_BKTd.shape[2])), state.reshape(state_BHde.shape)


def delta_rule(
    course: Course,
    query_BHTd: jax.Array,
    key_BHTd: jax.Array,
    value_BHTe: jax.Array,
    beta_BHT1: jax.Array,
    log_decay: jax.Array,
    state_BHde: jax.Array,
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, y_t = S_t^T q_t.

    With u_t = beta_t (v_t - a_t S_{t-1}^T k_t) it is S_t = a_t S_{t-1} + k_t u_t^T. The u of a chunk depend on each
    other and on the S before it linearly: a triangular system, solved once for both parts, u = U - W S. That is the UT
    transform of Yang et al. (2406.06484, eq. 10 and 11; with decay 2412.06464, section 3.3).

    Args:
        beta_BHT1: how much of what is held at the key is replaced, 0 to 1.
        log_decay: log a_t <= 0, [B, H or 1, T, 1].
        course, query_BHTd, key_BHTd, value_BHTe, state_BHde, chunk: as of `linear_recurrence`.

    Returns:
        As `linear_recurrence`.
    """
    key_BHTd, log_decay = _quiet(course, key_BHTd, log_decay)
    if query_BHTd.shape[2] == 1:
        q, k, v, beta = (x.astype(jnp.float32)[:, :, 0] for x in (query_BHTd, key_BHTd, value_BHTe, beta_BHT1))
        state_BHde = jnp.exp(log_decay[:, :, 0, :, None]) * state_BHde
        u = beta * (v - _read(k, state_BHde)[:, :, 0])
        state_BHde = state_BHde + k[..., None] * u[:, :, None]
        return _heard(course, _read(q, state_BHde)), state_BHde

    arrays = (query_BHTd, key_BHTd, value_BHTe, beta_BHT1, log_decay)
    q, k, v, beta, log_decay = _chunks(arrays, query_BHTd.shape[1], chunk)
    since, until, between = _between(log_decay)
    overlap = beta * (k @ k.mT) * between  # only what lies below the diagonal is read
    known = jnp.concatenate([beta * v, beta * k * jnp.exp(since)], axis=-1)
    U, W = jnp.split(_inverse(overlap) @ known, [v.shape[-1]], axis=-1)
    onto, kept = (k * jnp.exp(until)).mT, jnp.exp(since[..., -1:, :]).mT

    def advance(state, change):
        U, W, onto, kept = change
        u = U - W @ state
        return kept * state + onto @ u, (state, u)

    state, (before, u) = jax.lax.scan(advance, state_BHde[:, :, None], (U, W, onto, kept))
    y = ((q @ k.mT) * between) @ u + (q * jnp.exp(since)) @ before
    return _heard(course, _joined(y, query_BHTd.shape[2])), state.reshape(state_BHde.shape)


# --- padding, examples, chunks ----------------------------------------------------------------------------------------


def _quiet(course, key_BKTd, log_decay):
    """Keys and decays with which padding changes nothing and the beginning of an example forgets everything."""
    real, fresh = course.real_BT[:, None, :, None], course.fresh_BT[:, None, :, None]
    log_decay = jnp.where(fresh, RESET, jnp.where(real, log_decay.astype(jnp.float32), 0))
    return jnp.where(real, key_BKTd, 0), log_decay


def _heard(course, y_BHTe):
    """Nothing where there is padding."""
    return jnp.where(course.real_BT[:, None, :, None], y_BHTe, 0)


def _read(query_BHd, state_BHde):
    """S^T q, [B, H, 1, e]."""
    return query_BHd[:, :, None] @ state_BHde


def _spread(x_BKTd, H):
    """float32 [B, H, T, d]: each of K heads for H / K successive ones."""
    return jnp.repeat(x_BKTd.astype(jnp.float32), H // x_BKTd.shape[1], axis=1)


def _chunks(arrays, K, size):
    """Each [B, heads, T, c] as float32 [N, B, K or 1, R or 1, C, c], filled up with zeros, which change nothing."""
    T = arrays[0].shape[2]
    C = min(size, 1 << (T - 1).bit_length())

    def cut(x):
        B, G, _, c = x.shape
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, 0), (0, -T % C), (0, 0)))
        return jnp.moveaxis(x.reshape(B, min(G, K), G // min(G, K), -1, C, c), 3, 0)

    return [cut(x) for x in arrays]


def _joined(y, T):
    """[N, B, K, R, C, e] -> [B, H, T, e]."""
    N, B, K, R, C, e = y.shape
    return jnp.moveaxis(y, 0, 3).reshape(B, K * R, N * C, e)[:, :, :T]


# --- decays within a chunk --------------------------------------------------------------------------------------------


def _halves(x, h):
    """[..., C, c] as blocks of 2 h positions, the first and the second h of each: [..., C / 2h, h, c]."""
    x = x.reshape(*x.shape[:-2], -1, 2, h, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _whole(first, second):
    """The inverse of `_halves`."""
    x = jnp.concatenate([first, second], axis=-2)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _levels(log_decay):
    """For blocks of h = 1, 2, 4 ... C positions: (h, sums since the beginning of the block, sums until its end).

    Both are [..., C, c]; the decay of the position itself is in the first and not in the second.
    """
    since, until, h = log_decay, jnp.zeros_like(log_decay), 1
    levels = [(h, since, until)]
    while h < log_decay.shape[-2]:
        (since0, since1), (until0, until1) = _halves(since, h), _halves(until, h)
        since = _whole(since0, since1 + since0[..., -1:, :])
        until = _whole(until0 + since1[..., -1:, :], until1)
        h *= 2
        levels.append((h, since, until))
    return levels


def _between(log_decay):
    """Of [..., C, 1]: (since, until, and the decay from each position to each later one, [..., C (later), C])."""
    *levels, (_, since, until) = _levels(log_decay)
    between = jnp.ones((*log_decay.shape, 1), jnp.float32)
    for h, since_block, until_block in levels:
        across = jnp.exp(_halves(since_block, h)[1] + _halves(until_block, h)[0].mT)
        between = _lower(between[..., 0::2, :, :], across, between[..., 1::2, :, :])
    return since, until, between[..., 0, :, :]


def _lower(first, across, second):
    """The matrix of four blocks [[first, 0], [across, second]]."""
    above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([across, second], axis=-1)], axis=-2)


def _inverse(x):
    """(1 + what is below the diagonal of [..., C, C])^-1: blocks of 1, 2, 4 ... positions inverted from smaller ones.

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
    """(since, until, what positions of a chunk read of each other, [..., C, e]), for a decay a channel.

    The second half of each block reads the first, with the decays on either side of the border multiplied into queries
    and keys: one product of matrices a level, and nothing of the shape [C, C, d].
    """
    *levels, (_, since, until) = _levels(log_decay)
    y = jnp.sum(q * k, axis=-1, keepdims=True) * v
    for h, since_block, until_block in levels:
        later = _halves(q * jnp.exp(since_block), h)[1]
        earlier = _halves(k * jnp.exp(until_block), h)[0]
        first, second = _halves(y, h)
        y = _whole(first, second + (later @ earlier.mT) @ _halves(v, h)[0])
    return since, until, y
