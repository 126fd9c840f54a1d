"""cuDNN's attention: forms of masks, rows that have them, the ways that a program chooses from, what a GPU is given."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import answers, cotangents, rows_of

from polygpt.attention.kernels import cudnn, dispatch, reference
from polygpt.attention.kernels.cudnn import Form
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import DECODER, ENCODER, Causal, SameSegment, Sinks, Strided, Window, allowed
from polygpt.attention.meta import Meta

WHOLE, T = SameSegment() & Causal(), 32


@pytest.mark.parametrize(
    ("mask", "form"),
    [
        (ENCODER, Form()),
        (WHOLE, Form(causal=True)),
        (DECODER, Form(causal=True, spans=True)),
        (DECODER & Window(8) & Window(5), Form(causal=True, window=5, spans=True)),
        (WHOLE & DECODER, Form(causal=True, spans=True)),
        (ENCODER & Window(5), None),
        (Causal(), None),
        (DECODER & (Window(5) | Sinks(2)), None),
        (WHOLE & Strided(2), None),
    ],
    ids=str,
)
def test_masks_have_the_form_of_what_cudnn_computes_by_itself(mask, form):
    assert cudnn.form_of(mask) == form


def meta(lengths, span=None) -> Meta:
    rows = rows_of(lengths, T)
    return jax.tree.map(jnp.asarray, rows if span is None else dataclasses.replace(rows, span=span))


def spans(begin: int, end: int) -> np.ndarray:
    found = np.zeros((2, T), np.int32)
    found[0, begin:end] = 1
    return found


def operands_of(meta: Meta, dtype=jnp.float32) -> Operands:
    rng = np.random.default_rng(0)
    arrays = (jnp.asarray(rng.normal(size=(2, n, T, 8)), dtype) for n in (4, 2, 2))
    return Operands(*arrays, meta, meta)


ROWS = {
    "whole": meta([[T], [T]]),
    "padded": meta([[20], [T]]),
    "an empty row": meta([[], [7]]),
    "packed": meta([[20, 9], [T]]),
    "span": meta([[20], [T]], spans(3, 8)),
    "span over parts": meta([[20], [T]], spans(3, 19)),
}


@pytest.mark.parametrize("mask", [DECODER, WHOLE, DECODER & Window(5), ENCODER], ids=str)
def test_the_way_chosen_for_any_rows_gives_values_and_gradients_of_the_reference(mask, monkeypatch):
    """The same program for all rows, with what JAX computes in the place of cuDNN."""
    monkeypatch.setattr(cudnn, "SHORTEST", 8)
    rule = Rule(mask)

    def attend(rule, operands):
        return cudnn.attend(rule, operands, "xla"), jnp.zeros(operands.query_BHTd.shape[:3])

    given = jax.jit(lambda operands, *more: answers(attend, rule, operands, *more))
    wanted = jax.jit(lambda operands, *more: answers(reference.attend, rule, operands, *more))
    for name, meta in ROWS.items():
        operands = operands_of(meta)
        dy_BHTe, dlse_BHT = cotangents(operands)
        pair = (found(operands, dy_BHTe, jnp.zeros_like(dlse_BHT)) for found in (given, wanted))
        (y, _, *got), (want, _, *wanted_gradients) = map(leaves, pair)
        for a, b in zip([y, *got], [want, *wanted_gradients], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5, err_msg=name)


def test_rows_go_the_way_that_suits_them():
    form = cudnn.form_of(DECODER)
    assert [name for name, meta in ROWS.items() if cudnn.plain(form, meta, meta)] == ["whole", "padded", "an empty row"]
    later = {name for name, meta in ROWS.items() if cudnn.sees_later_parts(Rule(DECODER), operands_of(meta))}
    assert later == {"span over parts"}


def leaves(found) -> list:
    return jax.tree.leaves(found)


@pytest.mark.parametrize("mask", [DECODER, WHOLE, WHOLE & Window(5), ENCODER], ids=str)
def test_rows_have_a_form_only_where_it_says_what_the_mask_says(mask):
    rng, form, found = np.random.default_rng(0), cudnn.form_of(mask), []
    index_T = np.arange(T)
    for i in range(200):
        row = rows_of([[int(rng.integers(0, T + 1))] if i % 2 else list(rng.integers(1, 12, 2))], T)
        match i % 7:
            case 2:
                row = dataclasses.replace(row, span=np.int32(rng.integers(0, 12, (1, T)) == 0))
            case 3:
                row = dataclasses.replace(row, position=row.position * 2)
            case 4:
                row = dataclasses.replace(row, index=row.index[:, ::-1].copy())
            case 5:
                row = jax.tree.map(lambda x: np.roll(x, 3, axis=1), row)
            case 6:
                row = dataclasses.replace(row, index=row.index + 5, position=row.position + 7)
        real_T = row.segment[0] > 0
        n = real_T.sum()
        seen_TT = np.broadcast_to(index_T[None] < n, (T, T)).copy()
        if form.causal:
            seen_TT &= index_T[None] <= index_T[:, None]
        if form.window:
            seen_TT &= index_T[:, None] - index_T[None] < form.window
        right = (seen_TT == np.asarray(allowed(mask, row, row))[0])[real_T].all() and real_T[:n].all()
        found.append((bool(cudnn.plain(form, *[jax.tree.map(jnp.asarray, row)] * 2)), bool(right)))
        assert found[-1] != (True, False), "wrong in silence"
    assert found.count((True, True)) > 50 and found.count((False, False)) > 50


# --- lowered for a GPU, without one -----------------------------------------------------------------------------------


@pytest.fixture
def with_cudnn(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)


def lowered(attend, length: int, rows: int = 2) -> str:
    """The program of values and gradients for a GPU, as text."""
    rows_of_ints = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    arrays = [jax.ShapeDtypeStruct((rows, n, length, 64), jnp.bfloat16) for n in (4, 2, 2)]

    def loss(query_BHTd, key_BKSd, value_BKSe, meta):
        return jnp.sum(jnp.sin(attend(Operands(query_BHTd, key_BKSd, value_BKSe, meta, meta)).astype(jnp.float32)))

    with dispatch.compiling_for("gpu"):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays, Meta(*[rows_of_ints] * 5))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


FUSED = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
WITH_MASK = {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"}


def calls(text: str) -> set[str]:
    return set(re.findall(r"__cudnn\$\w+", text))


def squares(text: str, length: int) -> set[str]:
    """Arrays of queries times keys."""
    return set(re.findall(rf"tensor<(?:\d+x)*{length}x{length}x\w+>", text))


@pytest.mark.parametrize(
    ("mask", "config"),
    [
        (DECODER, {"PADDING_CAUSAL": True, 'sliding_window_length": 0': True}),
        (ENCODER, {"PADDING": True, "CAUSAL": False}),
        (WHOLE & Window(100), {"CAUSAL": True, "PADDING": False, 'sliding_window_length": 100': True}),
    ],
    ids=str,
)
def test_the_fused_form_has_no_mask(with_cudnn, mask, config):
    text = lowered(lambda operands: cudnn.fused(cudnn.form_of(mask), operands), 256)
    assert calls(text) == FUSED and not squares(text, 256)
    for word, there in config.items():
        assert (word in text.replace("\\22", '"')) == there, word


def test_programs_have_all_ways_and_no_mask_where_it_would_be_large(with_cudnn, monkeypatch):
    text = lowered(lambda operands: dispatch.attend(Rule(DECODER), operands)[0], 2048)
    assert calls(text) == FUSED | WITH_MASK
    assert "tensor<2x1x512x512xbf16>" in text and "tensor<2x1x512x2048xbf16>" in text  # parts of a causal row
    monkeypatch.setattr(cudnn, "DENSE", 2 * 2048**2 - 1)
    text = lowered(lambda operands: dispatch.attend(Rule(DECODER), operands)[0], 2048)
    assert calls(text) == FUSED and not squares(text, 2048)


def test_the_mask_is_made_again_for_the_backward_pass(with_cudnn):
    shapes = operands_of(meta([[T], [T]]), jnp.bfloat16)
    _, pull_back = jax.eval_shape(lambda operands: jax.vjp(lambda o: cudnn.dense(Rule(DECODER), o), operands), shapes)
    sizes = {leaf.shape for leaf in jax.tree.leaves(pull_back)}
    assert (2, 4, T) in sizes and not any(shape[-2:] == (T, T) for shape in sizes)


def test_stages_of_a_pipeline_do_not_compute_all_ways(with_cudnn):
    text = lowered(lambda operands: cudnn.attend(Rule(DECODER, staged=True), operands), 2048)
    assert calls(text) == WITH_MASK and "stablehlo.case" not in text
