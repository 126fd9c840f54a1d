"""Running sums along the row and through the cache, terms that a module makes itself, and terms of pairs."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polygpt import api as pg
from polygpt.attention.contract import Context, Dims
from polygpt.attention.forgetting import Forgetting
from polygpt.attention.masks import DECODER
from polygpt.attention.meta import Meta
from polygpt.attention.running import accumulated, running_sum
from polygpt.attention.scores import ForgetGate
from polygpt.errors import SpecError
from polygpt.nn.positions import NoPosition

SEGMENT = np.int32([[1, 1, 1, 0, 0, 1, 1, 2, 2, 2, 0, 2], [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3]])
"""Two rows of packed examples, with padding at the beginning, inside and at the end of one."""
B, T = SEGMENT.shape
D, H = 8, 2


def meta() -> Meta:
    position = np.zeros_like(SEGMENT)
    for b in range(B):
        seen = {}
        for t in range(T):
            position[b, t] = seen.setdefault(int(SEGMENT[b, t]), 0)
            seen[int(SEGMENT[b, t])] += 1
    index = np.broadcast_to(np.arange(T, dtype=np.int32), SEGMENT.shape)
    return jax.tree.map(jnp.asarray, Meta(index, position, SEGMENT, np.zeros_like(SEGMENT), np.zeros_like(SEGMENT)))


def lively(spec):
    """(a jitted call, parameters as nested NumPy arrays in float64)."""
    graphdef, state = nnx.split(spec.build(Dims(D), nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), state)
    call = jax.jit(lambda x_BTD, context, cache=None: nnx.merge(graphdef, state)(x_BTD, context, cache))
    return call, jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(state))


def vectors(seed=1):
    return np.float32(np.random.default_rng(seed).normal(size=(B, T, D)))


def through_a_cache(spec, call, x_BTD, cuts, ring=False):
    """The same row in several calls."""
    everything, cache, got = meta(), spec.init_cache(Dims(D), B, T, ring), []
    for start, stop in zip([0, *cuts], [*cuts, T], strict=True):
        query = jax.tree.map(lambda x, part=slice(start, stop): x[:, part], everything)
        read = jnp.arange(T)[None] < stop
        key = dataclasses.replace(everything, segment=jnp.where(read, everything.segment, 0))
        y_BTD, cache = call(x_BTD[:, start:stop], Context(query, key, DECODER, jnp.int32(start)), cache)
        got.append(y_BTD)
    return np.concatenate(got, axis=1)


def written_out(p, x_BTD, kv_heads):
    """Forgetting attention in float64, pair by pair, D summed position by position. Lin et al. (2503.02130), eq. 6."""
    x_BTD = np.asarray(x_BTD, np.float64)
    d, gate = D // H, p["terms"].get("gate") or p["terms"]["second"]["gate"]
    log_f = -np.log1p(np.exp(-(x_BTD @ gate["kernel"] + gate["bias"])))
    q, k, v = (x_BTD @ p[name]["kernel"] for name in ("query", "key", "value"))
    y = np.zeros((B, T, H * d))
    for b, t, h in np.ndindex(B, T, H):
        mine, of_key = slice(h * d, (h + 1) * d), slice(h * kv_heads // H * d, (h * kv_heads // H + 1) * d)
        seen = [s for s in range(t + 1) if SEGMENT[b, s] == SEGMENT[b, t] != 0]
        scores = []
        for s in seen:
            forgotten = sum(log_f[b, n, h] for n in seen if s < n <= t)
            scores.append(q[b, t, mine] @ k[b, s, of_key] / np.sqrt(d) + forgotten)
        weights = np.exp(np.array(scores) - max(scores, default=0))
        if seen:
            y[b, t, mine] = sum(w * v[b, s, of_key] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return y @ p["output"]["kernel"]


@pytest.mark.parametrize(
    ("backend", "kv_heads"), [("reference", 2), ("reference", 1), ("chunked", 1), ("library", 2), ("flex", 2)]
)
def test_forgetting_equals_float64_loops(backend, kv_heads):
    spec = Forgetting(heads=H, kv_heads=kv_heads, backend=backend, strict=True)
    call, p = lively(spec)
    x_BTD, everything = vectors(), meta()
    want = written_out(p, x_BTD, kv_heads)
    got, _ = call(x_BTD, Context(everything, everything, DECODER))
    real = SEGMENT > 0
    assert np.abs(want[real]).max() > 1
    np.testing.assert_allclose(np.asarray(got)[real], want[real], rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("cuts", [(4, 5, 10), tuple(range(1, T))])
def test_forgetting_is_the_same_through_a_cache(cuts):
    spec = Forgetting(heads=H)
    call, _ = lively(spec)
    everything = meta()
    want, _ = call(vectors(), Context(everything, everything, DECODER))
    got = through_a_cache(spec, call, vectors(), cuts)
    real = SEGMENT > 0
    np.testing.assert_allclose(got[real], np.asarray(want)[real], rtol=0, atol=1e-5 * np.abs(want).max())


@dataclasses.dataclass(frozen=True)
class NearForgetting(Forgetting):
    """With a window, and so with a ring for its cache."""

    def mask(self, mask):
        return super().mask(mask) & pg.Window(3)


def test_a_ring_carries_the_sum_on():
    spec = NearForgetting(heads=H)
    call, _ = lively(spec)
    everything = meta()
    want, _ = call(vectors(), Context(everything, everything, DECODER))
    got = through_a_cache(spec, call, vectors(), tuple(range(2, T)), ring=True)
    assert spec.init_cache(Dims(D), B, T).meta.index.shape[1] < T
    real = SEGMENT > 0
    np.testing.assert_allclose(got[real], np.asarray(want)[real], rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_sum_starts_anew_with_each_example_and_skips_padding():
    amount = np.float32(np.random.default_rng(0).normal(size=(B, H, T)))
    want = np.zeros((B, H, T))
    for b, h in np.ndindex(B, H):
        total, segment = 0.0, 0
        for t in range(T):
            if SEGMENT[b, t]:
                total = (total if SEGMENT[b, t] == segment else 0.0) + np.float64(amount[b, h, t])
                segment = SEGMENT[b, t]
            want[b, h, t] = total
    sums = jax.jit(running_sum)
    whole = np.asarray(sums(amount, SEGMENT))
    np.testing.assert_allclose(whole, want, rtol=0, atol=1e-6)
    for cut in range(1, T):  # padding in between keeps the sum and the example before it
        last = np.int32([next((s for s in row[:cut][::-1] if s), 0) for row in SEGMENT])
        # Padding behind makes all parts as long, so that they share a program.
        amounts, segments = np.pad(amount[:, :, cut:], ((0, 0), (0, 0), (0, cut))), np.pad(SEGMENT, ((0, 0), (0, cut)))
        rest = sums(amounts, segments[:, cut:], whole[:, :, cut - 1 : cut], last)
        np.testing.assert_allclose(rest[:, :, :-cut], whole[:, :, cut:], rtol=0, atol=1e-6)


def test_an_example_behind_a_long_one_has_the_digits_of_one_alone():
    """The difference of two sums over the row would be off by some 1e-4 here."""
    long, short = 4_000, 16
    amount = jnp.full((1, 1, long + short), -0.7, jnp.float32).at[0, 0, long:].set(-jnp.arange(1, short + 1) / 3)
    segment = jnp.concatenate([jnp.ones(long, jnp.int32), jnp.full(short, 2, jnp.int32)])[None]
    sums = jax.jit(running_sum)
    np.testing.assert_allclose(
        sums(amount, segment)[:, :, long:], sums(amount[:, :, long:], segment[:, long:]), rtol=1e-6
    )


def test_a_sum_and_another_term_of_one_name_are_told():
    numbers = jnp.zeros((B, H, T))
    with pytest.raises(SpecError, match="'gone' is a running sum and another term"):
        accumulated(pg.Terms(query={"gone": numbers}, sum={"gone": numbers}), jnp.asarray(SEGMENT), None)


def test_a_forget_gate_goes_with_any_other_modification():
    spec = pg.MultiHead(heads=H, position=pg.ALiBi(), scores=(ForgetGate(), ForgetGate()))
    call, _ = lively(spec)
    everything = meta()
    want, _ = call(vectors(), Context(everything, everything, DECODER))
    got = through_a_cache(spec, call, vectors(), (4, 5, 9))
    real = SEGMENT > 0
    np.testing.assert_allclose(got[real], np.asarray(want)[real], rtol=0, atol=1e-5 * np.abs(want).max())


# --- terms that the attention module makes ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weighed(pg.Score):
    """Reads what its module gives under the name of a term that ALiBi has too."""

    adds: ClassVar[bool] = True

    def __call__(self, score, query, key, terms):
        return score + terms.key["slope"] + terms.pair["meeting"]


@dataclasses.dataclass(frozen=True)
class Meeting(pg.MultiHead):
    """One number a key, and one a pair, from projections of the module."""

    term: str = "slope"
    "The name of the key's term."

    def score(self, score):
        return super().score(score).then(Weighed())

    def build(self, dims, rngs):
        return MeetingModule(self, dims, rngs)


class MeetingModule(pg.MultiHeadModule):
    """Keeps a vector of each position in the cache."""

    def project(self, rngs):
        super().project(rngs)
        heads = self.spec.heads
        self.slope, self.left, self.right = (
            pg.Linear(self.dims.width, heads, rngs=rngs, bias=True, dtype="float32") for _ in range(3)
        )

    def own_terms(self, x_BTD, context):
        return pg.Terms(key={self.spec.term: self.slope(x_BTD).swapaxes(1, 2)})

    def remembered(self, x_BTD, context):
        return super().remembered(x_BTD, context) | {"right": self.right(x_BTD).swapaxes(1, 2)}

    def pair_terms(self, x_BTD, context, seen, key):
        left_BHT = self.left(x_BTD).swapaxes(1, 2)
        return {"meeting": jnp.tanh(left_BHT[..., None] * seen["right"][:, :, None, :])}


def of_pairs(p, x_BTD, slopes):
    """`Meeting` in float64, matrix by matrix."""
    x_BTD, position = np.asarray(x_BTD, np.float64), np.asarray(meta().position)
    d = D // H

    def heads(name):
        return (x_BTD @ p[name]["kernel"]).reshape(B, T, -1, d).swapaxes(1, 2)

    slope, left, right = (
        (x_BTD @ p[name]["kernel"] + p[name].get("bias", 0)).swapaxes(1, 2) for name in ("slope", "left", "right")
    )
    scores = heads("query") @ heads("key").swapaxes(2, 3) / np.sqrt(d)
    scores += slope[:, :, None, :] + np.tanh(left[..., None] * right[:, :, None, :])
    scores -= np.reshape(slopes, (1, -1, 1, 1)) * np.abs(position[:, None, :, None] - position[:, None, None, :])
    seen = (SEGMENT[:, :, None] == SEGMENT[:, None, :]) & np.tri(T, dtype=bool)
    weights = np.where(seen[:, None], np.exp(scores - scores.max()), 0)
    y = weights / weights.sum(-1, keepdims=True) @ heads("value")
    return y.swapaxes(1, 2).reshape(B, T, -1) @ p["output"]["kernel"]


@pytest.mark.parametrize(
    ("position", "slopes"), [(NoPosition(), [0, 0]), (pg.ALiBi(), [2.0**-4, 2.0**-8])], ids=["alone", "ALiBi"]
)
@pytest.mark.parametrize("backend", ["reference", "chunked", "library"])
def test_terms_of_the_module_and_of_pairs_equal_float64(backend, position, slopes):
    spec = Meeting(heads=H, position=position, backend=backend, strict=True)
    call, p = lively(spec)
    everything, real = meta(), SEGMENT > 0
    want = of_pairs(p, vectors(), slopes)
    got, _ = call(vectors(), Context(everything, everything, DECODER))
    np.testing.assert_allclose(np.asarray(got)[real], want[real], rtol=0, atol=2e-5 * np.abs(want).max())
    cached = through_a_cache(spec, call, vectors(), (3, 4, 8))
    np.testing.assert_allclose(cached[real], want[real], rtol=0, atol=2e-5 * np.abs(want).max())


def test_flex_refuses_terms_of_pairs():
    everything = meta()
    call, _ = lively(Meeting(heads=H, backend="flex", strict=True))
    with pytest.raises(SpecError, match="pair terms .meeting. are arrays of T x S"):
        call(vectors(), Context(everything, everything, DECODER))


def test_a_name_with_a_dot_is_told():
    everything = meta()
    call, _ = lively(Meeting(heads=H, term="first.slope"))
    with pytest.raises(SpecError, match="'first.slope': a name has no dot"):
        call(vectors(), Context(everything, everything, DECODER))


def test_the_weights_of_chosen_queries_are_rows_of_all_with_pairs_too():
    spec, everything = Meeting(heads=H), meta()
    module = spec.build(Dims(D), nnx.Rngs(0))
    context = Context(everything, everything, DECODER)
    whole = module.weights(jnp.asarray(vectors()), context)
    some = module.weights(jnp.asarray(vectors()), context, jnp.asarray([2, 7]))
    np.testing.assert_array_equal(some, whole[:, :, [2, 7]])
