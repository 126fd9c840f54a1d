"""The chunked and the step form of linear recurrences against float64 NumPy, one position after the other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.attention.kernels.recurrence import _chunks, delta_rule, linear_recurrence, segment_starts

B, H, D, E = 2, 4, 4, 3
SEGMENT = np.int32(
    [[1, 1, 1, 2, 2, 2, 2, 2, 3, 0, 0, 3, 3, 3, 4, 4, 4, 4, 4], [0, 0, 1, 1, 1, 0, 1, 1, 2, 1, 1] + [0] * 8]
)
T = SEGMENT.shape[1]
CHUNKS = (4, 64)


def linear_loop(segment, last, query, key, value, log_decay, state):
    """The equations as they are written: [B, T, ...] in float64; decays of channels, [B, H, T, d]."""
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    state = state.astype(np.float64).copy()
    for b, held in enumerate(last):
        for t, now in enumerate(segment[b]):
            if now == 0:
                continue
            if now != held:
                state[b], held = 0, now
            decay, k, v = np.exp(log_decay[b, :, t, :, None]), key[b, :, t, :, None], value[b, :, t, None, :]
            state[b] = decay * state[b] + k * v
            out[b, :, t] = (query[b, :, t, :, None] * state[b]).sum(axis=1)
    return out, state


def delta_loop(segment, last, query, key, value, beta, log_decay, state):
    """S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T."""
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    state = state.astype(np.float64).copy()
    for b, held in enumerate(last):
        for t, now in enumerate(segment[b]):
            if now == 0:
                continue
            if now != held:
                state[b], held = 0, now
            for h in range(query.shape[1]):
                k, rate = key[b, h, t], beta[b, h, t, 0]
                kept = np.exp(log_decay[b, h, t, 0]) * (np.eye(len(k)) - rate * np.outer(k, k))
                state[b, h] = kept @ state[b, h] + rate * np.outer(k, value[b, h, t])
                out[b, h, t] = query[b, h, t] @ state[b, h]
    return out, state


def arrays(kind, length=T, seed=0, strength=1.0):
    """The operands of a kind of recurrence, and a state to go on from."""
    rng = np.random.default_rng(seed)
    K, decays = {"none": (H, (1, 1)), "head": (H, (H, 1)), "groups": (2, (H, 1)), "channel": (H, (H, D))}[kind]
    query, key = (np.float32(rng.normal(size=(B, K, length, D))) / 2 for _ in range(2))
    value = np.float32(rng.normal(size=(B, H, length, E)))
    log_decay = -strength * np.float32(rng.exponential(size=(B, decays[0], length, decays[1])))
    log_decay = log_decay * (kind != "none")
    return query, key, value, log_decay, np.float32(rng.normal(size=(B, H, D, E)))


def expected(segment, last, query, key, value, log_decay, state):
    query, key = (np.repeat(x, H // x.shape[1], axis=1) for x in (query, key))
    log_decay = np.broadcast_to(log_decay, query.shape)
    return linear_loop(segment, last, query, key, value, log_decay, state)


@partial(jax.jit, static_argnames="chunk")
def linear(segment_BT, last_B, *operands, chunk=4):
    starts = segment_starts(segment_BT, last_B)
    return *linear_recurrence(starts, *operands, chunk), starts.last_B


@partial(jax.jit, static_argnames="chunk")
def delta(segment_BT, last_B, *operands, chunk=4):
    starts = segment_starts(segment_BT, last_B)
    return *delta_rule(starts, *operands, chunk), starts.last_B


def delta_arrays(length=T, seed=0):
    query, key, value, log_decay, state = arrays("head", length, seed)
    beta = np.float32(np.random.default_rng(seed + 1).random((B, H, length, 1)))
    return query, key / np.linalg.norm(key, axis=-1, keepdims=True), value, beta, log_decay, state


def stretch(operands, start, stop):
    """Positions of all operands but the state."""
    return [x[:, :, start:stop] for x in operands[:-1]]


LAST = np.int32([1, 2])  # the first row goes on with its example, the second does not
KINDS = ["none", "head", "groups", "channel"]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_chunked_form_equals_the_loop(kind, chunk):
    operands = arrays(kind)
    out, state = expected(SEGMENT, LAST, *operands)
    got_out, got_state, last_B = linear(SEGMENT, LAST, *operands, chunk=chunk)
    # Sums of a dozen products of numbers of the size 1: 1e-6 is a few units in the last place of such a sum.
    np.testing.assert_allclose(got_out, out, rtol=0, atol=5e-6)
    np.testing.assert_allclose(got_state, state, rtol=0, atol=5e-6)
    np.testing.assert_array_equal(last_B, [4, 1])


@pytest.mark.parametrize(("size", "length"), [(4, 4), (16, 16), (64, 32)])
def test_a_chunk_is_no_longer_than_asked_for_or_than_the_row_needs(size, length):
    (x_NBKRCd,) = _chunks([np.ones((B, H, T, D))], K=2, size=size)
    assert x_NBKRCd.shape == (-(-T // length), B, 2, H // 2, length, D)
    assert x_NBKRCd.sum() == B * H * T * D  # zeros beyond the row


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_chunked_delta_rule_equals_the_loop(chunk):
    operands = delta_arrays()
    out, state = delta_loop(SEGMENT, LAST, *operands[:4], np.broadcast_to(operands[4], (B, H, T, 1)), operands[5])
    got_out, got_state, _ = delta(SEGMENT, LAST, *operands, chunk=chunk)
    np.testing.assert_allclose(got_out, out, rtol=0, atol=5e-6)
    np.testing.assert_allclose(got_state, state, rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", ["groups", "channel", "delta"])
def test_step_by_step_and_in_pieces_it_is_the_same(kind):
    recur, operands = (delta, delta_arrays()) if kind == "delta" else (linear, arrays(kind))
    whole, end, _ = recur(SEGMENT, LAST, *operands)
    for size in (1, 8):
        state, last_B, pieces = operands[-1], LAST, []
        for start in range(0, T, size):
            part = stretch(operands, start, start + size)
            out, state, last_B = recur(SEGMENT[:, start : start + size], last_B, *part, state)
            pieces.append(out)
        np.testing.assert_allclose(np.concatenate(pieces, axis=2), whole, rtol=0, atol=5e-6)
        np.testing.assert_allclose(state, end, rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_long_rows_and_strong_decays_stay_exact(kind):
    """Decays from none to e^-80 a position, mixed: a form that subtracts their sums loses the weak ones' digits."""
    length = 4096
    query, key, value, log_decay, state = arrays(kind, length)
    rng = np.random.default_rng(3)
    log_decay = log_decay * np.float32(10.0 ** rng.uniform(-4, 1.9, log_decay.shape))
    segment = np.ones((B, length), np.int32)
    out, _ = expected(segment, LAST, query, key, value, log_decay, state)
    got, end, _ = linear(segment, LAST, query, key, value, log_decay, state, chunk=64)
    np.testing.assert_allclose(got, out, rtol=0, atol=1e-5)
    assert np.isfinite(end).all()


@pytest.mark.parametrize("kind", ["head", "channel", "delta"])
def test_gradients_are_finite_beside_padding_and_zero_decay(kind):
    recur, operands = (delta, delta_arrays()) if kind == "delta" else (linear, arrays(kind, strength=1e4))
    segment = SEGMENT.copy()
    segment[1] = 0

    def total(*operands):
        out, state, _ = recur(segment, LAST, *operands)
        return jnp.sum(jnp.sin(out)) + jnp.sum(state)

    for gradient in jax.jit(jax.grad(total, argnums=tuple(range(len(operands)))))(*operands):
        assert np.isfinite(gradient).all()


def test_operands_of_bfloat16_are_computed_in_float32():
    query, key, value, log_decay, state = arrays("channel")
    half = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    out, end, _ = linear(SEGMENT, LAST, *half, log_decay, state)
    same, _, _ = linear(SEGMENT, LAST, *[np.float32(x) for x in half], log_decay, state)
    assert out.dtype == end.dtype == jnp.float32
    np.testing.assert_array_equal(out, same)
