"""Score modifications against float64 NumPy, pair by pair, from the parameters of their modules."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polygpt.attention.biases import ALiBi, BucketBias, LearnedBias, LinearBias, T5Bias, slopes, starts
from polygpt.attention.contract import Context, Dims
from polygpt.attention.kernels import reference
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import DECODER, SameSegment
from polygpt.attention.meta import Meta
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.scores import (
    KeyGate,
    LengthTemperature,
    QueryTemperature,
    Scale,
    Score,
    SoftCap,
    Terms,
    Then,
)
from polygpt.errors import SpecError

B, H, T, D = 2, 3, 9, 5


def meta(position_BT) -> Meta:
    position_BT = np.asarray(position_BT, np.int32)
    index_BT = np.broadcast_to(np.arange(position_BT.shape[1], dtype=np.int32), position_BT.shape)
    return Meta(
        index_BT, position_BT, np.ones_like(position_BT), np.zeros_like(position_BT), np.zeros_like(position_BT)
    )


QUERY = meta([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 200]])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def t5_bucket(relative: int, buckets: int, far: int, bidirectional: bool) -> int:
    """As the paper has it, in float64."""
    first = 0
    if bidirectional:
        buckets //= 2
        first, distance = (buckets if relative > 0 else 0), abs(relative)
    else:
        distance = max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    steps = math.log(distance / exact) / math.log(far / exact) * (buckets - exact)
    return first + min(exact + int(steps + 1e-9), buckets - 1)


# Each modification, and its value from (score, inputs of query and key, their positions, head, parameters).
WRITTEN_OUT = {
    "none": (Score(), lambda s, x, y, i, j, h, p: s),
    "scale": (Scale(0.3), lambda s, x, y, i, j, h, p: 0.3 * s),
    "cap": (SoftCap(1.5), lambda s, x, y, i, j, h, p: 1.5 * math.tanh(s / 1.5)),
    "temperature": (LengthTemperature(4), lambda s, x, y, i, j, h, p: s * max(1, math.log(i + 1) / math.log(4))),
    "key_gate": (
        KeyGate(),
        lambda s, x, y, i, j, h, p: s + np.log(sigmoid(y @ p["gate"]["kernel"][:, h] + p["gate"]["bias"][h])),
    ),
    "query_temperature": (
        QueryTemperature(),
        lambda s, x, y, i, j, h, p: s * 2 * sigmoid(x @ p["factor"]["kernel"][:, h] + p["factor"]["bias"][h]),
    ),
    "alibi": (LinearBias(), lambda s, x, y, i, j, h, p: s - [2**-4, 2**-8, 2**-2][h] * abs(i - j)),
    "t5": (BucketBias(8, 20), lambda s, x, y, i, j, h, p: s + p["table"][t5_bucket(j - i, 8, 20, False), h]),
    "t5_both": (
        BucketBias(8, 20, True),
        lambda s, x, y, i, j, h, p: s + p["table"][t5_bucket(j - i, 8, 20, True), h],
    ),
    "learned": (LearnedBias(2), lambda s, x, y, i, j, h, p: s + p["table"][min(max(j - i, -2), 2) + 2, h]),
    "composed": (
        SoftCap(1.5).then(KeyGate()).then(LearnedBias(2)),
        lambda s, x, y, i, j, h, p: (
            1.5 * math.tanh(s / 1.5)
            + np.log(
                sigmoid(y @ p["first"]["second"]["gate"]["kernel"][:, h] + p["first"]["second"]["gate"]["bias"][h])
            )
            + p["second"]["table"][min(max(j - i, -2), 2) + 2, h]
        ),
    ),
}


def terms_of(score: Score, x_BTD):
    """(Terms of random parameters, the parameters)."""
    module = score.build(D, H, rngs=nnx.Rngs(0))
    if module is None:
        return Terms(), {}
    graphdef, state = nnx.split(module)
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), state)
    return nnx.merge(graphdef, state)(x_BTD, QUERY), nnx.to_pure_dict(state)


def inputs(seed: int = 0):
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(size=(B, H, T, T)) * 2), np.float32(rng.normal(size=(B, T, D)))


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_it_is_what_its_formula_says_on_matrices_and_on_tiles(name):
    score, formula = WRITTEN_OUT[name]
    score_BHTS, x_BTD = inputs()
    terms, parameters = terms_of(score, x_BTD)
    parameters = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)
    want = np.zeros((B, H, T, T))
    for b, h, t, s in np.ndindex(B, H, T, T):
        i, j = int(QUERY.position[b, t]), int(QUERY.position[b, s])
        x, y = x_BTD[b, t].astype(np.float64), x_BTD[b, s].astype(np.float64)
        want[b, h, t, s] = formula(float(score_BHTS[b, h, t, s]), x, y, i, j, h, parameters)
    zeros_BHTd = jnp.zeros((B, H, T, 1))
    query, key, broadcast = Operands(zeros_BHTd, zeros_BHTd, zeros_BHTd, QUERY, QUERY, terms).views()
    got = np.asarray(score(score_BHTS, query, key, broadcast))
    assert got.dtype == np.float32 and got.shape == want.shape
    # A few roundings of numbers of this size; positions go up to 200 times a slope.
    np.testing.assert_allclose(got, want, rtol=0, atol=4 * 2.0**-24 * np.abs(want).max())
    # A tile: queries 2 to 6 and keys 1 to 8 of one row and head, arrays of two axes.
    b, h = 1, 2
    tile = score(
        score_BHTS[b, h, 2:6, 1:8],
        jax.tree.map(lambda x: x[b, 2:6, None], QUERY),
        jax.tree.map(lambda x: x[b, None, 1:8], QUERY),
        Terms(
            {name: x[..., h, None, None] for name, x in terms.head.items()},
            {name: x[b, h, 2:6, None] for name, x in terms.query.items()},
            {name: x[b, h, None, 1:8] for name, x in terms.key.items()},
        ),
    )
    np.testing.assert_allclose(tile, got[b, h, 2:6, 1:8], rtol=1e-6, atol=1e-6)
    if score.additive():
        bias = np.asarray(score(jnp.zeros_like(score_BHTS), query, key, broadcast), np.float64)
        np.testing.assert_allclose(bias + score_BHTS, got, rtol=0, atol=4 * 2.0**-24 * np.abs(want).max())
    else:
        assert np.abs(score(jnp.zeros_like(score_BHTS), query, key, broadcast) + score_BHTS - got).max() > 0.1


@dataclasses.dataclass(frozen=True)
class Sharper(KeyGate):
    """Derived from what adds, and multiplies."""

    def __call__(self, score, query, key, terms):
        return 2 * super().__call__(score, query, key, terms)


class Doubled:
    """A modification of no class of the library."""

    def __call__(self, score, query, key, terms):
        return 2 * super().__call__(score, query, key, terms)


@dataclasses.dataclass(frozen=True)
class Mixed(Doubled, LearnedBias):
    """The same by inheritance from two."""


@dataclasses.dataclass(frozen=True)
class Halved(Then):
    """Two modifications, and a factor."""

    def __call__(self, score, query, key, terms):
        return 0.5 * super().__call__(score, query, key, terms)


@dataclasses.dataclass(frozen=True)
class Farther(KeyGate):
    """Its own `__call__`, of which it says that it adds."""

    adds: ClassVar[bool] = True

    def __call__(self, score, query, key, terms):
        return score + 2 * terms.key["gate"]


@dataclasses.dataclass(frozen=True)
class Renamed(KeyGate):
    """Nothing new."""


ADD = [Score(), KeyGate(), LinearBias(), BucketBias(), LearnedBias(2), Then(KeyGate(), LearnedBias(2)), Farther()]
MULTIPLY = [Scale(2.0), Sharper(), Mixed(2), Halved(KeyGate(), LearnedBias(2)), Then(KeyGate(), Sharper())]


@pytest.mark.parametrize("score", [*ADD, Renamed(), *MULTIPLY], ids=lambda score: type(score).__name__)
def test_no_class_inherits_that_it_adds(score):
    """A library's kernel is given the sum as a bias, which would be wrong in silence."""
    assert score.additive() == (score not in MULTIPLY)
    spec = MultiHead(2, scores=(score,), backend="library", strict=True)
    everything = jax.tree.map(jnp.asarray, QUERY)
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, 8)), jnp.float32)

    module = spec.build(Dims(8), nnx.Rngs(0))

    def y_BTD(backend):
        module.spec = spec.replace(backend=backend)
        return nnx.jit(lambda module: module(x_BTD, Context(everything, everything, DECODER))[0])(module)

    if score in MULTIPLY:
        with pytest.raises(SpecError, match="cannot be written as a bias"):
            y_BTD("library")
    else:
        np.testing.assert_allclose(y_BTD("library"), y_BTD("reference"), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_it_and_its_gradients_are_finite_for_any_pair(name):
    score, _ = WRITTEN_OUT[name]
    far = np.int32([[0, 2**30, 5, 2**30, 7, 1, 0, 3, 2**24]] * B)
    query = dataclasses.replace(QUERY, position=far)
    key = dataclasses.replace(QUERY, position=far[:, ::-1].copy(), segment=np.zeros_like(far))
    _, x_BTD = inputs()
    score_BHTS = jnp.asarray(
        np.float32([0, 1e30, -1e30])[np.arange(T * T) % 3].reshape(1, 1, T, T) * np.ones((B, H, 1, 1)), jnp.float32
    )
    terms, _ = terms_of(score, x_BTD)
    zeros_BHTd = jnp.zeros((B, H, T, 1))

    def total(score_BHTS, terms):
        views = Operands(zeros_BHTd, zeros_BHTd, zeros_BHTd, query, key, terms).views()
        return jnp.sum(jnp.sin(score(score_BHTS, *views)))

    leaves = jax.tree.leaves(jax.grad(total, argnums=(0, 1))(score_BHTS, terms))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


# Those with terms, as functions of the scores [H, T, S], the differences of positions (key less query) and the terms.
WITH_TERMS = {
    "key_gate": lambda s, relative, terms: s + terms["key"]["gate"][0][:, None, :],
    "query_temperature": lambda s, relative, terms: s * terms["query"]["factor"][0][:, :, None],
    "t5": lambda s, relative, terms: (
        s + terms["head"]["table"][np.vectorize(t5_bucket)(relative, 8, 20, False)].transpose(2, 0, 1)
    ),
    "learned": lambda s, relative, terms: s + terms["head"]["table"][np.clip(relative, -2, 2) + 2].transpose(2, 0, 1),
    "alibi": lambda s, relative, terms: s - terms["head"]["slope"][:, None, None] * np.abs(relative),
}


@pytest.mark.parametrize("name", WITH_TERMS)
def test_gradients_are_those_of_differences(name):
    """Of sum(sin(softmax(score) v)) by queries, keys, values and every term: against differences in float64 NumPy."""
    score, _ = WRITTEN_OUT[name]
    rng = np.random.default_rng(2)
    one = jax.tree.map(lambda x: jnp.asarray(x[:1]), QUERY)
    relative = np.asarray(QUERY.position[0][None, :] - QUERY.position[0][:, None])
    terms, _ = terms_of(score, inputs()[1])
    first_row = {kind: jax.tree.map(lambda x: x[:1], getattr(terms, kind)) for kind in ("query", "key")}
    arrays = {
        **{name: jnp.asarray(rng.normal(size=(1, H, T, 2)), jnp.float32) for name in ("query", "key", "value")},
        "terms": vars(dataclasses.replace(terms, **first_row)),
    }

    def total(arrays):
        triple = (arrays[name] for name in ("query", "key", "value"))
        y, _ = reference.attend(Rule(SameSegment(), score), Operands(*triple, one, one, Terms(**arrays["terms"])))
        return jnp.sum(jnp.sin(y))

    def expected(arrays):
        query, key, value = (arrays[name][0] for name in ("query", "key", "value"))
        weights = np.exp(WITH_TERMS[name](query @ key.swapaxes(1, 2), relative, arrays["terms"]))
        return np.sum(np.sin(weights / weights.sum(-1, keepdims=True) @ value))

    got = jax.tree.leaves(jax.jit(jax.grad(total))(arrays))
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda x: np.array(x, np.float64), arrays))
    assert len(got) == len(leaves) == 4
    for gradient, leaf in zip(got, leaves, strict=True):
        slope, step = np.zeros_like(leaf), 1e-5
        for at in np.ndindex(leaf.shape):
            here = leaf[at]
            for sign in (1, -1):
                leaf[at] = here + sign * step
                slope[at] += sign * expected(structure.unflatten(leaves)) / (2 * step)
            leaf[at] = here
        # Differences err by step^2 and by 2^-53 * 50 / step, both 1e-9 or less; float32 in some ten roundings.
        size = max(1.0, np.abs(slope).max())
        np.testing.assert_allclose(gradient, slope, rtol=0, atol=10 * 2.0**-24 * size)


