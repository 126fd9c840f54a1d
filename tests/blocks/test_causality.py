"""Causality by gradient: the derivative of an output by an input that it must not see is exactly zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from batches import build, example, tiny, tiny_model
from polygpt.attention.contract import Context
from polygpt.attention.masks import DECODER, allowed
from polygpt.blocks.stack import Stack, StackSpec
from polygpt.errors import SpecError
from polygpt.models.decoder import metadata
from polygpt.nn.positions import NoPosition

T = 12
ROW = [example(3, ("image", 4), 1, seed=1), example(3, seed=2)]  # and one position of padding


def influence(function, x_BTD) -> np.ndarray:
    """[T, T]: the largest |d function(x)[t] / d x[s]| of the one row."""
    jacobian = jax.jacrev(function)(x_BTD)  # [1, T, D, 1, T, D]
    return np.abs(np.asarray(jacobian)).max(axis=(0, 2, 3, 5))


@pytest.fixture(scope="module", params=[False, True], ids=["causal", "bidirectional"])
def batch(request):
    return build([ROW], T, bidirectional=request.param)


@pytest.fixture(scope="module")
def blocks():
    """(x, influence of every block of an unrolled decoder and of the whole of it, by batch)."""
    model, params = tiny_model(scan=False, depth=3, width=8)
    x_BTD = np.float32(np.random.default_rng(0).normal(size=(1, T, 8)))

    def each(params, x_BTD, batch):
        decoder = model.module(params).decoder
        meta = metadata(batch, 0)
        context = Context(meta, meta, DECODER)
        inside = [influence(lambda x, block=block: block(x, context)[0], x_BTD) for block in decoder.blocks]
        return inside, influence(lambda x: decoder(x, batch)[0], x_BTD)

    def influence(function, x_BTD):
        return jnp.abs(jax.jacrev(function)(x_BTD)).max(axis=(0, 2, 3, 5))

    compiled = jax.jit(each)
    return lambda batch: compiled(params, x_BTD, batch)


def test_no_block_sees_what_its_mask_forbids(blocks, batch):
    meta = metadata(batch, 0)
    may_TT = np.asarray(allowed(DECODER, meta, meta))[0]
    inside, _ = blocks(batch)
    assert len(inside) == 3
    for influence_TT in inside:
        seen = np.asarray(influence_TT) > 0
        np.testing.assert_array_equal(seen, may_TT | np.eye(T, dtype=bool), "through the residual each sees itself")


def test_the_decoder_sees_no_future_and_no_other_example(blocks, batch):
    _, seen = blocks(batch)
    seen = np.asarray(seen) > 0
    t, s = np.indices((T, T))
    segment, span = batch.segment_BT[0], batch.span_BT[0]
    same = segment[:, None] == segment[None]
    assert not seen[~same].any()
    # Two positions that see a span both ways are chained by it: what lies before the span's end is all that is allowed.
    together = (span[:, None] == span[None]) & (span > 0)[:, None]
    assert not seen[(s > t) & ~together].any()
    assert seen[same & (s <= t) & (segment > 0)[:, None]].all()
    assert (seen[together]).all() and together.any() == bool(span.any())


def test_predictions_do_not_see_media_that_come_later():
    """By gradient into the features themselves, through the adapter."""
    model, params = tiny_model()
    batch = build([[example(2, ("audio", 3), 2)]], 8)

    def before(features, stop):
        media = batch.media | {"audio": type(batch.media["audio"])(features, batch.media["audio"].length_BN)}
        return jnp.sum(
            jnp.sin(model.apply(params, batch.replace(media=media)).logits_BTV) * (jnp.arange(8) < stop)[None, :, None]
        )

    gradient = jax.jit(jax.grad(before))
    assert not np.asarray(gradient(batch.media["audio"].features, 2)).any()
    at_first = np.asarray(gradient(batch.media["audio"].features, 3))
    assert at_first[0, 0, :12].any(axis=-1).all(), "three positions of two folded pairs of frames"
    assert not at_first[0, 0, 12:].any() and not at_first[0, 1].any()


def test_a_stack_without_blocks_is_its_norm():
    model, params = tiny_model(depth=0, adapters={})
    batch = build([[example(4)]], 4, adapters={})
    hidden = model.apply(params, batch).hidden_BTD
    x = params["text"]["table"][batch.tokens_BT[0]]
    scale = params["decoder"]["norm"]["scale"]
    np.testing.assert_allclose(hidden[0], x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale, rtol=1e-5)


def test_a_stack_says_what_does_not_fit():
    with pytest.raises(SpecError, match="StackSpec.dropout is 1.0: it must be at least 0 and below 1"):
        StackSpec(dropout=1)
    with pytest.raises(SpecError, match=r"MultiHead.heads is 4: it must be a divisor of the model width \(30\)"):
        Stack(StackSpec(width=30), rngs=nnx.Rngs(0), dtype="float32")
    assert tiny(position=NoPosition()).decoder.position == NoPosition()
