"""Optimizers, groups and weight decay by values."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batches import traits_of
from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.image import ImageAdapter
from polygpt.attention.mamba2 import Mamba2
from polygpt.errors import SpecError
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.optim.groups import Group
from polygpt.optim.optim import Optim
from polygpt.optim.optimizers import SGD, Adafactor, AdamW, Lion, Muon
from polygpt.optim.schedules import Constant, WarmupLinear
from polygpt.parameters import paths

LAYERS, IN, OUT = 3, 6, 4


@pytest.fixture
def params():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "decoder": {
            "embedding": normal(7, IN),
            "blocks": {"mlp": {"kernel": normal(LAYERS, IN, OUT), "bias": normal(LAYERS, OUT)}},
            "norm": {"scale": normal(IN)},
        },
        "adapters": {"image": {"kernel": normal(IN, IN)}},
    }


@pytest.fixture
def gradients(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)


def updates_of(optim, params, gradients, steps=1):
    """The update of the last of `steps` steps with the same parameters and gradients."""
    transformation = optim.build(traits_of(params), 10)
    state = transformation.init(params)
    for _ in range(steps):
        updates, state = transformation.update(gradients, state, params)
    return updates


def assert_close(tree, other, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), tree, other)


def test_adamw_is_its_formula_with_decay_on_kernels_alone(params, gradients):
    rate, decay, eps = 0.01, 0.3, 1e-8
    got = updates_of(Optim(Constant(rate), AdamW(weight_decay=decay), clip=None), params, gradients)

    def expected(decay):  # bias-corrected first step: m/sqrt(v) = g/|g|
        return lambda p, g: -rate * (g / (jnp.abs(g) + eps) + decay * p)

    want = jax.tree.map(expected(0.0), params, gradients)
    decayed = jax.tree.map(expected(decay), params, gradients)
    want["decoder"]["blocks"]["mlp"]["kernel"] = decayed["decoder"]["blocks"]["mlp"]["kernel"]
    want["adapters"] = decayed["adapters"]
    assert_close(got, want)


def test_lion_moves_by_the_sign(params, gradients):
    got = updates_of(Optim(Constant(0.01), Lion(weight_decay=0.0), clip=None), params, gradients)
    assert_close(got, jax.tree.map(lambda g: -0.01 * jnp.sign(g), gradients))


def test_adafactor_factors_the_second_moment():
    rng = np.random.default_rng(2)
    params = {"kernel": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)}
    gradient = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
    optim = Optim(Constant(0.1), Adafactor(weight_decay=0.5, min_factored=4, clip=1e9), clip=None)
    got = updates_of(optim, params, {"kernel": gradient})
    square = np.asarray(gradient, np.float64) ** 2  # the first step's decay 1 - 1 ** -0.8 is 0: the moment is g ** 2
    moment = square.mean(1, keepdims=True) * square.mean(0, keepdims=True) / square.mean()
    assert_close(got, {"kernel": -0.1 * (gradient / np.sqrt(moment) + 0.5 * params["kernel"])}, rtol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_sums_gradients_and_decays_beside_the_sum(params, gradients, momentum):
    rate, decay, steps = 0.1, 0.3, 3
    optim = Optim(Constant(rate), SGD(weight_decay=decay, momentum=momentum), clip=None)
    got = updates_of(optim, params, gradients, steps)
    summed = 1 + momentum + momentum**2  # the gradient is the same in all steps
    kernel, gradient = params["decoder"]["blocks"]["mlp"]["kernel"], gradients["decoder"]["blocks"]["mlp"]["kernel"]
    assert_close(got["decoder"]["blocks"]["mlp"]["kernel"], -rate * (summed * gradient + decay * kernel))
    assert_close(got["decoder"]["embedding"], -rate * summed * gradients["decoder"]["embedding"])


def newton_schulz(matrix):
    """Jordan et al. 2024, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_orthogonalises_each_layer_of_a_stacked_kernel(params, gradients):
    rate, decay = 0.1, 0.3
    got = updates_of(Optim(Constant(rate), Muon(weight_decay=decay), clip=None), params, gradients)
    kernel_LIO = got["decoder"]["blocks"]["mlp"]["kernel"]
    for layer in range(LAYERS):
        direction = newton_schulz(np.asarray(gradients["decoder"]["blocks"]["mlp"]["kernel"][layer], np.float64))
        before = params["decoder"]["blocks"]["mlp"]["kernel"][layer]
        want = -rate * (0.2 * np.sqrt(max(IN, OUT)) * direction + decay * before)
        np.testing.assert_allclose(kernel_LIO[layer], want, rtol=1e-3, atol=1e-5)
        singular = np.linalg.svd(np.asarray(kernel_LIO[layer] + rate * decay * before), compute_uv=False)
        assert np.all((singular / (rate * 0.2 * np.sqrt(IN)) > 0.5) & (singular / (rate * 0.2 * np.sqrt(IN)) < 1.5))