def test_alibi_has_the_slopes_of_the_paper_for_powers_of_two():
    np.testing.assert_array_equal(slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_array_equal(slopes(16), 2.0 ** (-np.arange(1, 17) / 2))
    np.testing.assert_array_equal(slopes(1), [2.0**-8])
    for heads in range(1, 40):
        assert len(slopes(heads)) == heads == len(set(slopes(heads))) and (slopes(heads) < 1).all()


def test_the_buckets_of_t5_begin_where_the_logarithm_says():
    assert starts(16, 128) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    relative = np.arange(-300, 301)
    for buckets, far, bidirectional in [(32, 128, True), (32, 128, False), (8, 20, True), (12, 100, False)]:
        got = BucketBias(buckets, far, bidirectional).bucket(jnp.asarray(relative))
        want = [t5_bucket(int(r), buckets, far, bidirectional) for r in relative]
        np.testing.assert_array_equal(got, want)


def test_a_length_temperature_leaves_the_trained_length_alone():
    query = jax.tree.map(lambda x: x[:, :, None], meta(np.arange(1200)[None]))
    factor = np.asarray(LengthTemperature(1000)(jnp.ones((1, 1200, 1)), query, query, Terms()))[0, :, 0]
    assert (factor[:1000] == 1).all() and (factor[1000:] > 1).all()


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: SoftCap(0.0), "SoftCap.cap"),
        (lambda: LengthTemperature(1), "LengthTemperature.length"),
        (lambda: LearnedBias(0), "LearnedBias.distance"),
        (lambda: LearnedBias(65), "LearnedBias.distance is 65: it must be from 1 to 64: use T5Bias"),
        (lambda: T5Bias(buckets=7), "T5Bias.buckets"),
        (lambda: T5Bias(buckets=32, max_distance=16), "T5Bias.max_distance"),
        (lambda: BucketBias(buckets=7), "BucketBias.buckets"),
        (lambda: BucketBias(buckets=32, max_distance=16), "BucketBias.max_distance"),
    ],
)
def test_settings_that_cannot_work_are_named(make, field):
    with pytest.raises(SpecError, match=field):
        make()


