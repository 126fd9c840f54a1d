"""The layers of the linear family against float64 NumPy, and what all of them have to hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polygpt.attention.contract import Context, Dims
from polygpt.attention.delta import DeltaNet
from polygpt.attention.gated_linear import GatedLinear
from polygpt.attention.linear import LinearAttention
from polygpt.attention.mamba2 import Mamba2
from polygpt.attention.masks import DECODER, ENCODER, Causal, KeyModality, QueryModality, SameSegment
from polygpt.attention.meta import Meta
from polygpt.attention.recurrent import Recurrent, check_mask
from polygpt.attention.retention import Retention
from polygpt.attention.scores import Score
from polygpt.errors import SpecError
from polygpt.nn.positions import Position, Rope

WIDTH, HEADS = 8, 2
# Packed examples with padding in between, which has to be passed over; a row of padding alone.
SEGMENT = np.int32([[1, 1, 1, 1, 2, 2, 2, 0, 0, 2, 2, 3, 3, 0], [0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1], [0] * 14])
B, T = SEGMENT.shape
VARIANTS = {
    "recurrent": Recurrent(HEADS, chunk=4),
    "linear": LinearAttention(HEADS, chunk=4),
    "retention": Retention(HEADS, value_width=3, chunk=4),
    "gated": GatedLinear(HEADS, rank=2, temperature=2.0, chunk=4),
    "delta": DeltaNet(HEADS, convolution=3, chunk=4),
    "mamba2": Mamba2(HEADS, state_width=3, groups=2, chunk=4),
}


def metadata(segment_BT):
    """Position ids restart with each example; padding holds none."""
    position_BT = np.zeros_like(segment_BT)
    for b, row in enumerate(segment_BT):
        count, held = 0, 0
        for t, now in enumerate(row):
            if now:
                count = count + 1 if now == held else 0
                position_BT[b, t], held = count, now
    index_BT = np.broadcast_to(np.arange(segment_BT.shape[1], dtype=np.int32)[None], segment_BT.shape)
    zeros = np.zeros_like(segment_BT)
    return Meta(index_BT, position_BT, segment_BT, zeros, zeros)


META = metadata(SEGMENT)
X_BTD = np.float32(np.random.default_rng(5).normal(size=(B, T, WIDTH)))


class Layer:
    """A variant with parameters none of which is a zero or a one, and its compiled call."""

    def __init__(self, spec, dtype="float32"):
        self.spec, self.dims = spec, Dims(WIDTH, dtype, Rope(100.0))
        self.graphdef, state = nnx.split(nnx.eval_shape(lambda: spec.build(self.dims, nnx.Rngs(0))))
        rng = np.random.default_rng(1)
        leaves, tree = jax.tree.flatten(state)
        self.state = tree.unflatten([np.float32(rng.normal(0, 0.5, x.shape) + (x.ndim == 1)) for x in leaves])
        self.call = jax.jit(self._call)

    def _call(self, state, x_BTD, meta, cache=None):
        return nnx.merge(self.graphdef, state)(x_BTD, Context(meta, meta, DECODER), cache)

    def __call__(self, x_BTD, meta, cache=None):
        y_BTD, cache = self.call(self.state, x_BTD, meta, cache)
        return np.float32(y_BTD), cache


@functools.cache
def layer(name, dtype="float32"):
    return Layer(VARIANTS[name], dtype)


@functools.cache
def whole(name):
    """The layer's result on all of `SEGMENT`."""
    return layer(name)(X_BTD, META)[0]


