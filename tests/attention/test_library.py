"""The library backend: jax's own attention, splash attention interpreted and compiled, cuDNN lowered."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from problems import NAMES, answers, assert_agrees, cotangents, problem

from equations import largest
from polygpt import topology
from polygpt.attention.biases import BucketBias, LinearBias
from polygpt.attention.kernels import library, reference, splash
from polygpt.attention.kernels.dispatch import compiling_for
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import (
    DECODER,
    ENCODER,
    Blockwise,
    Causal,
    Dilated,
    KeyModality,
    Mask,
    SameSegment,
    Sinks,
    Strided,
    Window,
    allowed,
)
from polygpt.attention.meta import Meta
from polygpt.attention.scores import Scale, Score, SoftCap, Terms

WHOLE, PLAIN = SameSegment() & Causal(), Score()


def refused(name: str) -> str | None:
    """What of a problem, with values as wide as queries, is not for jax.nn.dot_product_attention."""
    if name.startswith("sigmoid"):
        return "has no sigmoid normalizer"
    return {"capped": "Then cannot be", "table": "Then cannot be", "gates": "Gates cannot be"}.get(name)


def narrow(name: str, dtype: str = "float32") -> tuple[Rule, Operands]:
    rule, operands = problem(name, dtype=dtype)
    return rule, dataclasses.replace(operands, value_BKSe=operands.value_BKSe[..., : operands.query_BHTd.shape[3]])


COMPARED = ("plain", "spans", "empty", "cross", "one_query", "unordered", "window")
"""What differs for this backend, which is given the mask as an array; "packed" is compared in bfloat16."""


@pytest.mark.parametrize("name", NAMES)
def test_on_a_cpu_every_problem_agrees_or_is_refused(name):
    rule, operands = narrow(name)
    reason = library.refuses(rule, operands)
    if refused(name):
        assert refused(name) in reason
    elif name == "slopes":  # a user's modification says nothing of itself and is taken for what changes the score
        assert "Slopes cannot be written as a bias" in reason
    else:
        assert reason is None
        if name in COMPARED:
            assert_agrees(library.attend, rule, operands, gradients=name in ("plain", "empty"))


def test_in_bfloat16():
    assert_agrees(library.attend, *narrow("packed", "bfloat16"), gradients=False)


@pytest.mark.parametrize(
    ("score", "head"),
    [
        (LinearBias(), {"slope": np.float32([0.5, 0.1, 0.3, 0.2])}),
        (BucketBias(8, 10), {"table": np.float32(np.random.default_rng(0).normal(size=(8, 4)))}),
    ],
    ids=["ALiBi", "T5"],
)
def test_biases_and_their_gradients(score, head):
    rule, operands = narrow("packed")
    rule = dataclasses.replace(rule, score=score)
    operands = dataclasses.replace(operands, terms=Terms(head=jax.tree.map(jnp.asarray, head)))
    assert library.refuses(rule, operands) is None
    close(library.attend, rule, operands)


def close(attend, rule, operands):
    """Values and gradients as the reference has them; it is compared with float64 elsewhere."""
    got = answers(attend, rule, operands, *cotangents(operands))
    want = answers(reference.attend, rule, operands, *cotangents(operands))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        # Sums of up to 256 products, each rounded by 2^-24 of their size: a few, three deep.
        atol = 1e-5 * max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_values_of_another_width_are_refused():
    assert "needs values as wide as queries, not 6 and 4" in library.refuses(*problem("packed"))


def test_lse_costs_nothing_where_it_is_not_used():
    rule, operands = narrow("packed")

    def loss(key_BKSd, weight):
        y, lse = library.attend(rule, dataclasses.replace(operands, key_BKSd=key_BKSd))
        return jnp.sum(jnp.sin(y)) + weight * jnp.sum(jnp.where(lse > -1e30, lse, 0)) if weight else jnp.sum(jnp.sin(y))

    loops = [
        jax.jit(jax.grad(loss), static_argnums=1).lower(operands.key_BKSd, weight).compile().as_text().count(" while(")
        for weight in (0, 1)
    ]
    assert loops[0] == 0 < loops[1]


# --- splash attention -------------------------------------------------------------------------------------------------


def long_problem(mask: Mask = WHOLE, score: Score = PLAIN, T: int = 256, heads=(2, 1)) -> tuple[Rule, Operands]:
    """A row of two examples and padding, and one that is full."""
    index_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (2, T))
    start = T // 2 - 28
    position_BT = index_BT.at[0, start:].add(-start)
    segment_BT = jnp.ones_like(index_BT).at[0, start:].set(2).at[0, -20:].set(0)
    meta = Meta(index_BT, position_BT, segment_BT, jnp.zeros_like(index_BT), jnp.zeros_like(index_BT))
    rng = np.random.default_rng(0)
    H, K = heads
    arrays = (np.float32(rng.normal(size=(2, n, T, 8))) for n in (H, K, K))
    query, key, value = map(jnp.asarray, arrays)
    return Rule(mask, score), Operands(query * 0.7, key, value, meta, meta)


def interpreted(rule, operands):
    return splash.attend(rule, operands, interpret=True)


@pytest.mark.parametrize(
    ("mask", "score"),
    [
        (WHOLE, PLAIN),
        (Causal() & Window(30) & SameSegment(), SoftCap(1.0)),
        pytest.param(ENCODER & (Strided(3) | Window(5)), PLAIN, marks=pytest.mark.slow),
    ],
    ids=["causal", "window and cap", "strided"],
)
def test_splash_attention_equals_the_reference(mask, score):
    rule, operands = long_problem(mask, score)
    assert splash.refuses(rule, operands) is None
    close(interpreted, rule, operands)


def test_splash_attention_gives_nan_where_rows_are_not_laid_out_as_it_takes_them_to_be():
    rule, operands = long_problem(WHOLE & Window(30), T=128)
    gaps = dataclasses.replace(operands.query, position=operands.query.position.at[0].multiply(2))
    operands = dataclasses.replace(operands, query=gaps, key=gaps)
    y_BHTe, _ = jax.jit(interpreted, static_argnums=0)(rule, operands)
    assert np.isnan(y_BHTe[0]).all() and np.isfinite(y_BHTe[1]).all()


def scrambled(rng) -> Meta:
    """A row of 12 positions in which some of what splash attention takes for granted does not hold."""
    T = 12
    segment_T = np.sort(rng.integers(0, 3, T))
    start_T = np.asarray([np.flatnonzero(segment_T == segment)[0] for segment in segment_T])
    index_T, position_T = np.arange(T), np.arange(T) - start_T
    match rng.integers(6):
        case 0:  # examples in several pieces, each with its own order
            order = rng.permutation(T)
            segment_T, position_T = segment_T[order], position_T[order]
        case 1:  # the same, positions as far apart as indices
            segment_T = rng.integers(0, 3, T)
            position_T = np.arange(T) + segment_T
        case 2:
            index_T = index_T + 1
        case 3:  # padding in the midst of an example, which does not count
            position_T = np.cumsum(segment_T == 1) - 1
        case 4:
            position_T = position_T + (rng.integers(0, 12, T) == 0)
    return Meta(*(np.int32(x)[None] for x in (index_T, position_T, segment_T, 0 * index_T, 0 * index_T)))


@pytest.mark.parametrize("mask", [ENCODER, WHOLE, ENCODER & Window(3), WHOLE & Window(3)], ids=str)
def test_rows_are_taken_for_well_laid_out_only_where_the_kernel_computes_what_the_mask_says(mask):
    rng = np.random.default_rng(0)
    inner = [part for part in (Causal(), Window(3)) if str(part) in str(mask)]
    index_1T = np.arange(12)[None]
    usual = Meta(index_1T, index_1T, index_1T, index_1T, index_1T)  # what the kernel takes indices and positions for
    found = []
    for i in range(200):
        query = scrambled(rng)
        key = scrambled(rng) if i % 5 == 0 else query
        sees_TT = np.asarray(allowed(mask, query, key))[0]
        kernel_TT = (query.segment[0][:, None] == key.segment) & (key.segment > 0)
        for part in inner:
            kernel_TT &= np.asarray(allowed(part, usual, dataclasses.replace(usual, segment=index_1T + 1)))[0]
        right = (sees_TT == kernel_TT).all() and (sees_TT.any(1) == (query.segment[0] > 0)).all()
        found.append((bool(splash.laid_out(mask, query, key)[0]), right))
        assert found[-1] in ((True, True), (False, False), (False, True)), "wrong in silence"
    assert found.count((True, True)) > 60 and (not inner or found.count((False, False)) > 10)


def test_a_packed_row_is_well_laid_out_whatever_its_padding_holds():
    for mask in (ENCODER, WHOLE, WHOLE & Window(30)):
        _, operands = long_problem()
        assert splash.laid_out(mask, operands.query, operands.key).all()
        padding = operands.query.segment == 0
        garbage = dataclasses.replace(
            operands.query,
            **{name: jnp.where(padding, 77, getattr(operands.query, name)) for name in ("index", "position", "span")},
        )
        assert splash.laid_out(mask, garbage, operands.key).all()


def test_beside_the_kernel_nothing_grows_with_queries_times_keys(monkeypatch):
    def kernel(query_HTd, key_KSd, value_KSe, segments):
        return query_HTd

    monkeypatch.setattr(splash.splash, "make_splash_mha", lambda *arguments, **options: kernel)
    monkeypatch.setattr(splash.chunked, "attend", lambda rule, operands: (None, jnp.zeros(())))
    T = 1024
    rule, operands = long_problem(WHOLE & Window(30), T=T, heads=(2, 2))

    whole = largest(functools.partial(splash.attend, rule), operands)
    assert whole == operands.query_BHTd.size < T * T


@dataclasses.dataclass(frozen=True)
class ByFunction(Mask):
    """Written with a function of jax."""

    def __call__(self, query, key):
        return jnp.abs(query.position - key.position) < 5


@dataclasses.dataclass(frozen=True)
class Earlier(Mask):
    """Written with a function of positions."""

    def __call__(self, query, key):
        return jnp.minimum(query.position, key.position) == key.position


@dataclasses.dataclass(frozen=True)
class Unlike(Mask):
    """Positions compared with a number of their own."""

    def __call__(self, query, key):
        return query.position < key.position + 5


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (Causal(), "needs SameSegment"),
        (DECODER, "looks at spans"),
        (WHOLE & Sinks(2), "looks at positions by themselves"),
        (WHOLE & Blockwise(8), "looks at positions by themselves"),
        (WHOLE & Unlike(), "looks at positions by themselves"),
        (WHOLE & ~KeyModality(1), "looks at modalities"),
        (SameSegment() & (Causal() | SameSegment()), "looks at segments"),
        (WHOLE & ~Window(1), "every position to see itself"),
        (WHOLE & Earlier(), "metadata other than by operators"),
        (WHOLE & ByFunction(), None),
        (WHOLE & (Window(4) | Dilated(2, 4)), None),
    ],
    ids=str,
)
def test_splash_attention_refuses_what_is_no_pattern_of_indices(mask, reason):
    rule, operands = long_problem(mask)

    @jax.eval_shape
    def y_BHTe():  # while tracing, as in a model
        got = splash.refuses(rule, operands)
        assert (got is None) if reason is None else (reason in got), got
        return operands.query_BHTd if got else interpreted(rule, operands)[0]

    assert y_BHTe.shape == operands.query_BHTd.shape


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rule, operands: (dataclasses.replace(rule, normalizer="sigmoid"), operands), "no sigmoid normalizer"),
        (lambda rule, operands: (dataclasses.replace(rule, score=Scale(2.0)), operands), "SoftCap, not Scale"),
        (lambda rule, operands: (rule, operands.of_queries(jnp.arange(128))), "not 128 and 256 (as with a cache)"),
        (lambda rule, operands: long_problem(T=200), "a multiple of 128, not 200"),
        (
            lambda rule, operands: (rule, dataclasses.replace(operands, value_BKSe=jnp.zeros((2, 1, 256, 160)))),
            "not 160",
        ),
    ],
    ids=["sigmoid", "scale", "cache", "length", "width"],
)
def test_splash_attention_refuses_what_it_cannot_compute(change, reason):
    rule, operands = change(*long_problem())
    with compiling_for("tpu"):
        assert reason in library.refuses(rule, operands)


# --- compiled for devices that are not here ---------------------------------------------------------------------------


def shapes(T: int, B: int = 2, heads=(4, 2), d: int = 64, dtype=jnp.bfloat16) -> Operands:
    meta = Meta(*[jax.ShapeDtypeStruct((B, T), jnp.int32)] * 5)
    arrays = (jax.ShapeDtypeStruct((B, n, T, d), dtype) for n in (heads[0], heads[1], heads[1]))
    return Operands(*arrays, meta, meta)


def gradients(rule: Rule):
    def of(operands):
        def loss(query_BHTd, key_BKSd, value_BKSe):
            arrays = {"query_BHTd": query_BHTd, "key_BKSd": key_BKSd, "value_BKSe": value_BKSe}
            y_BHTe, _ = library.attend(rule, dataclasses.replace(operands, **arrays))
            return jnp.sum(jnp.sin(y_BHTe.astype(jnp.float32)))

        return jax.grad(loss, (0, 1, 2))(operands.query_BHTd, operands.key_BKSd, operands.value_BKSe)

    return of


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'polygpt[tpu]'")
def test_splash_attention_compiles_for_a_tpu_in_linear_memory():
    rule = Rule(WHOLE & Window(1000), SoftCap(30.0))
    memory = []
    for T in (2048, 8192):
        with compiling_for("tpu"):
            assert library.refuses(rule, shapes(T)) is None
            compiled = topology.compile_for("v5e:2x2", gradients(rule), shapes(T))
        assert len(set(re.findall(r"splash_m[hq]a_\w+", compiled.as_text()))) >= 3, "forward, and two kernels backward"
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    assert memory[1] < 2 * 4 * 8192 * 64 * 4 * 8, "a few times one float32 array of queries, and no [T, S]"


def test_cudnn_is_what_a_gpu_is_given(monkeypatch):
    """Lowered, not compiled: the compiler of GPU programs needs one."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)
    names = "__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"
    fused = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (*names, *fused)]
    rule = Rule(DECODER)
    with compiling_for("gpu"):
        assert library.refuses(rule, shapes(256)) is None
        program = jax.export.export(jax.jit(gradients(rule)), platforms=["cuda"], disabled_checks=unchecked)
        text = str(program(shapes(256)).mlir_module())
    assert set(re.findall(r"__cudnn\$\w+", text)) == {*names, *fused}


