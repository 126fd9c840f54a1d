"""The formulas of the variants' papers in float64 NumPy, and a packed row of text and media to try them on.

Nothing of the library computes here. A reference is a function `(p, x_BTD, row, spec) -> (weights, y_BTD)` of
parameters `p` in float64; weights are [B, H, T, T].
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polygpt.attention.contract import Context, Dims
from polygpt.attention.masks import DECODER
from polygpt.attention.meta import Meta
from polygpt.nn.positions import Rope

WIDTH, T = 16, 11
DIMS = Dims(WIDTH, position=Rope())


def row() -> Meta:
    """Two rows: examples of six and four positions and padding; one example of nine positions and padding."""
    segment = np.int32([[1] * 6 + [2] * 4 + [0], [1] * 9 + [0] * 2])
    position = np.int32([[*range(6), *range(4), 0], [*range(9), 0, 0]])
    modality = np.int32([[0, 1, 1, 0, 2, 0, 0, 0, 1, 0, -1], [1, 0, 0, 2, 2, 0, 1, 0, 0, -1, -1]])
    index = np.broadcast_to(np.arange(T, dtype=np.int32), segment.shape)
    return Meta(index, position, segment, np.zeros_like(segment), modality)


def context(meta: Meta, **fields) -> Context:
    return Context(meta, meta, DECODER, **fields)


@functools.cache
def made(spec):
    """(a compiled function of (state, x, context, cache), lively parameters, one of (state, x, context, chosen))."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: spec.build(DIMS, nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.float32(rng.normal(path[-2].key == "scale", 0.5, leaf.shape))

    @jax.jit
    def call(state, x_BTD, context, cache=None):
        return nnx.merge(graphdef, state)(x_BTD, context, cache)

    @jax.jit
    def weights(state, x_BTD, context, chosen_R):
        return nnx.merge(graphdef, state).weights(x_BTD, context, chosen_R)

    return call, jax.tree_util.tree_map_with_path(draw, state), weights


def copied(spec, state, change=lambda x: x):
    """The state of `spec` with the values of another state that has them by the same names, changed on the way."""
    own = nnx.split(nnx.eval_shape(lambda: spec.build(DIMS, nnx.Rngs(0))))[1]
    pure = nnx.to_pure_dict(state)
    nnx.replace_by_pure_dict(own, {name: jax.tree.map(change, pure[name]) for name in nnx.to_pure_dict(own)})
    return own


def inputs(seed: int = 0) -> np.ndarray:
    return np.float32(np.random.default_rng(seed).normal(size=(2, T, WIDTH)))


