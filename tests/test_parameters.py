"""What parameters say of themselves: axes, decay, and how both survive stacking."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from batches import ADAPTERS, TOWER, tiny
from polygpt import parameters
from polygpt.attention.talking_heads import TalkingHeads
from polygpt.errors import SpecError
from polygpt.models.functional import bind
from polygpt.parameters import paths, stack


class Mixed(nnx.Module):
    """A matrix, a vector, a number and an embedding that name nothing; a kernel that names its axes."""

    def __init__(self, key):
        rngs = nnx.Rngs(key)
        self.matrix, self.vector = nnx.Param(jnp.ones((3, 4))), nnx.Param(jnp.ones(4))
        self.number, self.table = nnx.Param(jnp.ones(())), nnx.Embed(5, 3, rngs=rngs)
        self.kernel = nnx.Param(jnp.ones((3, 6)), axes=("width", "heads"))
        self.pair = nnx.Param(jnp.ones((2, 3)), decays=False)
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs)])  # a name that a stack has too


OWN = {
    "matrix": (("width", None), True),
    "vector": ((None,), False),
    "number": ((), False),
    "table/embedding": (("width", None), False),
    "kernel": (("width", "heads"), True),
    "pair": (("width", None), False),
    "blocks/0/kernel": (("width", None), True),
    "blocks/0/bias": ((None,), False),
}


def told(module):
    return {
        name: (found.axes, found.decays) for name, found in paths(nnx.to_pure_dict(parameters.traits(module))).items()
    }


def test_defaults_and_what_is_declared():
    assert told(nnx.eval_shape(lambda: Mixed(jax.random.key(0)))) == OWN


def test_stacked_parameters_have_one_axis_more_and_decay_as_before():
    def sets(key):
        return stack(Mixed, jax.random.split(key, 2))

    keys = jax.random.split(jax.random.key(0), 5)
    module = nnx.eval_shape(lambda: stack(sets, keys, "layers"))
    assert told(module) == {name: (("layers", None, *axes), decays) for name, (axes, decays) in OWN.items()}
    assert module.kernel.shape == (5, 2, 3, 6)


def test_axes_that_vmap_alone_has_added_have_no_name():
    module = nnx.eval_shape(lambda: nnx.vmap(Mixed)(jax.random.split(jax.random.key(0), 5)))
    assert told(module)["kernel"] == ((None, "width", "heads"), True)


def test_more_names_than_axes_are_refused():
    module = nnx.List([nnx.Param(jnp.ones(3), axes=("width", "heads"))])
    with pytest.raises(SpecError, match="0 has 1 axes but names 2"):
        parameters.traits(module)


@pytest.mark.parametrize("scan", [True, False])
def test_blocks_of_towers_and_decoders_are_split_alike_scanned_or_not(scan):
    tower = TOWER.replace(attention=TalkingHeads(2), scan=scan)
    adapters = {"decoder": ADAPTERS["image"].replace(tower=tower)}  # a name that must not matter
    axes = paths_of_axes(bind(tiny(adapters=adapters, attention=TalkingHeads(2), scan=scan), 31))
    block = "blocks/attention/before" if scan else "blocks/0/attention/before"
    assert axes[f"adapters/decoder/tower/{block}"] == ((None,) if scan else ()) + ("width", None)
    assert axes[f"decoder/{block}"] == (("layers",) if scan else ()) + ("width", None)


def paths_of_axes(model):
    return {name: found.axes for name, found in paths(model.traits).items()}