@pytest.mark.parametrize(
    ("rule", "operands", "reason"),
    [
        (Rule(DECODER), shapes(256, dtype=jnp.float32), "in bfloat16 or float16, not float32"),
        (Rule(DECODER, LinearBias()), shapes(256), "round the bias of LinearBias to 16 bits"),
        (Rule(DECODER, SoftCap(1.0)), shapes(256), "SoftCap cannot be written as a bias"),
        (Rule(DECODER), shapes(256, d=256), "a multiple of 8 up to 128, not 256"),
        (Rule(DECODER), shapes(256, d=12), "a multiple of 8 up to 128, not 12"),
        (Rule(DECODER), shapes(255), "even lengths with a mask, not 255 and 255"),
        (Rule(DECODER, normalizer="sigmoid"), shapes(256), "no sigmoid normalizer"),
    ],
    ids=["float32", "bias", "cap", "wide", "odd width", "odd length", "sigmoid"],
)
def test_what_cudnn_cannot_compute_is_refused(rule, operands, reason):
    with compiling_for("gpu"):
        assert reason in library.refuses(rule, operands)


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="no tokamax: pip install 'polygpt[tokamax]'")
@pytest.mark.parametrize("name", ["wide", "capped"])
def test_tokamax_takes_what_jax_refuses(name):
    rule, operands = problem("plain")
    if name == "capped":
        rule = dataclasses.replace(rule, score=SoftCap(5.0))
    else:
        operands = dataclasses.replace(operands, value_BKSe=jnp.concatenate([operands.value_BKSe] * 2, axis=-1))
    assert library._jax_refuses(rule, operands) and library.refuses(rule, operands) is None
    assert_agrees(library.attend, rule, operands)


def test_without_tokamax_what_jax_refuses_is_refused(monkeypatch):
    rule, operands = problem("plain")
    rule = dataclasses.replace(rule, score=SoftCap(5.0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "SoftCap cannot be written as a bias" in library.refuses(rule, operands)