def test_muon_leaves_embeddings_norms_and_biases_to_adamw(params, gradients):
    got = updates_of(Optim(Constant(0.1), Muon(), clip=None), params, gradients, steps=3)
    want = updates_of(Optim(Constant(0.1), AdamW(), clip=None), params, gradients, steps=3)
    assert_close(got["decoder"]["embedding"], want["decoder"]["embedding"])
    assert_close(got["decoder"]["norm"], want["decoder"]["norm"])
    assert_close(got["decoder"]["blocks"]["mlp"]["bias"], want["decoder"]["blocks"]["mlp"]["bias"])
    assert not np.allclose(got["adapters"]["image"]["kernel"], want["adapters"]["image"]["kernel"], rtol=0.1)


def test_groups_set_factor_decay_schedule_and_freeze_and_the_first_match_wins(params, gradients):
    optim = Optim(
        Constant(0.01),
        AdamW(weight_decay=0.3),
        clip=None,
        groups=(
            Group("adapters/", freeze=True),
            Group("mlp/bias", learning_rate=0.1, weight_decay=0.5),
            Group("mlp", schedule=WarmupLinear(1.0, warmup=2, final=0.0)),
        ),
    )
    got = updates_of(optim, params, gradients)
    assert not np.any(got["adapters"]["image"]["kernel"])
    mlp, p, g = (tree["decoder"]["blocks"]["mlp"] for tree in (got, params, gradients))
    assert_close(mlp["bias"], -0.001 * (jnp.sign(g["bias"]) + 0.5 * p["bias"]))
    assert_close(mlp["kernel"], -0.5 * (jnp.sign(g["kernel"]) + 0.3 * p["kernel"]))
    assert_close(got["decoder"]["embedding"], -0.01 * jnp.sign(gradients["decoder"]["embedding"]))
    assert optim.trainable(traits_of(params))["adapters"]["image"]["kernel"] is False
    assert optim.trainable(traits_of(params))["decoder"]["embedding"] is True


def test_clipping_bounds_the_global_norm(params, gradients):
    def seen_norm(clip):  # Lion's momentum after one step is 0.01 times the gradient that reached it
        transformation = Optim(Constant(1.0), Lion(), clip=clip).build(traits_of(params), 10)
        _, state = transformation.update(gradients, transformation.init(params), params)
        return float(optax.tree.norm([leaf / 0.01 for leaf in jax.tree.leaves(state) if leaf.ndim]))

    norm = float(optax.tree.norm(gradients))
    assert seen_norm(0.5) == pytest.approx(0.5, rel=1e-5)
    assert seen_norm(2 * norm) == pytest.approx(norm, rel=1e-5) == pytest.approx(seen_norm(None), rel=1e-5)