# --- the equations of the papers, one position after the other --------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rotated(x, position):
    """Channels i and i + d/2 as one complex number, turned by position * 100^(-2i/d)."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * 100.0 ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def centred(x, norm, epsilon):
    x = x - x.mean()
    return x / np.sqrt((x * x).mean() + epsilon) * norm["scale"] + norm["bias"]


def rms(x, scale, epsilon):
    return x / np.sqrt((x * x).mean() + epsilon) * scale


def heads(x, count=HEADS):
    return x.reshape(count, -1)


def convolved(p, inputs):
    """The last inputs of an example, the newest last, against a kernel whose last row is the newest."""
    kernel = p["convolve"]["kernel"]
    taken = inputs[-len(kernel) :]
    return sum(w * x for w, x in zip(kernel[len(kernel) - len(taken) :], taken, strict=True))


def recurrent(p, xs, t, S):
    q, k, v = (heads(xs[t] @ p[name]["kernel"]) for name in ("query", "key", "value"))
    out = []
    for h in range(HEADS):
        S[h] = S.get(h, 0) + np.outer(rotated(k[h], t), v[h])
        out.append(rms(rotated(q[h], t) @ S[h] * q.shape[1] ** -0.5, p["norm"]["scale"], 1e-6))
    return np.concatenate(out)


def linear(p, xs, t, S):
    q, k, v = (heads(xs[t] @ p[name]["kernel"]) for name in ("query", "key", "value"))
    q, k = (np.where(x > 0, x + 1, np.exp(x)) for x in (q, k))
    out = []
    for h in range(HEADS):
        S[h] = S.get(h, 0) + np.outer(rotated(k[h], t), v[h])
        S["z", h] = S.get(("z", h), 0) + k[h]
        out.append(rotated(q[h], t) @ S[h] / (q[h] @ S["z", h]))
    return np.concatenate(out)


def retention(p, xs, t, S):
    q, k, v = (heads(xs[t] @ p[name]["kernel"]) for name in ("query", "key", "value"))
    out = []
    for h in range(HEADS):
        S[h] = (1 - 2.0 ** (-5 - h)) * S.get(h, 0) + np.outer(rotated(k[h], t), v[h])
        out.append(centred(rotated(q[h], t) @ S[h] * q.shape[1] ** -0.5, p["norm"], 1e-5))
    return np.concatenate(out) * silu(xs[t] @ p["gate"]["kernel"])


def gated(p, xs, t, S):
    q, k, v = (heads(xs[t] @ p[name]["kernel"]) for name in ("query", "key", "value"))
    alpha = sigmoid(xs[t] @ p["decay_down"]["kernel"] @ p["decay_up"]["kernel"] + p["decay_up"]["bias"])
    alpha, out = heads(alpha ** (1 / 2.0)), []
    for h in range(HEADS):
        S[h] = alpha[h][:, None] * S.get(h, np.zeros((len(k[h]), len(v[h])))) + np.outer(k[h], v[h])
        out.append(centred(q[h] @ S[h] * q.shape[1] ** -0.5, p["norm"], 1e-5))
    return np.concatenate(out) * silu(xs[t] @ p["gate"]["kernel"])


def delta(p, xs, t, S):
    inputs = [np.concatenate([x @ p[name]["kernel"] for name in ("query", "key", "value")]) for x in xs[: t + 1]]
    q, k, v = (heads(x) for x in np.split(silu(convolved(p, inputs)), 3))
    beta = sigmoid(xs[t] @ p["beta"]["kernel"])
    out = []
    for h in range(HEADS):
        query, key = (x[h] / np.sqrt((x[h] ** 2).sum() + 1e-6) for x in (q, k))
        held = S.get(h, np.zeros((len(key), len(v[h]))))
        S[h] = held - beta[h] * np.outer(key, key @ held) + beta[h] * np.outer(key, v[h])
        out.append(rms(query @ S[h] * q.shape[1] ** -0.5, p["norm"]["scale"], 1e-6))
    return np.concatenate(out)


def mamba2(p, xs, t, S):
    inner, shared = 2 * WIDTH, 2 * 3
    projected = [np.split(x @ p["input"]["kernel"], [inner, 2 * inner + 2 * shared]) for x in xs[: t + 1]]
    mixed = silu(convolved(p, [parts[1] for parts in projected]) + p["convolve"]["bias"])
    x, Bs, Cs = np.split(mixed, [inner, inner + shared])
    x, Bs, Cs = heads(x), heads(Bs), heads(Cs)
    dt = np.log1p(np.exp(projected[t][2] + p["dt_bias"]))
    out = []
    for h in range(HEADS):
        decay = np.exp(-np.exp(p["A_log"][h]) * dt[h])
        S[h] = decay * S.get(h, 0) + np.outer(Bs[h], dt[h] * x[h])
        out.append(Cs[h] @ S[h] + p["D"][h] * x[h])
    y = heads(np.concatenate(out) * silu(projected[t][0]))
    return np.concatenate([rms(part, 1.0, 1e-5) for part in y]) * p["norm_scale"]


EQUATIONS = {f.__name__: f for f in (recurrent, linear, retention, gated, delta, mamba2)}


def expected(name):
    """[B, T, D] by the equations, each example by itself; zeros at padding."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(layer(name).state))
    y_BTD = np.zeros(X_BTD.shape)
    for b in range(B):
        held, xs, S = 0, [], {}
        for t in range(T):
            if SEGMENT[b, t] == 0:
                continue
            if SEGMENT[b, t] != held:
                held, xs, S = SEGMENT[b, t], [], {}
            xs.append(X_BTD[b, t].astype(np.float64))
            y_BTD[b, t] = EQUATIONS[name](p, xs, len(xs) - 1, S) @ p["output"]["kernel"]
    return y_BTD


