"""What a block keeps for the backward pass, by `StackSpec.remat`, and what it computes again."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from batches import build, example, lively, tiny
from equations import equations
from polygpt import sharding
from polygpt.attention.kernels import dispatch
from polygpt.attention.multi_head import MultiHead
from polygpt.models.functional import bind
from polygpt.nn.experts import MixtureOfExperts

T, DEPTH, HEADS = 384, 2, 4
BATCH = build([[example(200, seed=1), example(170, seed=2)]], T, adapters={})


@functools.cache
def loss(remat, backend, **options):
    """The loss of a decoder as a function of its parameters, and parameters for it."""
    attention = MultiHead(HEADS, backend=backend, strict=True)
    model = bind(tiny(adapters={}, depth=DEPTH, attention=attention, scan=False, remat=remat, **options), 31)
    return lambda params: jnp.sum(model.apply(params, BATCH).logits_BTV), lively(model)


def kept(loss, params) -> list[tuple[int, ...]]:
    """The shapes of the arrays that the forward pass hands to the backward pass."""
    return [x.shape for x in jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params))]


def loops(loss, params) -> int:
    """The number of loops and kernels in the step: attention has all of them."""
    return sum(line.primitive.name in ("pallas_call", "while", "scan") for line in equations(jax.grad(loss), params))


@pytest.mark.parametrize("backend", ["reference", "chunked", "flex"])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_no_scores_or_weights_are_kept(remat, backend):
    """The mask, which all blocks and heads share, is kept by the backend that needs it as an array."""
    scores = (1, HEADS, T, T)
    assert scores in kept(*loss("none", "reference")) and scores not in kept(*loss(remat, backend))
    assert {shape for shape in kept(*loss(remat, backend)) if shape[-2:] == (T, T)} <= {(1, 1, T, T)}


@pytest.mark.parametrize("backend", ["chunked", "flex"])
def test_dots_keeps_the_results_of_attention_instead_of_computing_them_again(backend):
    once, again = (loops(*loss(remat, backend)) for remat in ("none", "full"))
    assert loops(*loss("dots", backend)) == once < again
    shapes = kept(*loss("dots", backend))
    assert shapes.count((1, HEADS, T, 4)) >= DEPTH, "outputs"


@pytest.mark.parametrize("context", ["gather", "ring"])
def test_dots_keeps_the_results_of_attention_over_split_positions(context):
    sizes = [2 if axis == "sequence" else 1 for axis in sharding.AXES]
    mesh = AbstractMesh(tuple(sizes), sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))
    layout = sharding.MeshLayout(mesh, sharding.MeshSpec(sequence=2, context=context))

    def split(remat):
        function, params = loss(remat, "chunked")
        with sharding.use_layout(layout), dispatch.in_blocks_of(64):
            return loops(function, params)

    assert split("dots") == split("none") < split("full")


def test_dots_keeps_the_products_of_experts():
    mlp = MixtureOfExperts(experts=3, top_k=2)
    product = (2 * T, mlp.hidden_width(16))
    shapes = {remat: kept(*loss(remat, "chunked", mlp=mlp)) for remat in ("dots", "full")}
    assert shapes["dots"].count(product) >= 2 * DEPTH and product not in shapes["full"], "gate and up"
