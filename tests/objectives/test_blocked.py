"""Losses without the logits of a whole batch equal those with them, and take the memory of a block."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from batches import build, example, lively, tiny
from equations import equations
from polygpt import sharding
from polygpt.attention.multi_head import MultiHead
from polygpt.evaluation.likelihood import token_scores
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.objectives import blocked
from polygpt.objectives.base import TokenObjective, depends_on_scores_only
from polygpt.objectives.blocked import Head
from polygpt.objectives.distillation import Distillation
from polygpt.objectives.focal import Focal
from polygpt.objectives.loss import Loss
from polygpt.objectives.next_token import NextToken
from polygpt.objectives.z_loss import ZLoss

B, T, D, V = 3, 13, 16, 37
OBJECTIVES = {"next_token": NextToken(), "smooth": NextToken(label_smoothing=0.2), "z": ZLoss(), "focal": Focal()}
SHARES = {"next_token": 0.7, "smooth": 0.2, "z": 0.05, "focal": 0.3}
HEADS = {"tied": (("vocabulary", "width"), 0.5), "own": (("width", "vocabulary"), 1.0)}


@pytest.fixture
def batch():
    rng = np.random.default_rng(1)
    weight_BT = rng.choice([0.0, 0.5, 1.0, -0.5], size=(B, T)).astype(np.float32)
    weight_BT[-1] = 0.0  # a padding row
    return SimpleNamespace(target_BT=rng.integers(0, V, (B, T), np.int32), weight_BT=weight_BT)


def given(kind, dtype="float32"):
    """Hidden vectors, the weight of the head, and how they become a head."""
    rng, (axes, multiplier) = np.random.default_rng(0), HEADS[kind]
    hidden_BTD = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    weight = jnp.asarray(rng.normal(size=(V, D) if axes[0] == "vocabulary" else (D, V)) / 2, jnp.float32)
    return hidden_BTD, weight, lambda weight: Head(weight, axes, multiplier, dtype)


def plain(hidden_BTD, head, batch):
    """The same losses from all logits."""
    logits_BTV = jnp.einsum(
        f"btd,{head.letters}->btv", hidden_BTD, head.weight.astype(head.dtype), preferred_element_type=jnp.float32
    )
    outputs = SimpleNamespace(logits_BTV=logits_BTV * head.multiplier)
    totals = {name: objective.total(outputs, batch) for name, objective in OBJECTIVES.items()}
    return sum(SHARES[name] * total for name, total in totals.items()), totals


@pytest.mark.parametrize("block", [1, 7, 12, 10_000])
@pytest.mark.parametrize("kind, dtype", [("tied", "float32"), ("own", "float32"), ("own", "bfloat16")])
def test_values_and_gradients_are_those_from_all_logits(kind, dtype, block, batch):
    hidden_BTD, weight, head = given(kind, dtype)

    def ours(hidden_BTD, weight):
        return blocked.token_losses(OBJECTIVES, SHARES, hidden_BTD, head(weight), batch, block)

    def theirs(hidden_BTD, weight):
        return plain(hidden_BTD, head(weight), batch)

    (value, totals), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden_BTD, weight)
    (expected, expected_totals), reference = jax.value_and_grad(theirs, (0, 1), has_aux=True)(hidden_BTD, weight)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(ours)(hidden_BTD, weight)[0], expected, rtol=1e-6)
    for name, total in totals.items():
        np.testing.assert_allclose(total, expected_totals[name], rtol=1e-6, err_msg=name)
    # Both round products to the compute dtype, in different places.
    off = 1e-6 if dtype == "float32" else 2**-8
    for ours, theirs in zip(gradients, reference, strict=True):
        assert ours.dtype == theirs.dtype
        gap = np.linalg.norm(np.float64(ours) - np.float64(theirs)) / np.linalg.norm(np.float64(theirs))
        assert gap < off, gap


def test_gradients_in_bfloat16_have_its_rounding_error_and_no_float32_copy_of_the_head(batch):
    hidden_BTD, weight, head = given("own", "bfloat16")
    exact = given("own", "float32")[2]
    rounded = hidden_BTD.astype("float32"), weight.astype("bfloat16").astype("float32")
    expected = jax.grad(lambda x, w: plain(x, exact(w), batch)[0], (0, 1))(*rounded)

    def ours(hidden_BTD, weight):
        return blocked.token_losses(OBJECTIVES, SHARES, hidden_BTD, head(weight), batch, 8)[0]

    for got, of in zip(jax.grad(ours, (0, 1))(hidden_BTD, weight), expected, strict=True):
        assert np.linalg.norm(np.float32(got) - of) < 2**-8 * np.linalg.norm(of)
    lines = equations(jax.grad(ours), hidden_BTD, weight)
    factors = [[x.aval for x in line.invars] for line in lines if line.primitive.name == "dot_general"]
    matrices = [x.dtype.name for pair in factors if pair[0].ndim == 2 for x in pair]
    assert matrices == 6 * ["bfloat16"], "logits, and the gradients of both factors"


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e38])
def test_positions_without_weight_reach_neither_sum_nor_gradient(garbage, batch):
    hidden_BTD, weight, head = given("tied")
    dirty_BTD = jnp.where((batch.weight_BT == 0)[..., None], garbage, hidden_BTD)

    @jax.jit
    def loss(hidden_BTD, weight):
        return blocked.token_losses(OBJECTIVES, SHARES, hidden_BTD, head(weight), batch, 8)[0]

    clean, dirty = (jax.value_and_grad(loss, (0, 1))(x, weight) for x in (hidden_BTD, dirty_BTD))
    for ours, theirs in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.any(np.asarray(clean[1][0])[batch.weight_BT == 0]) and np.any(clean[1][0])


def test_an_objective_with_a_total_of_its_own_reads_all_logits():
    class Own(NextToken):
        def total(self, outputs, batch):
            return 2 * super().total(outputs, batch)

    class Fewer(TokenObjective):
        def per_token(self, scores):
            return scores.log_z

    assert [depends_on_scores_only(o) for o in (NextToken(), ZLoss(), Fewer(), Own())] == [True, True, True, False]


@pytest.mark.parametrize("tied", [True, False])
def test_scores_and_most_likely_tokens_are_those_from_all_logits(tied):
    batch = build([(example(9, ("image", 4), 6, seed=1),), (example(3, seed=2), example(12, seed=3))], 32)
    spec = tiny(tied=tied)
    model = bind(spec, 31)
    params = lively(model)
    whole_BT = token_scores(model, params, batch)
    block_BT = token_scores(bind(spec.replace(logits_block=5), 31), params, batch)
    np.testing.assert_allclose(block_BT[0], whole_BT[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(block_BT[1], whole_BT[1])
    assert np.any(whole_BT[0])


@pytest.mark.parametrize("block, blocks", [(12, 4), (1, 13), (10_000, 1)])
def test_a_length_without_divisors_is_cut_into_as_few_blocks(block, blocks, batch):
    hidden_BTD, weight, head = given("tied")

    def value(hidden_BTD):
        return blocked.token_losses(OBJECTIVES, SHARES, hidden_BTD, head(weight), batch, block)[0]

    text = str(jax.make_jaxpr(jax.grad(value))(hidden_BTD))
    assert re.findall(r"length=(\d+)", text) == [str(blocks)]


def test_automatic_blocks_hold_64_mib_of_logits_and_small_batches_are_not_cut():
    assert blocked.block_size("auto", 8, 1024, 50_304, 256) == 2**24 // 50_304 == 333
    assert blocked.block_size("auto", 8, 512, 4096, 1) is None and blocked.block_size("auto", 1, 4098, 4096, 1) == 4096
    assert blocked.block_size("auto", 1, 3, 2**25, 1) == 1
    assert [blocked.block_size(block, 8, 1024, 50_304, 256) for block in (None, 7)] == [None, 7]
    for axis, size in {"tensor": 333 * 2 + 1, "fsdp": 333}.items():  # splits the vocabulary, or the width
        sizes = tuple(2 if name == axis else 1 for name in sharding.AXES)
        mesh = AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))
        with sharding.use_layout(sharding.MeshLayout(mesh)):
            assert blocked.block_size("auto", 16, 1024, 50_304, 256) == size
    many, few = (blocked.block_size("auto", 1, positions, 50_304, 5120) for positions in (10_241, 10_240))
    assert many == 5120 and few is None, "the head and its gradient take as much as the logits of 5,120 positions"


def test_by_default_training_never_has_all_logits_of_a_large_vocabulary():
    """By the shapes of all arrays in the loss and its gradient, for losses of scores and of whole distributions."""
    rows, length, vocabulary = 8, 64, 50_304
    batch = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.tile(x[:, :1], (rows, length)), build([()], 1)))

    def largest(**changes):
        model = bind(
            ModelSpec(DecoderSpec(width=16, depth=1, attention=MultiHead(heads=2))).replace(**changes), vocabulary
        )
        objectives = {"next_token": NextToken(), "focal": Focal(), "average": Distillation("average")}
        weighted = {name: (objective, 1.0) for name, objective in objectives.items()}
        loss = Loss(model, weighted, jax.tree.map(lambda own: True, model.traits), logits_block=model.spec.logits_block)
        given = model.abstract(), {"average": model.abstract()}, (batch,)
        text = str(jax.make_jaxpr(lambda *given: loss.gradient(*given, dict.fromkeys(objectives, 1.0), None))(*given))
        return max(np.prod(list(map(int, shape.split(",")))) for shape in re.findall(r"\[(\d+(?:,\d+)*)\]", text))

    assert largest(logits_block=None) >= rows * length * vocabulary
    assert largest() <= blocked.AUTOMATIC


def test_the_first_of_equally_likely_tokens_is_the_most_likely():
    weight = jnp.asarray([[0.0], [1.0], [1.0], [-1.0]])
    hidden_BTD, head = jnp.ones((1, 4, 1)), Head(weight, ("vocabulary", "width"))
    _, best_BT = blocked.token_scores(hidden_BTD, head, jnp.zeros((1, 4), jnp.int32), 2)
    assert best_BT.tolist() == [[1] * 4]


def test_a_large_vocabulary_takes_less_than_a_tenth_of_the_memory_of_all_logits():
    """V 50,304, T 1,024, B 8; the memory is what the compiler allocates besides arguments and results."""
    rows, length, width, vocabulary = 8, 1024, 64, 50_304
    batch = SimpleNamespace(
        target_BT=jax.ShapeDtypeStruct((rows, length), jnp.int32),
        weight_BT=jax.ShapeDtypeStruct((rows, length), jnp.float32),
    )
    arguments = (
        jax.ShapeDtypeStruct((rows, length, width), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
        batch.target_BT,
        batch.weight_BT,
    )

    def memory(loss):
        def value(hidden_BTD, weight, target_BT, weight_BT):
            inner = SimpleNamespace(target_BT=target_BT, weight_BT=weight_BT)
            return loss(hidden_BTD, Head(weight, ("vocabulary", "width")), inner)[0]

        program = jax.jit(jax.value_and_grad(value, (0, 1))).lower(*arguments).compile()
        return program.memory_analysis().temp_size_in_bytes

    ours = memory(lambda *given: blocked.token_losses(OBJECTIVES, SHARES, *given, 256))
    assert ours < 0.1 * memory(plain)
