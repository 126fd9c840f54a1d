"""Variants of multi-head attention against the formulas of their papers in float64, and what is special to each."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from variants import (
    DIMS,
    WIDTH,
    T,
    context,
    copied,
    cross,
    differential,
    gated,
    inputs,
    latent,
    made,
    mixture,
    off_by_one,
    row,
    shifted,
    sigmoidal,
    talking,
    transformer_xl,
    wide,
)

from polygpt.attention.cache import Ring
from polygpt.attention.contract import Dims
from polygpt.attention.cross import GatedCross
from polygpt.attention.differential import Differential
from polygpt.attention.gated import GatedOutput
from polygpt.attention.kernels import dispatch
from polygpt.attention.latent import MultiHeadLatent
from polygpt.attention.mixture import MixtureOfTransformers
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.off_by_one import SoftmaxOffByOne
from polygpt.attention.sigmoid import SigmoidAttention
from polygpt.attention.talking_heads import TalkingHeads
from polygpt.attention.transformer_xl import TransformerXL
from polygpt.errors import SpecError
from polygpt.lab import catalogue
from polygpt.nn.positions import NoPosition, Rope
from polygpt.nn.rotary import YaRN

TOLERANCE = 1.5e-5
"""Outputs are up to 12 in size and carry the roundings to 2^-24 of a chain of four products: 1e-6 of that size."""
CASES = {
    "latent": (MultiHeadLatent(4), latent),
    "latent, absorbed": (MultiHeadLatent(4, form="absorbed"), latent),
    "latent, with latent queries": (MultiHeadLatent(2, kv_rank=6, q_rank=5, rope_width=4), latent),
    "differential": (Differential(2), differential),
    "differential, grouped": (Differential(4, kv_heads=2, lambda_init=0.35), differential),
    "talking": (TalkingHeads(4, kv_heads=2), talking),
    "gated": (GatedOutput(4, kv_heads=2), gated),
    "gated, by head": (GatedOutput(4, gate="head"), gated),
    "sigmoid": (SigmoidAttention(4, kv_heads=1, length=9), sigmoidal),
    "off by one": (SoftmaxOffByOne(4, kv_heads=2), off_by_one),
    "off by one, learned": (SoftmaxOffByOne(4, learned=True), off_by_one),
    "XL": (TransformerXL(2, piece=3), transformer_xl),
    "XL, grouped": (TransformerXL(4, kv_heads=2, piece=2, relative_width=6), transformer_xl),
    "XL, attached": (TransformerXL(2, piece=3, detach=False), transformer_xl),
    "cross": (GatedCross(4, kv_heads=2), cross),
    "mixture": (MixtureOfTransformers(4, kv_heads=2), mixture),
    "mixture, three sets": (MixtureOfTransformers(2, sets=3, bias=True), mixture),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(spec, what `made` makes of it, weights and outputs as the paper has them)"""
    spec, reference = CASES[request.param]
    return spec, *made(spec), *reference(wide(made(spec)[1]), inputs().astype(np.float64), row(), spec)


def test_it_is_the_papers_formula(case):
    _, call, state, weights, expected_BHTT, expected_BTD = case
    y_BTD, cache = call(state, inputs(), context(row()))
    assert cache is None and expected_BTD.std() > 0.1
    np.testing.assert_allclose(y_BTD, expected_BTD, rtol=0, atol=TOLERANCE)
    chosen_R = np.int32([1, 7, 10])
    weights_BHRT = weights(state, inputs(), context(row()), chosen_R)
    assert weights_BHRT.dtype == jnp.float32
    np.testing.assert_allclose(weights_BHRT, expected_BHTT[:, :, chosen_R], rtol=0, atol=TOLERANCE)


def test_with_a_cache_it_is_the_same(case):
    """A prompt, then steps, over examples that end in the midst of it; padding in one of the rows."""
    spec, call, state, *_ = case
    meta, x_BTD, S = row(), inputs(), 14
    expected_BTD, _ = call(state, x_BTD, context(meta))
    full, ring = (spec.init_cache(DIMS, 2, S, ring=ring) for ring in (False, True))
    for cache in (full, ring) if isinstance(ring, Ring) else (full,):
        key = jax.tree.map(lambda x: np.zeros((2, S), np.int32), meta)
        filled = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, S - T))), meta)
        got = []
        for start, stop in [(0, 4), *((t, t + 1) for t in range(4, T))]:
            query = shifted(meta, start, stop)
            key = jax.tree.map(lambda old, whole, stop=stop: np.where(np.arange(S) < stop, whole, old), key, filled)
            here = dataclasses.replace(context(query), key=key, cursor=np.int32(start))
            y_BTD, cache = call(state, x_BTD[:, start:stop], here, cache)
            got.append(y_BTD)
        np.testing.assert_allclose(np.concatenate(got, axis=1), expected_BTD, rtol=0, atol=TOLERANCE)


