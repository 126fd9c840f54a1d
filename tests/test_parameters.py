"""What parameters say of themselves: axes, decay, and how both survive stacking."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from batches import ADAPTERS, TOWER, build, example, tiny
from polygpt import parameters
from polygpt.adapters.base import Connector
from polygpt.attention.biases import BucketBias, LearnedBias
from polygpt.attention.contract import Dims
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.talking_heads import TalkingHeads
from polygpt.errors import SpecError
from polygpt.lab.catalogue import variants
from polygpt.lab.subject import Form
from polygpt.models.describe import describe
from polygpt.models.functional import bind
from polygpt.nn.mlp import FeedForward
from polygpt.nn.positions import Learned
from polygpt.objectives.loss import Loss
from polygpt.objectives.next_token import NextToken
from polygpt.optim.groups import Group
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import Constant
from polygpt.parameters import paths, stack
from polygpt.training.state import create
from polygpt.training.step import Recipe, make_step


class Mixed(nnx.Module):
    """A matrix, a vector, a number and an embedding that name nothing; a kernel that names its axes; a linear map."""

    def __init__(self, key):
        rngs = nnx.Rngs(key)
        self.matrix, self.vector = nnx.Param(jnp.ones((3, 4))), nnx.Param(jnp.ones(4))
        self.number, self.table = nnx.Param(jnp.ones(())), nnx.Embed(5, 3, rngs=rngs)
        self.kernel = nnx.Param(jnp.ones((3, 6)), axes=("width", "heads"))
        self.pair = nnx.Param(jnp.ones((2, 3)), decays=False, linear=True)
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs)])  # a name that a stack has too


OWN = {
    "matrix": (("width", None), True, False),
    "vector": ((None,), False, False),
    "number": ((), False, False),
    "table/embedding": (("width", None), False, False),
    "kernel": (("width", "heads"), True, True),
    "pair": (("width", None), False, True),
    "blocks/0/kernel": (("width", None), True, True),
    "blocks/0/bias": ((None,), False, False),
}


def told(module):
    return {
        name: (found.axes, found.decays, found.linear)
        for name, found in paths(nnx.to_pure_dict(parameters.traits(module))).items()
    }


def test_defaults_and_what_is_declared():
    assert told(nnx.eval_shape(lambda: Mixed(jax.random.key(0)))) == OWN


def test_stacked_parameters_have_one_axis_more_and_are_otherwise_as_before():
    def sets(key):
        return stack(Mixed, jax.random.split(key, 2))

    keys = jax.random.split(jax.random.key(0), 5)
    module = nnx.eval_shape(lambda: stack(sets, keys, "layers"))
    assert told(module) == {name: (("layers", None, *axes), *rest) for name, (axes, *rest) in OWN.items()}
    assert module.kernel.shape == (5, 2, 3, 6)


def test_axes_that_vmap_alone_has_added_have_no_name():
    module = nnx.eval_shape(lambda: nnx.vmap(Mixed)(jax.random.split(jax.random.key(0), 5)))
    assert told(module)["kernel"] == ((None, "width", "heads"), True, True)


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


# --- weight decay -----------------------------------------------------------------------------------------------------

TABLES = ("/table", "/after", "/before", "/u", "/v", "/vectors")
"""What has two axes of its own and does not decay: looked up, added to queries, or mixing heads."""


def decayed(model):
    return {name for name, rule in paths(Optim(Constant(1.0)).rules(model.traits)).items() if rule.weight_decay}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("variant", [*variants(), "none of them"], ids=lambda found: getattr(found, "__name__", found))
def test_kernels_decay_and_nothing_else_does(variant, scan):
    if variant == "none of them":
        fields = {"position": Learned(32), "attention": MultiHead(4, bias=True, scores=(BucketBias(), LearnedBias()))}
    else:
        fields = {"attention": variant()}
    adapters = {name: one.replace(tower=TOWER.replace(scan=scan)) for name, one in ADAPTERS.items()}
    adapters["norm"] = adapters.pop("image").replace(connector=Connector("mlp"))  # a name that must not matter
    model = bind(tiny(adapters=adapters, scan=scan, **fields), 31)
    assert decayed(model) == {name for name in paths(model.traits) if name.endswith("/kernel")}
    for name, found in paths(model.traits).items():
        stacked = sum(axis == "layers" for axis in found.axes) or ("tower/blocks/" in name and scan)
        assert len(found.shape) - stacked > 1 or name not in decayed(model), f"{name} is a vector"
        if name not in decayed(model) and len(found.shape) - stacked > 1:
            assert name.endswith(TABLES), name


def test_groups_and_no_decay_change_it():
    model = bind(tiny(adapters={}), 31)
    optim = Optim(
        Constant(1.0),
        no_decay="attention/",
        groups=(Group("mlp/up", weight_decay=0.0), Group("text/", weight_decay=0.2)),
    )
    rules = {name: rule.weight_decay for name, rule in paths(optim.rules(model.traits)).items()}
    assert {name.removeprefix("decoder/blocks/") for name, decay in rules.items() if decay} == {
        "mlp/gate/kernel", "mlp/down/kernel", "text/table",
    }  # fmt: skip


# --- what is not trained ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Averaging(FeedForward):
    """A layer with BatchNorm, a table of whole numbers, and whatever `extra` says."""

    extra: str = ""

    def hidden_width(self, width):
        return width

    def build(self, width, *, rngs, dtype, output_scale):
        return Averaged(self, width, rngs)


class Averaged(nnx.Module):
    def __init__(self, spec, width, rngs):
        self.spec, self.norm = spec, nnx.BatchNorm(width, rngs=rngs)
        self.norm.mean[...] = jax.random.normal(rngs.params(), width)
        self.order = nnx.Variable(jnp.arange(width)[::-1] + 2**24 - width + 1)  # float32 does not hold all of them
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs if spec.extra == "stream" else None)

    def __call__(self, x_BTD):
        x_BTD = self.norm(x_BTD, use_running_average=self.spec.extra != "statistics")
        x_BTD = x_BTD[..., self.order[...] - 2**24 + x_BTD.shape[-1] - 1]
        return self.linear(self.dropout(x_BTD, deterministic=self.spec.extra != "stream"))


BLOCKS = {"scanned": {}, "recomputed": {"remat": "full"}, "one by one": {"scan": False, "remat": "full"}}


@pytest.mark.parametrize("fields", [{}, {"scan": False, "remat": "full"}], ids=["scanned", "one by one"])
def test_constants_are_kept_to_the_bit_and_parameters_train(fields):
    model = bind(tiny(adapters={}, mlp=Averaging(), **fields), 31)
    optim, batch = Optim(Constant(0.01), accumulate=2, ema=0.9), build([[example(9)]] * 2, 12, adapters={})
    transformation = optim.build(model.traits, 5)
    loss = Loss(model, {"next": (NextToken(), 1.0)}, optim.trainable(model.traits), accumulate=2)
    recipe = Recipe(loss, transformation, optim.learning_rate(5), ema=0.9)
    first = create(model, transformation, 0, ema=True)
    state, step = first, jax.jit(make_step(recipe))
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
    start, end, average = paths(first.params), paths(state.params), paths(state.ema)
    constants = {name for name in start if name.endswith(("norm/mean", "norm/var", "mlp/order")) and "mlp/" in name}
    assert len(constants) == (6 if fields.get("scan") is False else 3)
    for name in start:
        assert np.array_equal(start[name], end[name]) == (name in constants), name
        assert name not in constants or np.array_equal(start[name], average[name]), name
    assert not any(path for path in paths(state.opt_state) if path.endswith("mlp/norm/mean")), "it has no moments"
    counted = sum(leaf.size for name, leaf in start.items() if name not in constants)
    assert describe(model.spec, 31, 12).parameters == counted
    assert "(not trained)" in optim.table(model.traits)


@pytest.mark.parametrize("fields", BLOCKS.values(), ids=BLOCKS)
def test_a_forward_pass_that_changes_statistics_is_refused(fields):
    model = bind(tiny(adapters={}, mlp=Averaging("statistics"), **fields), 31)
    with pytest.raises(SpecError, match="changes .*norm/mean, which is not an nnx.Param"):
        jax.eval_shape(model.apply, model.abstract(), build([[example(9)]], 12, adapters={}))


class Forgetful(MultiHead):
    """Attention with a dropout that keeps a random stream of its own."""

    def build(self, dims, rngs):
        module = super().build(dims, rngs)
        module.dropout = nnx.Dropout(0.5, rngs=rngs)
        return module


def test_random_streams_are_refused_in_models_and_in_the_lab():
    with pytest.raises(SpecError, match="mlp/dropout/rngs/.* holds the state of a random stream"):
        bind(tiny(adapters={}, mlp=Averaging("stream")), 31)
    with pytest.raises(SpecError, match="dropout/rngs/.* holds the state of a random stream"):
        Form(Forgetful(2), Dims(8))