def wide(state) -> dict:
    """Parameters in float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(state))


# --- the formulas -----------------------------------------------------------------------------------------------------


def sees(row: Meta, also=lambda row, b, t, s: True) -> np.ndarray:
    """bool [B, T, T]: the own example up to itself, and `also`."""
    matrix = np.zeros((2, T, T), bool)
    for b, t, s in np.ndindex(2, T, T):
        same = row.segment[b, t] == row.segment[b, s] != 0
        matrix[b, t, s] = same and s <= t and also(row, b, t, s)
    return matrix


def rows_of(function, score_BHTS, sees_BTS):
    """`function` of the visible scores of one query at a time, zeros elsewhere."""
    weights = np.zeros_like(score_BHTS)
    for b, h, t in np.ndindex(score_BHTS.shape[:3]):
        seen = np.flatnonzero(sees_BTS[b, t])
        if len(seen):
            weights[b, h, t, seen] = function(score_BHTS[b, h, t, seen])
    return weights


def softmax(score):
    e = np.exp(score - score.max())
    return e / e.sum()


def turned(x_BHTd, row):
    """Rotary positions as multiplication of complex numbers."""
    half = x_BHTd.shape[-1] // 2
    angle = row.position[:, None, :, None] * 10000.0 ** (-np.arange(half) / half)
    z = (x_BHTd[..., :half] + 1j * x_BHTd[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def heads(x_BTE, count):
    return x_BTE.reshape(2, T, count, -1).transpose(0, 2, 1, 3)


def flat(x_BHTe):
    return x_BHTe.transpose(0, 2, 1, 3).reshape(2, T, -1)


def rms(x, scale, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def projected(p, x_BTD, spec, of=None):
    """Queries, keys and values before positions, keys and values repeated for the queries that share them."""
    of = x_BTD if of is None else of
    K = spec.kv_heads or spec.heads
    key, value = (heads(of @ p[name]["kernel"], K).repeat(spec.heads // K, axis=1) for name in ("key", "value"))
    return heads(x_BTD @ p["query"]["kernel"], spec.heads), key, value


def scores(query, key):
    return query @ key.swapaxes(2, 3) / np.sqrt(query.shape[-1])


def plain(p, x_BTD, row, spec, function=softmax, before=None, after=None):
    """Multi-head attention, heads mixed before and after `function` where that is given."""
    query, key, value = projected(p, x_BTD, spec)
    score = scores(turned(query, row), turned(key, row))
    if before is not None:
        score = np.einsum("bhts,hg->bgts", score, before)
    weights = rows_of(function, score, sees(row))
    if after is not None:
        weights = np.einsum("bhts,hg->bgts", weights, after)
    return weights, flat(weights @ value) @ p["output"]["kernel"]


def latent(p, x_BTD, row, spec):
    """DeepSeek-V2, equations 9 to 19."""
    H, r = spec.heads, spec.width_of_rope(WIDTH)
    c_q = x_BTD
    if spec.q_rank:
        c_q = rms(x_BTD @ p["query_latent"]["kernel"], p["query_latent_norm"]["scale"], 1e-6)
    query = heads(c_q @ p["query"]["kernel"], H)
    content, rope = query[..., :-r], turned(query[..., -r:], row)
    c_kv = rms(x_BTD @ p["latent"]["kernel"], p["latent_norm"]["scale"], 1e-6)
    shared = turned((x_BTD @ p["rope_key"]["kernel"])[:, None], row)
    key, value = (heads(c_kv @ p[name]["kernel"], H) for name in ("key", "value"))
    score = (content @ key.swapaxes(2, 3) + rope @ shared.swapaxes(2, 3)) / np.sqrt(query.shape[-1])
    weights = rows_of(softmax, score, sees(row))
    return weights, flat(weights @ value) @ p["output"]["kernel"]


def differential(p, x_BTD, row, spec):
    """Ye et al., equations 1 to 3; the projections hold all heads of the first map, then all of the second."""
    H, K = spec.heads, spec.kv_heads or spec.heads
    value = projected(p, x_BTD, spec)[2]
    queries, keys = (np.split(x_BTD @ p[name]["kernel"], 2, axis=-1) for name in ("query", "key"))
    maps = [
        rows_of(softmax, scores(turned(heads(q, H), row), turned(heads(k, K), row).repeat(H // K, axis=1)), sees(row))
        for q, k in zip(queries, keys, strict=True)
    ]
    (q1, k1), (q2, k2) = p["vectors"]
    lam = np.exp(q1 @ k1) - np.exp(q2 @ k2) + spec.lambda_init
    weights = maps[0] - lam * maps[1]
    y = (1 - spec.lambda_init) * rms(weights @ value, p["norm"]["scale"], 1e-5)
    return weights, flat(y) @ p["output"]["kernel"]


def talking(p, x_BTD, row, spec):
    return plain(p, x_BTD, row, spec, before=p["before"], after=p["after"])


def gated(p, x_BTD, row, spec):
    weights, _ = plain(p, x_BTD, row, spec)
    value = projected(p, x_BTD, spec)[2]
    gate = sigmoid(heads(x_BTD @ p["gate"]["kernel"], spec.heads))
    return weights, flat(weights @ value * gate) @ p["output"]["kernel"]


def sigmoidal(p, x_BTD, row, spec):
    return plain(p, x_BTD, row, spec, lambda score: sigmoid(score - math.log(spec.length)))


def off_by_one(p, x_BTD, row, spec):
    """The extra term as one more key of the score b and the value 0."""
    query, key, value = projected(p, x_BTD, spec)
    score, see = scores(turned(query, row), turned(key, row)), sees(row)
    weights = np.zeros_like(score)
    for h in range(spec.heads):
        b = p["sink"][h] if spec.learned else 0.0
        weights[:, [h]] = rows_of(lambda s, b=b: softmax(np.append(s, b))[:-1], score[:, [h]], see)
    return weights, flat(weights @ value) @ p["output"]["kernel"]


def transformer_xl(p, x_BTD, row, spec):
    """Dai et al., section 3.3, with R_{i-j} made for each pair."""
    query, key, value = projected(p, x_BTD, spec)
    H, d = query.shape[1], query.shape[-1]
    half = spec.channels(WIDTH) // 2
    W = p["relative"]["kernel"].reshape(-1, H, d)
    score = np.zeros((2, H, T, T))
    for b, h, i, j in np.ndindex(score.shape):
        angle = (row.position[b, i] - row.position[b, j]) / 10000.0 ** (np.arange(half) / half)
        R = np.concatenate([np.sin(angle), np.cos(angle)]) @ W[:, h]
        q = query[b, h, i]
        score[b, h, i, j] = ((q + p["u"][h]) @ key[b, h, j] + (q + p["v"][h]) @ R) / np.sqrt(d)

    def near(row, b, t, s):
        return 0 <= row.position[b, t] // spec.piece - row.position[b, s] // spec.piece <= 1

    weights = rows_of(softmax, score, sees(row, near))
    return weights, flat(weights @ value) @ p["output"]["kernel"]


def cross(p, x_BTD, row, spec, embeddings=None):
    query, key, value = projected(p, x_BTD, spec, embeddings)

    def of_media(row, b, t, s):
        return row.modality[b, t] == 0 and row.modality[b, s] > 0

    weights = rows_of(softmax, scores(turned(query, row), turned(key, row)), sees(row, of_media))
    return weights, np.tanh(p["alpha"]) * (flat(weights @ value) @ p["output"]["kernel"])


def mixture(p, x_BTD, row, spec):
    """Every position by the matrices of its modality."""

    def by_modality(name, x_BTD):
        kernel = p[name]["kernel"]
        y = np.zeros((2, T, kernel.shape[-1]))
        for b, t in np.ndindex(2, T):
            own = min(max(row.modality[b, t], 0), spec.sets - 1)
            y[b, t] = x_BTD[b, t] @ kernel[own] + (p[name]["bias"][own] if spec.bias else 0)
        return y

    K = spec.kv_heads or spec.heads
    query = heads(by_modality("query", x_BTD), spec.heads)
    key, value = (heads(by_modality(name, x_BTD), K).repeat(spec.heads // K, axis=1) for name in ("key", "value"))
    weights = rows_of(softmax, scores(turned(query, row), turned(key, row)), sees(row))
    return weights, by_modality("output", flat(weights @ value))


def shifted(row: Meta, start: int, stop: int) -> Meta:
    """The positions from `start` to `stop`."""
    return jax.tree.map(lambda x: x[:, start:stop], row)