@pytest.mark.parametrize(
    "spec",
    [
        MultiHead(2, position=ALiBi()),
        MultiHead(2, kv_heads=1, position=T5Bias(8, 20)),
        MultiHead(2, scores=(KeyGate(), QueryTemperature(), LearnedBias(3), LengthTemperature(4), SoftCap(5.0))),
    ],
    ids=["ALiBi", "T5", "all"],
)
def test_attention_with_a_cache_sees_the_same(spec):
    T, dims = 7, Dims(8)
    module = spec.build(dims, nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, jnp.float32), state)
    x_BTD = jnp.asarray(rng.normal(size=(2, T, 8)), jnp.float32)
    everything = jax.tree.map(jnp.asarray, meta([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3]]))
    segment_BT = jnp.asarray([[1] * 7, [1] * 3 + [2] * 4], jnp.int32)
    everything = dataclasses.replace(everything, segment=segment_BT)

    @jax.jit
    def run(x_BTD, context, cache):
        return nnx.merge(graphdef, state)(x_BTD, context, cache)

    want, _ = run(x_BTD, Context(everything, everything, DECODER), None)
    cache, got = spec.init_cache(dims, 2, T), []
    for start, stop in [(0, 3), (3, 4), (4, 7)]:
        query = jax.tree.map(lambda x, part=slice(start, stop): x[:, part], everything)
        key = dataclasses.replace(everything, segment=jnp.where(jnp.arange(T)[None] < stop, segment_BT, 0))
        context = Context(query, key, DECODER, jnp.int32(start))
        y_BTD, cache = run(x_BTD[:, start:stop], context, cache)
        got.append(y_BTD)
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, rtol=0, atol=5e-6)
