"""The way of losses from routed layers to the model's outputs: a stub whose losses can be counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from batches import ADAPTERS, TOWER, build, columns, example, lively, tiny
from polygpt.models.functional import bind
from polygpt.nn.losses import add
from polygpt.nn.mlp import FeedForward


@dataclasses.dataclass(frozen=True)
class Counting(FeedForward):
    """Its losses are the number of real positions, and the sum of squares of what it is given there."""

    routed = True

    def build(self, width, *, rngs, dtype, output_scale):
        return _Counting()


class _Counting(nnx.Module):
    def __call__(self, x_BTD, context):
        real_BT = (context.query.segment > 0).astype(jnp.float32)
        square = jnp.sum(real_BT[..., None] * jnp.square(x_BTD))
        return jnp.tanh(x_BTD), {"count": jnp.sum(real_BT), "square": square}


ROWS = [[example(4, ("image", 4), 1, seed=1), example(3, seed=2)], [example(("audio", 2), 2, seed=3)], []]
FORMS = [{}, {"scan": False}, {"remat": "full"}, {"scan": False, "remat": "dots"}, {"pattern": (None, None)}]


BATCH = build([[example(6, seed=1), example(3, seed=2)], [example(5, seed=3)]], 12, adapters={})


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_losses_of_all_blocks_are_summed(form):
    """Each real position counts once a block."""
    model = bind(tiny(adapters={}, mlp=Counting(), **form), 31)
    losses = jax.jit(model.apply)(lively(model), BATCH).losses
    assert losses["count"] == 2 * (6 + 3 + 5) and losses["square"] > 1


def test_the_losses_of_a_batch_that_is_cut_add_up():
    model = bind(tiny(adapters={}, mlp=Counting(), remat="full"), 31)
    params = lively(model)
    squares = jax.jit(jax.value_and_grad(lambda params, batch: model.apply(params, batch).losses["square"]))
    whole = squares(params, BATCH)
    halves = [squares(params, jax.tree.map(lambda x, b=b: x[b : b + 1], BATCH)) for b in (0, 1)]
    for got, *parts in zip(*map(jax.tree.leaves, (whole, *halves)), strict=True):
        np.testing.assert_allclose(got, np.sum(parts, axis=0), rtol=1e-4, atol=1e-3)


def test_towers_add_theirs():
    towers = {name: adapter.replace(tower=TOWER.replace(mlp=Counting())) for name, adapter in ADAPTERS.items()}
    model = bind(tiny(adapters=towers), 31)
    batch = build(ROWS, 14, adapters=towers)
    count = jax.jit(model.apply)(lively(model), batch).losses["count"]
    assert count == 4 + 2 * ADAPTERS["audio"].fold, "the real positions of the two items that are used"


def test_plain_layers_have_none_and_decoding_leaves_them_out():
    model = bind(tiny(adapters={}, mlp=Counting()), 31)
    batch = build([[example(6)]], 6, adapters={})
    params = lively(model)
    logits_BTV, _ = model.decode(params, columns(batch, 0, 6, media=False), model.init_cache(1, 6))
    np.testing.assert_allclose(logits_BTV, model.apply(params, batch).logits_BTV, rtol=0, atol=1e-5)
    plain = bind(tiny(adapters={}), 31)
    assert jax.eval_shape(plain.apply, plain.abstract(), batch).losses == {}


def test_names_that_some_parts_lack_count_as_nothing():
    assert add() == {} and add({}, {"a": 1.0}, {"a": 2.0, "b": 4.0}) == {"a": 3.0, "b": 4.0}
