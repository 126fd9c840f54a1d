"""Caption and contrast in one pass: the formulas in float64, one pass for both, and a text that sees no picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import LIGHT, build, example, lively, tiny
from polygpt.attention.cross import GatedCross
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.retention import Retention
from polygpt.attention.sliding import SlidingWindow
from polygpt.attention.strided import LocalAndStrided
from polygpt.attention.within_modality import WithinModality
from polygpt.errors import SpecError
from polygpt.evaluation.head_metric import measured
from polygpt.evaluation.retrieval import Retrieval
from polygpt.heads.projection import ProjectionHead
from polygpt.models.functional import bind
from polygpt.objectives.apart import Apart
from polygpt.objectives.forward import Forward
from polygpt.objectives.info_nce import InfoNCE
from polygpt.objectives.loss import Loss
from polygpt.objectives.next_token import NextToken

HEADS = ("image", "text")
CONTRAST = InfoNCE(HEADS, layer=1)
OBJECTIVES = {"caption": (NextToken(), 2.0), "contrast": (CONTRAST, 1.0)}
"""Weights of the paper's section 4.1."""
UNIMODAL = WithinModality(heads=2)
PATTERN = (UNIMODAL, UNIMODAL, GatedCross(heads=2, alpha=1.0))
ROWS = [
    [example(1, ("image", 4), 4, seed=1), example(1, ("image", 3), 3, seed=2)],
    [example(2, ("audio", 3), 6, seed=3), example(1, ("image", 4), 5, seed=4)],
]
T = 28


@pytest.fixture(scope="module")
def model():
    heads = {"image": ProjectionHead(6, pool="mean"), "text": ProjectionHead(6, pool="last")}
    spec = tiny(adapters=LIGHT, depth=3, pattern=PATTERN, scan=False).replace(heads=heads)
    model = bind(spec, 31)
    return model, lively(model)


@pytest.fixture(scope="module")
def batch():
    return build(ROWS, T, bidirectional=True)


def embedded(model, params, batch):
    return CONTRAST.embed(Forward(model, params, batch, captures=CONTRAST.captures), batch)


def with_pixels(batch, pixels):
    media = {**batch.media, "image": batch.media["image"].__class__(pixels, batch.media["image"].length_BN)}
    return batch.replace(media=media)


def test_no_text_vector_depends_on_the_picture_and_the_caption_does(model, batch):
    pixels = jnp.asarray(batch.media["image"].features)

    @jax.jit
    def slopes(params, pixels):
        def text(pixels):
            return jnp.sum(jnp.sin(embedded(model[0], params, with_pixels(batch, pixels))["right"] * 7))

        def caption(pixels):
            outputs = Forward(model[0], params, with_pixels(batch, pixels))
            return NextToken().total(outputs, batch)

        def image(tokens_weight):
            table_VD = params["text"]["table"] * tokens_weight
            changed = {**params, "text": {**params["text"], "table": table_VD}}
            return jnp.sum(jnp.sin(embedded(model[0], changed, batch)["left"] * 7))

        return jax.grad(text)(pixels), jax.grad(caption)(pixels), jax.grad(image)(1.0)

    of_text, of_caption, of_image = jax.device_get(slopes(model[1], pixels))
    assert not of_text.any() and np.abs(of_caption).max() > 1e-4
    assert of_image == 0, "nor does a picture's vector depend on the text"