CLAIMS = [(cls, backend) for cls in catalogue.variants() for backend in cls().backends()]


@pytest.mark.parametrize(("cls", "backend"), CLAIMS, ids=lambda one: getattr(one, "__name__", one))
def test_what_it_claims_computes_it(cls, backend):
    """Each backend that a variant names takes a layer of it, here on a CPU: with `strict` a refusal is an error."""

    @nnx.eval_shape
    def y_BTD():
        module = cls(backend=backend, strict=True).build(DIMS, nnx.Rngs(0))
        return module(jnp.asarray(inputs()), context(jax.tree.map(jnp.asarray, row())))[0]

    assert y_BTD.shape == (2, T, WIDTH)


@pytest.mark.parametrize(
    ("spec", "factor"), [(MultiHead(2, head_width=3), 3**-0.5), (MultiHead(2, scale=0.3), 0.3)], ids=["usual", "own"]
)
def test_in_bfloat16_a_scale_is_not_rounded(spec, factor):
    """Queries times the exact factor, rounded once: bfloat16 has 0.5781 for 3^-1/2 = 0.5774 and 0.3008 for 0.3."""
    module = spec.build(dataclasses.replace(DIMS, dtype="bfloat16", position=NoPosition()), nnx.Rngs(0))
    x_BTD, here = jnp.asarray(inputs()), context(row())
    operands = module.operands(x_BTD, here, module.remembered(x_BTD, here), here.key)
    query_BHTd = np.asarray(module.queries(x_BTD, here), np.float64)
    assert operands.query_BHTd.dtype == jnp.bfloat16
    np.testing.assert_array_equal(operands.query_BHTd, (query_BHTd * factor).astype(jnp.bfloat16))
    wrong = query_BHTd * np.float64(jnp.bfloat16(factor))
    assert (np.asarray(operands.query_BHTd) != wrong.astype(jnp.bfloat16)).any(), "a test that would see it"


# --- what is special to each ------------------------------------------------------------------------------------------


def test_the_cache_of_latents_holds_one_latent_and_one_key():
    shapes = [leaf.shape for leaf in jax.tree.leaves(MultiHeadLatent(4, kv_rank=6).init_cache(DIMS, 2, 9))]
    assert sorted(shapes) == [(2, 1, 9, 2), (2, 1, 9, 6)]


def test_both_forms_of_latent_attention_have_the_same_gradients():
    found = []
    for form in ("expanded", "absorbed"):
        call, state, _ = made(MultiHeadLatent(4, form=form))

        def total(state, x_BTD, call=call):
            return jnp.sum(jnp.sin(call(state, x_BTD, context(row()))[0]))

        found.append(jax.jit(jax.grad(total, argnums=(0, 1)))(state, inputs()))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())


def test_rows_are_expanded_and_steps_absorbed():
    spec = MultiHeadLatent(16)  # of DeepSeek-V2's proportions
    assert not spec.absorbs(2048, queries=4096, keys=4096) and spec.absorbs(2048, queries=1, keys=4096)
    assert (spec.rank(2048), spec.width_of_rope(2048)) == (512, 64)


def test_heads_that_do_not_talk_are_multi_head_attention():
    spec, plain = TalkingHeads(4, kv_heads=2), MultiHead(4, kv_heads=2)
    call, state, _ = made(spec)
    state = jax.tree.map(lambda x: x, state)  # a copy
    state["before"] = state["after"] = nnx.Param(jnp.eye(4))
    expected, _ = made(plain)[0](copied(plain, state), inputs(), context(row()))
    np.testing.assert_allclose(call(state, inputs(), context(row()))[0], expected, rtol=0, atol=TOLERANCE)


def test_talking_heads_say_that_no_other_backend_can(caplog):
    with pytest.raises(SpecError, match="TalkingHeads.backend is 'chunked': it must be reference: talking heads mix"):
        TalkingHeads(4, backend="chunked", strict=True)
    dispatch.warn_fallback.cache_clear()
    call, state, _ = made(TalkingHeads(4, backend="chunked"))
    with caplog.at_level(logging.WARNING):
        call(state, inputs(), context(row()))
    assert "reference instead of chunked: talking heads mix" in caplog.text
    assert [record.name for record in caplog.records] == [dispatch.__name__], "in the words of every such choice"


