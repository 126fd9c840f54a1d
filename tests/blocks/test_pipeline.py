"""A pipeline's schedule, on one device: whatever the stages, it computes what the blocks do one after another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import build, example, lively, tiny
from polygpt.attention.contract import Context
from polygpt.attention.masks import DECODER
from polygpt.attention.meta import Meta
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.pipeline import Schedule, pipeline
from polygpt.errors import SpecError
from polygpt.models.functional import bind
from polygpt.nn.remat import KEPT

T, D = 3, 4


# --- the schedule -----------------------------------------------------------------------------------------------------


def body(params, x_bTD, period, context, microbatch):
    """Looks at all that a block may look at, and would give NaN gradients of zeros but for the 1e-6."""
    h_bTD = jnp.tanh(x_bTD @ params["matrix"] + context.inputs_BTD * params["scale"])
    h_bTD = h_bTD / jnp.sqrt(jnp.mean(h_bTD**2, axis=-1, keepdims=True) + 1e-6)
    real_bT = context.query.segment > 0
    loss = jnp.sum(jnp.where(real_bT, jnp.sum(h_bTD**4, axis=-1), 0.0))
    return x_bTD + h_bTD * context.query.segment[..., None] * (1 + 0.1 * period), {"fourth": loss}


def by_hand(params, x_BTD, inputs_BTD, segment_BT):
    """`body` for one period after the other, row by row, in float64."""
    rows, fourth = [], 0.0
    for x_TD, inputs_TD, segment_T in zip(x_BTD.astype(np.float64), inputs_BTD, segment_BT, strict=True):
        for period, (matrix, scale) in enumerate(zip(params["matrix"], params["scale"], strict=True)):
            h_TD = np.tanh(x_TD @ matrix + inputs_TD * scale)
            h_TD /= np.sqrt((h_TD**2).mean(-1, keepdims=True) + 1e-6)
            fourth += (h_TD**4).sum(-1)[segment_T > 0].sum()
            x_TD = x_TD + h_TD * segment_T[:, None] * (1 + 0.1 * period)
        rows.append(x_TD)
    return np.stack(rows), fourth


def scanned(params, x_BTD, context):
    """`body` for one period after the other."""

    def one(x_BTD, inputs):
        return body(inputs[0], x_BTD, inputs[1], context, 0)

    x_BTD, losses = jax.lax.scan(one, x_BTD, (params, jnp.arange(len(params["scale"]))))
    return x_BTD, jax.tree.map(jnp.sum, losses)


@pytest.mark.parametrize(
    "stages, repeats, periods, microbatches, rows, kept",
    [
        (1, 1, 2, 1, 2, None),
        (2, 1, 2, 3, 2, None),
        (4, 1, 1, 4, 1, None),
        (3, 2, 1, 3, 2, "dots"),
        (2, 3, 2, 5, 1, "full"),
        (4, 2, 1, 9, 1, "none"),
    ],
)
def test_stages_compute_what_blocks_do_one_after_another(stages, repeats, periods, microbatches, rows, kept):
    rng, L, B = np.random.default_rng(0), stages * repeats * periods, microbatches * rows
    params = {"matrix": rng.normal(0, 0.3, (L, D, D)), "scale": rng.normal(size=L)}
    x_BTD, inputs_BTD, weight_BTD = rng.normal(size=(3, B, T, D))
    segment_BT = rng.integers(0, 3, (B, T))
    meta = Meta(*[segment_BT.astype(np.int32)] * 5)
    schedule = Schedule(stages, repeats, microbatches)

    def value_and_gradients(compute):
        def loss(params, x_BTD, inputs_BTD):
            y_BTD, losses = compute(params, x_BTD, Context(meta, meta, DECODER, inputs_BTD=inputs_BTD))
            return jnp.sum(y_BTD * weight_BTD) + losses["fourth"], (y_BTD, losses["fourth"])

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(params, x_BTD, inputs_BTD)

    # In double precision: twelve blocks that each normalize grow rounding of single precision beyond a narrow bound.
    with jax.enable_x64(True):
        ours = value_and_gradients(lambda *given: pipeline(body, *given, schedule, KEPT.get(kept)))
        others = value_and_gradients(scanned)
    for got, expected in zip(ours[0][1], by_hand(params, x_BTD, inputs_BTD, segment_BT), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)
    for got, expected in zip(*(jax.tree.leaves(both) for both in (ours, others)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


def test_the_bubble_is_what_is_left_of_the_iterations():
    assert Schedule(4, 1, 4).iterations == 7 and Schedule(4, 1, 4).bubble() == 3 / 7
    assert Schedule(4, 2, 8).bubble() == 3 / 19 and Schedule(1, 1, 1).bubble() == 0


@pytest.mark.parametrize(
    "schedule, message",
    [
        (Schedule(4, 2, 4), "model.decoder.depth is 12: it must be a multiple of 24 .train.mesh.stage 4, train.mesh."),
        (Schedule(2, 1, 1), "train.mesh.microbatches is 1: it must be at least train.mesh.stage, which is 2"),
        (Schedule(2, 1, 5), "train.mesh.microbatches is 5: it must divide the 8 rows"),
    ],
)
def test_what_does_not_come_out_even_is_told(schedule, message):
    with pytest.raises(SpecError, match=message):
        schedule.check(depth=12, pattern=3 if schedule.repeats == 2 else 1, batch_size=8)


# --- the decoder ------------------------------------------------------------------------------------------------------


ROWS = [[example(9, seed=i), example(4, seed=i + 8)] if i % 2 else [example(11 - i, seed=i + 16)] for i in range(6)]


@pytest.mark.parametrize(
    "remat, repeats", [("none", 1), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in KEPT)]
)
def test_a_decoder_in_stages_is_the_decoder(remat, repeats):
    """Two kinds of blocks; rows of several examples, with spans and padding."""
    model = bind(tiny(adapters={}, depth=8, pattern=(None, MultiHead(2)), remat=remat), 31)
    params, batch = lively(model, scale=0.2), build(ROWS, 14, adapters={})
    span_BT = batch.segment_BT * (np.arange(14) % 7 < 3)[None, :]
    batch = batch.replace(span_BT=span_BT.astype(np.int32))
    weight_BTD = np.random.default_rng(0).normal(size=(6, 14, 16)).astype(np.float32)

    def gradients(schedule):
        def loss(params):
            module = model.module(params)
            decoder, (x_BTD, _) = module.decoder, module.embed(batch)
            if schedule is None:
                y_BTD, _, _ = decoder(x_BTD, batch)
            else:
                context = dataclasses.replace(decoder._context(batch, None)[0], inputs_BTD=x_BTD)
                y_BTD = decoder.norm(decoder.in_stages(x_BTD, context, None, schedule)[0])
            return jnp.sum(y_BTD * weight_BTD), y_BTD

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    schedule = Schedule(2, repeats, 3)
    for got, expected in zip(*(jax.tree.leaves(gradients(one)) for one in (schedule, None)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max() + 1e-6)


def test_dropout_differs_by_microbatch():
    """Four equal rows in two microbatches: the first of each would be equal if they drew alike."""
    model = bind(tiny(adapters={}, depth=2, heads=2, dropout=0.5), 31)
    module, batch = model.module(lively(model)), build([[example(5)]] * 4, 5, adapters={})
    x_BTD = jnp.ones((4, 5, 16))
    context = dataclasses.replace(module.decoder._context(batch, None)[0], inputs_BTD=x_BTD)
    compute = jax.jit(lambda key: module.decoder.in_stages(x_BTD, context, key, Schedule(2, 1, 2))[0])
    y_BTD = np.asarray(compute(jax.random.key(0)))
    assert all(not np.array_equal(y_BTD[i], y_BTD[j]) for i in range(4) for j in range(i))
    np.testing.assert_array_equal(compute(jax.random.key(0)), y_BTD)


def test_blocks_that_are_not_stacked_have_no_stages():
    model = bind(tiny(adapters={}, depth=4, scan=False), 31)
    decoder = model.module(lively(model)).decoder
    with pytest.raises(SpecError, match="train.mesh.stage is 2: model.decoder.scan must be true"):
        decoder.in_stages(jnp.zeros((2, 3, 16)), None, None, Schedule(2, 1, 2))
