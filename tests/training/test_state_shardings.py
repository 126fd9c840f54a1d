"""How the arrays of a state are split on a mesh: parameters by their axes, optimizer state like its parameter."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from polygpt.parameters import name_of
from polygpt.sharding import AXES, MeshLayout
from polygpt.training.parallel import state_shardings
from polygpt.training.state import State

LAYOUT = MeshLayout(AbstractMesh((1, 2, 2, 1, 1, 2), AXES))
"""data 2, fsdp 2, tensor 2; without devices."""
NAMES = {"decoder": {"kernel": ("width", "hidden"), "bias": ("hidden",)}, "text": {"table": ("vocabulary", "width")}}
SHAPES = {"decoder": {"kernel": (128, 256), "bias": (256,)}, "text": {"table": (130, 128)}}
SPLIT = {
    "decoder/kernel": PartitionSpec("fsdp", "tensor"),
    "decoder/bias": PartitionSpec("tensor"),
    "text/table": PartitionSpec("tensor", "fsdp"),
}


def partitioning(transformation) -> dict[str, PartitionSpec]:
    params = jax.tree.map(lambda shape: jnp.zeros(shape), SHAPES, is_leaf=lambda leaf: isinstance(leaf, tuple))
    zero = jnp.zeros((), jnp.int32)
    state = jax.eval_shape(lambda: State(zero, params, transformation.init(params), params, zero, zero))
    leaves = jax.tree_util.tree_leaves_with_path(state_shardings(state, NAMES, LAYOUT))
    return {name_of(path): place.spec for path, place in leaves}


@pytest.mark.parametrize("part", ["params", "ema", "opt_state/0/mu", "opt_state/0/nu"])
def test_parameters_their_average_and_moments_are_split_alike(part):
    found = partitioning(optax.adam(1e-3))
    assert {name: found[f"{part}/{name}"] for name in SPLIT} == SPLIT


def test_counters_are_on_every_device():
    found = partitioning(optax.adam(1e-3))
    assert {found[name] for name in ("step", "skipped", "skipped_in_row", "opt_state/0/count")} == {PartitionSpec()}


def test_a_factored_moment_is_split_like_the_axes_that_it_keeps():
    found = partitioning(optax.adafactor(1e-3))
    moments = {name: spec for name, spec in found.items() if name.endswith("decoder/kernel") and "/v_" in name}
    assert sorted(map(str, moments.values())) == sorted(map(str, (PartitionSpec("fsdp"), PartitionSpec("tensor"))))