def test_a_group_that_takes_nothing_is_an_error(params):
    with pytest.raises(SpecError, match="'encoder/' takes no parameter: paths look like adapters/image/kernel"):
        Optim(Constant(0.1), groups=(Group("encoder/"),)).build(traits_of(params), 10)
    with pytest.raises(SpecError, match="an earlier group takes decoder/blocks/mlp/bias"):
        Optim(Constant(0.1), groups=(Group("decoder"), Group("mlp"))).build(traits_of(params), 10)
    with pytest.raises(SpecError, match="freezes all that the model trains, so nothing learns"):
        Optim(Constant(0.1), groups=(Group("mlp", freeze=True), Group(".", freeze=True))).build(traits_of(params), 10)
    with pytest.raises(SpecError, match="regular expression"):
        Group("(")


def test_the_table_counts_what_each_rule_took(params):
    optim = Optim(Constant(0.1), groups=(Group("adapters/", freeze=True), Group("mlp", learning_rate=0.5)))
    lines = optim.table(traits_of(params)).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["adapters/", "frozen", "-", "1", "36"],
        ["mlp,", "not", "decayed", "0.5", "x", "schedule", "0", "1", "12"],
        ["mlp,", "decayed", "0.5", "x", "schedule", "0.1", "1", "72"],
        ["(all", "others)", "1", "x", "schedule", "0", "2", "48"],
    ]


def test_shapes_are_enough_to_build_and_to_count(params):
    shapes = jax.eval_shape(lambda: params)
    optim = Optim(Constant(0.1), Muon(), groups=(Group("adapters/", freeze=True),))
    assert optim.table(traits_of(shapes)) == optim.table(traits_of(params))
    built = optim.build(traits_of(shapes), 10)
    assert jax.tree.structure(jax.eval_shape(built.init, shapes)) == jax.tree.structure(built.init(params))


def test_muon_takes_all_kernels_but_the_heads():
    adapters = {"image": ImageAdapter(), "audio": AudioAdapter()}
    model = bind(ModelSpec(DecoderSpec(tied=False), adapters), 258)
    kernels = {name for name in paths(model.traits) if name.endswith("/kernel")}
    assert kernels - {name for name in kernels if re.search(Muon().matrices, name)} == {"head/kernel"}


def test_muon_leaves_depthwise_convolutions_to_adamw():
    model = bind(ModelSpec(DecoderSpec(width=16, depth=1, attention=Mamba2())), 31)
    convolutions = [path for path in paths(model.abstract()) if "convolve" in path and path.endswith("kernel")]
    assert convolutions and not any(re.search(Muon().matrices, path) for path in convolutions)
    assert re.search(Muon().matrices, "decoder/blocks/mlp/up/kernel")


def test_a_rewarm_needs_the_steps_after_which_it_begins():
    with pytest.raises(SpecError, match="rewarm is 5: it must be null without"):
        Optim(Constant(1e-3), rewarm=5)


def test_groups_with_a_schedule_of_their_own_keep_their_last_rate_too(params):
    """SGD-like steps of a unit gradient: after `schedule_steps`, all updates stay as they are."""
    groups = (Group("embedding", schedule=WarmupLinear(1.0, final=0.5)),)
    optim = Optim(WarmupLinear(2.0, final=0.25), SGD(0.0, momentum=0.0), None, groups=groups, schedule_steps=4)
    transformation = optim.build(traits_of(params), steps=8)
    state, ones = transformation.init(params), jax.tree.map(jnp.ones_like, params)
    for t, (own, others) in enumerate([(1, 2), (0.875, 1.625), (0.75, 1.25), (0.625, 0.875), *[(0.625, 0.875)] * 4]):
        updates, state = transformation.update(ones, state, params)
        np.testing.assert_allclose(updates["decoder"]["embedding"], -own, err_msg=f"step {t}")
        np.testing.assert_allclose(updates["decoder"]["norm"]["scale"], -others, err_msg=f"step {t}")
