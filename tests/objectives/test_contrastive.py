"""Contrastive objectives: the formulas in float64, chunks, what is embedded, and microbatches of a real model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import LIGHT, build, example, lively, tiny
from polygpt.errors import SpecError
from polygpt.heads.linear import LinearHead
from polygpt.heads.projection import ProjectionHead
from polygpt.models.functional import bind
from polygpt.objectives.contrastive import Compared
from polygpt.objectives.forward import Forward
from polygpt.objectives.info_nce import InfoNCE
from polygpt.objectives.loss import Loss
from polygpt.objectives.siglip import SigLIP

HEADS = ("pair", "pair")
N, K = 11, 5


@pytest.fixture
def compared():
    rng = np.random.default_rng(0)
    left, right = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, N, K)))
    valid = np.arange(N) % 4 != 2
    return Compared(*map(jnp.float32, (left, right)), jnp.asarray(valid), jnp.float32(3.0), jnp.float32(-2.0))


def info_nce(left, right, valid, scale, bias):
    similarity = scale * left[valid] @ right[valid].T
    own = np.diag(similarity)
    both = [np.log(np.exp(x).sum(axis=1)) - own for x in (similarity, similarity.T)]
    return np.sum(both) / 2


def siglip(left, right, valid, scale, bias):
    """Algorithm 1 of the paper, without its division by the batch size."""
    logits = scale * left[valid] @ right[valid].T + bias
    signs = 2 * np.eye(valid.sum()) - 1
    return np.sum(np.log1p(np.exp(-signs * logits)))


KINDS = pytest.mark.parametrize("cls, formula", [(InfoNCE, info_nce), (SigLIP, siglip)])


@KINDS
def test_the_sum_is_the_formula_and_chunks_do_not_matter(cls, formula, compared):
    exact = [np.asarray(x, bool if x.dtype == bool else np.float64) for x in jax.tree.leaves(compared)]
    value, gradient = jax.jit(jax.value_and_grad(cls(HEADS).sum_over, allow_int=True))(compared)
    np.testing.assert_allclose(value, formula(*exact), rtol=1e-5)
    for chunk in (1, 4, N):
        other, found = jax.jit(jax.value_and_grad(cls(HEADS, chunk=chunk).sum_over, allow_int=True))(compared)
        np.testing.assert_allclose(other, value, rtol=1e-6)
        for name in ("left", "right", "scale", "bias"):
            np.testing.assert_allclose(getattr(found, name), getattr(gradient, name), rtol=1e-5, atol=1e-6)
    # Finite differences of the formula.
    step = 1e-6
    for number, name in ((0, "left"), (1, "right")):
        moved = [x.copy() for x in exact]
        moved[number][3, 1] += step
        slope = (formula(*moved) - formula(*exact)) / step
        np.testing.assert_allclose(getattr(gradient, name)[3, 1], slope, rtol=1e-3)
    assert not np.any(gradient.left[2]) and not np.any(gradient.right[6])


# --- in a model -------------------------------------------------------------------------------------------------------

A, B, C, D = (
    example(3, ("image", 4), 4, seed=1),
    example(("image", 4), 3, ("audio", 2), 2, seed=2),
    example(("audio", 3), 6, seed=3),
    example(2, ("image", 4), 5, seed=4),
)
T = 28


@pytest.fixture(scope="module")
def model():
    spec = tiny(adapters=LIGHT).replace(heads={"pair": ProjectionHead(6, pool="mean", bias=-1.0)})
    model = bind(spec, 31)
    return model, lively(model)


@functools.partial(jax.jit, static_argnames=("model", "objective"))
def embed(model, objective, params, batch):
    batch = objective.view(batch, None)
    return objective.embed(Forward(model, params, batch), batch), objective.weight(batch)


def embedded(model, rows, objective=InfoNCE(HEADS), change=lambda batch: batch):  # noqa: B008
    found, weight = embed(model[0], objective, model[1], change(build(rows, T)))
    return jax.tree.map(np.asarray, found), float(weight)


def test_examples_with_both_modalities_are_embedded_wherever_they_lie(model):
    packed, count = embedded(model, [[A, B], [C, D]])
    assert count == 3 and packed["valid"].sum() == 3 and not packed["left"][1, 0].any()
    for (row, place), one in {(0, 0): A, (0, 1): B, (1, 1): D}.items():
        alone, _ = embedded(model, [[one]])
        for side in ("left", "right"):
            np.testing.assert_allclose(packed[side][row, place], alone[side][0, 0], rtol=0, atol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(packed[side][row, place]), 1, rtol=1e-5)
    audio, count = embedded(model, [[A, B], [C, D]], InfoNCE(HEADS, between=(2, 0)))
    assert count == 2 and list(map(tuple, np.argwhere(audio["valid"]))) == [(0, 1), (1, 0)]


def test_examples_beyond_the_limit_of_a_row_are_counted():
    seen = InfoNCE(HEADS).view(build([[A, B], [C, D]], T), None)
    counts = {limit: InfoNCE(HEADS, per_row=limit) for limit in (None, 1, 2)}
    counts = {limit: (float(one.weight(seen)), float(one.left_out(seen))) for limit, one in counts.items()}
    assert counts == {None: (3, 0), 1: (1, 2), 2: (3, 0)}


def test_a_modality_is_embedded_without_the_others(model):
    def other_pixels(batch):
        batch.media["image"].features[...] += 1.0
        return batch

    def other_text(batch):
        return batch.replace(tokens_BT=np.where(batch.modality_BT == 0, (batch.tokens_BT + 1) % 31, 0))

    before = embedded(model, [[A, B]])[0]
    for change, moved, still in ((other_pixels, "left", "right"), (other_text, "right", "left")):
        after = embedded(model, [[A, B]], change=change)[0]
        np.testing.assert_array_equal(after[still], before[still])
        assert np.abs(after[moved] - before[moved])[0, :2].max() > 1e-3


def test_a_text_does_not_tell_the_length_of_the_media_around_it(model):
    short, long = (
        embedded(model, [[example(2, ("audio", size), 5, ("image", 4), 3, seed=5)]], InfoNCE(HEADS, between=(2, 0)))[0]
        for size in (1, 4)
    )
    np.testing.assert_allclose(short["right"], long["right"], rtol=0, atol=1e-6)
    views = [InfoNCE(HEADS).view(build([[example(2, ("audio", size), 3)]], T), None) for size in (1, 4)]
    for name in ("position_BT", "coordinate_BT3"):
        texts = [getattr(view, name)[np.asarray(view.segment_BT) == 1] for view in views]
        np.testing.assert_array_equal(*texts)


def test_bos_and_eos_are_no_text(model):
    found, count = embedded(model, [[example(1, ("image", 4), 1), example(1, ("image", 4), 2)]])
    assert count == 1 and found["valid"][0, :2].tolist() == [0, 1]


@pytest.mark.parametrize("objective", [InfoNCE(HEADS), SigLIP(HEADS, chunk=5, per_row=2)], ids=["InfoNCE", "SigLIP"])
def test_microbatches_see_all_examples(model, objective):
    batch = build([[A, B], [C, D], [D], [B]], T)
    found = []
    for parts in (1, 2):
        loss = Loss(model[0], {"pair": (objective, 1.0)}, jax.tree.map(lambda _: True, model[1]), parts)

        @jax.jit
        def gradient(params, batch, loss=loss):
            seen = loss.seen(batch, jax.random.key(0))
            return loss.gradient(params, {}, seen, loss.weights(seen), None)

        found.append(gradient(model[1], batch))
    assert found[0][0]["pair"] > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)
    scale = found[0][1]["heads"]["pair"]
    assert abs(scale["log_scale"]) > 1e-3 and (isinstance(objective, InfoNCE) or abs(scale["bias"]) > 1e-3)


def test_what_does_not_fit_is_told(model):
    spec, layout = model[0].spec, None
    for objective, changes, words in (
        (InfoNCE(("none", "pair")), {}, "reads the head 'none', which is not in model.heads"),
        (InfoNCE(("pair", "b")), {"heads": {"pair": ProjectionHead(6), "b": ProjectionHead(4)}}, "6 and 4 outputs"),
        (SigLIP(HEADS), {"decoder": spec.decoder.replace(mask="causal")}, "is bidirectional, but .* is 'causal'"),
        (
            InfoNCE(HEADS, between=(3, 0)),
            {},
            r"compares .* \[3, 0\] and the model reads 0 text, 1 image, 2 audio: .* model\.adapters",
        ),
    ):
        with pytest.raises(SpecError, match=words):
            objective.check_with(spec.replace(**changes), layout)
    linear = bind(tiny().replace(heads={"pair": LinearHead(6)}), 31)
    with pytest.raises(SpecError, match="model.heads.pair has no temperature"):
        embedded((linear, lively(linear)), [[A]])