@pytest.mark.parametrize("name", VARIANTS)
def test_a_layer_computes_the_equations_of_its_paper(name):
    want = expected(name)
    # Some four sums of some ten terms of the size 1 one after the other, and division by norms of down to a tenth.
    np.testing.assert_allclose(whole(name), want, rtol=2e-5, atol=2e-5)
    assert (whole(name)[SEGMENT == 0] == 0).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_pieces_through_the_cache_give_the_same(name):
    """Split anywhere, and one position after the other, with any number of examples and padding in between."""
    for size in (1, 7) if name != "mamba2" else (1, 2, 7):  # 2 positions are fewer than its convolution looks at
        cache, pieces = VARIANTS[name].init_cache(layer(name).dims, B, T), []
        for start in range(0, T, size):
            meta = jax.tree.map(lambda x, start=start, size=size: x[:, start : start + size], META)
            y_BTD, cache = layer(name)(X_BTD[:, start : start + size], meta, cache)
            pieces.append(y_BTD)
        np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole(name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_lies_at_padding_changes_nothing_and_gradients_are_finite(name):
    garbage = np.where((SEGMENT == 0)[..., None], np.float32(1e3), X_BTD)
    here = layer(name)

    @jax.jit
    def run(state, x_BTD):
        def total(state, x_BTD):
            y_BTD = here._call(state, x_BTD, META)[0]
            return jnp.sum(jnp.sin(y_BTD)), y_BTD

        return jax.value_and_grad(total, (0, 1), has_aux=True)(state, x_BTD)

    (_, y_BTD), gradients = run(here.state, garbage)
    np.testing.assert_allclose(y_BTD, whole(name), rtol=0, atol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    assert (gradients[1][SEGMENT == 0] == 0).all() and (gradients[1][0] != 0).any()


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_is_near_float32(name):
    y_BTD, cache = layer(name, "bfloat16")(X_BTD, META, VARIANTS[name].init_cache(layer(name, "bfloat16").dims, B, T))
    error = np.linalg.norm(y_BTD - whole(name)) / np.linalg.norm(whole(name))
    assert 0 < error < 8 * float(jnp.finfo(jnp.bfloat16).eps)
    assert {str(x.dtype) for x in jax.tree.leaves(cache["state"])} == {"float32"}


class _Slope(Score):
    """Some modification of scores."""


class _Biased(Position):
    """An encoding that acts on scores."""

    def score(self):
        return _Slope()


def test_under_mup_wider_heads_need_a_norm_and_equal_ones_do_not():
    wide, base = Retention(norm=None, heads=2), Retention(norm=None, heads=2)
    with pytest.raises(SpecError, match="norm is None.*wider than in muP's base"):
        wide.mup_scaled(32, base, 16)
    assert wide.mup_scaled(16, base, 16).norm is None
    Retention(heads=2).mup_scaled(32, Retention(heads=2), 16)
    Retention(norm=None, heads=4).mup_scaled(32, base, 16)  # more heads, none wider


def test_what_it_cannot_do_is_an_error_of_one_line():
    with pytest.raises(SpecError, match=r"^Retention.position: _Biased acts on scores, .*: set it to Rope\(\)"):
        Retention().build(Dims(WIDTH, position=_Biased()), nnx.Rngs(0))
    with pytest.raises(SpecError, match="^Mamba2.position"):
        Mamba2(position=_Biased()).build(Dims(WIDTH), nnx.Rngs(0))
    Retention(position=Rope()).build(Dims(WIDTH, position=_Biased()), nnx.Rngs(0))
    with pytest.raises(SpecError, match="heads"):
        Retention(heads=3).build(Dims(WIDTH), nnx.Rngs(0))
    with pytest.raises(SpecError, match="heads"):
        Mamba2(heads=2, head_width=3).build(Dims(WIDTH), nnx.Rngs(0))
    with pytest.raises(SpecError, match="chunk is 48"):
        Retention(chunk=48)


def test_a_mask_that_it_cannot_honour_is_an_error():
    module = Retention(HEADS).build(Dims(WIDTH), nnx.Rngs(0))

    def shape(mask):
        return jax.eval_shape(lambda x: module(x, Context(META, META, mask))[0], X_BTD).shape

    assert shape(DECODER) == shape(SameSegment() & Causal()) == X_BTD.shape
    with pytest.raises(SpecError, match="^Retention reads a row in one direction.*use MultiHead"):
        shape(ENCODER)
    with pytest.raises(SpecError, match="hides some: use MultiHead"):
        shape(SameSegment() & Causal() & _Near())


class _Near(Causal):
    """The last hundred positions."""

    def __call__(self, query, key):
        return query.index - key.index < 100


def test_the_cache_does_not_grow_with_the_row():
    for spec in VARIANTS.values():
        small, large = (jax.tree.map(jnp.shape, spec.init_cache(Dims(WIDTH), 5, size)) for size in (4, 400))
        assert small == large
        assert spec.score_flops(WIDTH, 10) == spec.score_flops(WIDTH, 1000) > 0
        assert spec.backends() == () and not spec.sees_ahead()


@pytest.mark.parametrize("number", [1, 2, 7])
def test_a_mask_of_modalities_is_refused_whatever_their_number(number):
    with pytest.raises(SpecError, match="hides some"):
        check_mask("X", DECODER & ~(QueryModality(number) & KeyModality(1)))