def test_the_loss_is_that_of_the_formulas(model, batch):
    bound, params = model
    loss = Loss(bound, OBJECTIVES, jax.tree.map(lambda _: True, params))

    @jax.jit
    def run(params, batch):
        seen = loss.seen(batch, jax.random.key(0))
        means, _ = loss.gradient(params, {}, seen, loss.weights(seen), None)
        hidden_BTD, _, found = bound.hidden(params, batch, capture=("residual",))
        return means, loss.value(means), found["residual"][1], bound.logits(params, hidden_BTD)

    means, value, residual_BTD, logits_BTV = jax.device_get(run(params, batch))
    lefts, rights = [], []
    for b, s in ((0, 1), (0, 2), (1, 2)):  # the examples with a picture
        here = batch.segment_BT[b] == s
        of_image = np.float64(residual_BTD[b][here & (batch.modality_BT[b] == 1)]).mean(axis=0)
        of_text = np.float64(residual_BTD[b][here & (batch.modality_BT[b] == 0)])[-1]
        for some, vector, head in ((lefts, of_image, "image"), (rights, of_text, "text")):
            projected = vector @ np.float64(params["heads"][head]["map"]["kernel"])
            some.append(projected / np.linalg.norm(projected))
    similarity = np.exp(np.float64(params["heads"]["image"]["log_scale"])) * np.array(lefts) @ np.array(rights).T
    own = np.diag(similarity)
    both = [np.log(np.exp(x).sum(axis=1)) - own for x in (similarity, similarity.T)]
    contrast = np.mean(both)
    log_p_BTV = np.float64(logits_BTV) - np.logaddexp.reduce(np.float64(logits_BTV), axis=-1, keepdims=True)
    target_BT = np.take_along_axis(log_p_BTV, batch.target_BT[..., None], axis=-1)[..., 0]
    caption = -(batch.weight_BT * target_BT).sum() / batch.weight_BT.sum()
    np.testing.assert_allclose([means["contrast"], means["caption"]], [contrast, caption], rtol=1e-5)
    np.testing.assert_allclose(value, 2 * caption + contrast, rtol=1e-5)


def test_one_pass_serves_both_and_microbatches_equal_the_batch(model, batch, monkeypatch):
    bound, params = model
    passes = []
    hidden = type(bound).hidden
    monkeypatch.setattr(type(bound), "hidden", lambda self, *a, **k: (passes.append(1), hidden(self, *a, **k))[1])

    def gradient(parts):
        loss = Loss(bound, OBJECTIVES, jax.tree.map(lambda _: True, params), parts)
        seen = loss.seen(batch, jax.random.key(0))
        return jax.jit(lambda params: loss.gradient(params, {}, seen, loss.weights(seen), None))(params)

    whole = gradient(1)
    assert len(passes) == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient(2), whole)


def test_retrieval_reads_the_same_vectors(model, batch):
    rows = []

    class Kept(Retrieval):
        def __call__(self, *found):
            rows.append(found)
            return super().__call__(*found)

    alone = Retrieval(HEADS, name="alone")
    figures = measured(*model, [batch], [Kept(HEADS, layer=1), alone])
    embed = jax.jit(lambda params, batch: embedded(model[0], params, batch))
    vectors = embed(model[1], batch)
    valid = np.asarray(vectors["valid"]) > 0
    for found, side in zip(rows[0], ("left", "right"), strict=False):
        np.testing.assert_allclose(found, np.asarray(vectors[side])[valid], rtol=0, atol=1e-6)
    ways = ("retrieval", "retrieval_back", "alone", "alone_back")
    assert set(figures) == {f"{way}_r{k}" for way in ways for k in (1, 5)}


def test_what_it_reads_before_the_layer_keeps_modalities_apart():
    assert CONTRAST.view is None and InfoNCE(HEADS).view == Apart() and InfoNCE(HEADS).captures == {}
    spec = tiny(adapters=LIGHT, depth=3, pattern=PATTERN, scan=False)
    spec = spec.replace(heads=dict.fromkeys(HEADS, ProjectionHead(6)))
    for objective in (CONTRAST, Retrieval(HEADS, layer=1)):
        objective.check_with(spec, None)
    mixing = "in block 2 modalities may see each other: set its attention to .*WithinModality"
    for layer, words in ((2, mixing), (3, "reads block 3: model.decoder has the blocks 0 to 2")):
        for objective in (InfoNCE(HEADS, layer=layer), Retrieval(HEADS, layer=layer)):
            with pytest.raises(SpecError, match=words):
                objective.check_with(spec, None)


def test_which_attention_mixes_modalities():
    apart = (WithinModality(), SlidingWindow(window=1))
    mixing = (MultiHead(), SlidingWindow(window=2), LocalAndStrided(), GatedCross(), Retention())
    assert [one.mixes_modalities() for one in (*apart, *mixing)] == [False] * 2 + [True] * 5