def test_gradients_stop_before_the_piece_before():
    meta, x_BTD = row(), inputs()

    def gradient(detach):
        call, state, _ = made(TransformerXL(2, piece=3, detach=detach))

        def last(x_BTD, state):  # position 5 of the first example: the second position of its second piece
            return jnp.sum(jnp.sin(call(state, x_BTD, context(meta))[0][0, 5]))

        return jax.jit(jax.grad(last, argnums=(0, 1)))(x_BTD, state)

    (stopped, of_parameters), (flowing, of_all) = gradient(True), gradient(False)
    reached = (np.abs(stopped[0]) > 0).any(-1)
    assert reached.tolist() == [False] * 3 + [True] * 3 + [False] * 5
    assert (np.abs(flowing[0]) > 0).any(-1).tolist() == [True] * 6 + [False] * 5
    np.testing.assert_allclose(stopped[0, 5], flowing[0, 5], rtol=0, atol=1e-5)
    for a, b in zip(jax.tree.leaves(of_parameters), jax.tree.leaves(of_all), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # projections learn from the piece before, too


def test_the_ring_of_transformer_xl_holds_two_pieces():
    spec = TransformerXL(2, piece=3)
    leaves = jax.tree.leaves(spec.init_cache(DIMS, 2, 100).arrays)
    assert {leaf.shape for leaf in leaves} == {(2, 2, 6, WIDTH // 2)}


def test_text_looks_at_the_embeddings_that_the_stack_was_given():
    call, state, _ = made(GatedCross(4))
    given = inputs(seed=1)
    y_BTD, _ = call(state, inputs(), context(row(), inputs_BTD=given))
    expected = cross(wide(state), inputs().astype(np.float64), row(), GatedCross(4), given.astype(np.float64))[1]
    np.testing.assert_allclose(y_BTD, expected, rtol=0, atol=TOLERANCE)
    modality = row().modality
    assert (np.asarray(y_BTD)[modality != 0] == 0).all(), "media look at nothing"
    assert (y_BTD[0, [0, 6, 7]] == 0).all() and (y_BTD[0, 3] != 0).any(), "nor does text before any media"


def test_a_gate_starts_closed():
    call, state, _ = made(GatedCross(4))
    state = jax.tree.map(lambda x: x, state)  # a copy
    state["alpha"] = nnx.Param(jnp.float32(GatedCross(4).alpha))
    assert (call(state, inputs(), context(row()))[0] == 0).all()


def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients():
    meta = row()
    for spec in (SoftmaxOffByOne(4, learned=True), TransformerXL(2, piece=3), GatedCross(4), Differential(4)):
        call, state, _ = made(spec)

        def total(state, x_BTD, call=call):
            y_BTD = call(state, x_BTD, context(meta))[0]
            return jnp.sum(jnp.sin(y_BTD)), y_BTD

        gradient, y_BTD = jax.jit(jax.grad(total, has_aux=True, argnums=(0, 1)))(state, inputs())
        assert (np.asarray(y_BTD)[meta.segment == 0] == 0).all()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        assert (np.asarray(gradient[1])[meta.segment == 0] == 0).all()


def test_one_set_of_projections_is_multi_head_attention():
    one, plain = MixtureOfTransformers(4, sets=1), MultiHead(4)
    call, state, _ = made(one)
    expected, _ = made(plain)[0](copied(plain, state, lambda x: x[0]), inputs(), context(row()))
    np.testing.assert_allclose(call(state, inputs(), context(row()))[0], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiHeadLatent(4, kv_heads=2), "MultiHeadLatent.kv_heads is 2: it must be null"),
        (lambda: MultiHeadLatent(4, kv_rank=0), "MultiHeadLatent.kv_rank is 0: it must be at least 1"),
        (
            lambda: Differential(4, lambda_init=1.0),
            "Differential.lambda_init is 1.0: it must be at least 0 and below 1",
        ),
        (
            lambda: Differential(4).width_of_query(12),
            "Differential.heads is 4: it must be such that the head width",
        ),
        (lambda: SigmoidAttention(4, length=0), "SigmoidAttention.length is 0: it must be at least 1"),
        (lambda: TransformerXL(4, piece=0), "TransformerXL.piece is 0: it must be at least 1"),
        (lambda: TransformerXL(4, relative_width=3), "TransformerXL.relative_width is 3: it must be even"),
        (lambda: GatedCross(4, bias=True), "GatedCross.bias is True: it must be false"),
        (lambda: MixtureOfTransformers(4, sets=0), "MixtureOfTransformers.sets is 0: it must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(make, message):
    with pytest.raises(SpecError, match=message):
        make()


def test_latent_attention_refuses_an_encoding_that_would_sharpen_half_of_its_scores():
    with pytest.raises(SpecError, match="use NTK scaling"):
        MultiHeadLatent(4).build(Dims(16, position=Rope(scaling=YaRN(4.0))), nnx.Rngs(0))
