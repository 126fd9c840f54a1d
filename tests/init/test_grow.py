"""Models that grow from smaller ones: what they compute is unchanged where the method promises it."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from tiny_experiment import experiment

from batches import VOCABULARY, build, example
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.sliding import SlidingWindow
from polygpt.blocks.block import Layer
from polygpt.blocks.parallel import Parallel
from polygpt.blocks.sandwich import Sandwich
from polygpt.errors import UserError
from polygpt.init.grow import Grow
from polygpt.init.start import start
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.experts import MixtureOfExperts
from polygpt.nn.mlp import MLP, GatedMLP
from polygpt.nn.norms import LayerNorm
from polygpt.overrides import override
from polygpt.parameters import paths, tree_of
from polygpt.spec import to_json
from polygpt.training.loggers import Silent
from polygpt.training.loop import train
from polygpt.training.program import assemble
from polygpt.training.run import open_run

BATCH = build([[example(9)], [example(4), example(6)]], 12, adapters={})


def model_of(**fields):
    fields = {"width": 8, "depth": 2, "attention": MultiHead(heads=2), "mlp": MLP(factor=2.0)} | fields
    return bind(ModelSpec(DecoderSpec(**fields)), VOCABULARY)


class Held:
    """A source of arrays in memory."""

    origin, tokenizer = "runs/small, step 3", None

    def __init__(self, params):
        self.params = params
        self.shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()}

    def read(self, wanted):
        assert all(like.shape == self.shapes[name].shape for name, like in wanted.items())
        return {name: self.params[name] for name in wanted}


@dataclasses.dataclass(frozen=True)
class FromMemory(Grow):
    """Grows from a model in memory."""

    held: dict = dataclasses.field(default_factory=dict)
    config: dict = dataclasses.field(default_factory=dict)

    def open(self):
        return Held(self.held)

    def _config(self):
        return {"model": self.config}


def random_of(model):
    """Parameters of which none is 0."""
    params, rng = model.init(jax.random.key(0)), np.random.default_rng(0)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), params)


def grown(small, large, **fields):
    """The parameters of both models."""
    params = random_of(small)
    init = FromMemory(path="", held=paths(params), config=to_json(small.spec), **fields)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in paths(large.abstract()).items()
    }
    found = start(init, paths(large.traits), None)
    assert "runs/small, step 3, grown" in found.table
    return params, tree_of(found.read(target))


def logits(model, params):
    return jax.jit(lambda params: model.apply(params, BATCH).logits_BTV)(params)


PATTERN = {"pattern": (Layer(), Layer(attention=SlidingWindow(heads=2, window=3)))}
EXPERTS = MixtureOfExperts(experts=2, top_k=2, factor=1.0)
SANDWICH = {"block": Sandwich(), "norm": LayerNorm()}
PRESERVED = {
    "wider MLP": ({}, {"mlp": MLP(factor=5.0)}),
    "wider gate": ({"mlp": GatedMLP(factor=1.0)}, {"mlp": GatedMLP(factor=4.0)}),
    "wider experts": ({"mlp": EXPERTS}, {"mlp": EXPERTS.replace(factor=3.0)}),
    "wider, not scanned": ({"scan": False}, {"scan": False, "mlp": MLP(factor=5.0)}),
    "deeper": ({}, {"depth": 5}),
    "deeper, from one": ({"depth": 1}, {"depth": 3}),
    "deeper, in parallel": ({"block": Parallel()}, {"block": Parallel(), "depth": 4}),
    "deeper, sandwich": (SANDWICH, {**SANDWICH, "depth": 4}),
    "deeper, pattern": ({**PATTERN, "depth": 4}, {**PATTERN, "depth": 6}),
    "both": ({"norm": LayerNorm()}, {"norm": LayerNorm(), "depth": 4, "mlp": MLP(factor=3.0)}),
}


OFTEN = {"wider gate", "deeper, sandwich", "both"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in OFTEN else pytest.mark.slow) for case in PRESERVED]
)
def test_a_grown_model_computes_the_same(case):
    before, after = PRESERVED[case]
    small, large = model_of(**before), model_of(**after)
    params, more = grown(small, large)
    np.testing.assert_allclose(logits(large, more), logits(small, params), rtol=2e-5, atol=2e-6)


def test_copies_of_a_unit_get_different_gradients():
    small, large = model_of(), model_of(mlp=MLP(factor=5.0))
    _, more = grown(small, large)

    def loss(params):
        return jnp.square(large.apply(params, BATCH).logits_BTV).mean()

    gradient = jax.jit(jax.grad(loss))(more)["decoder"]["blocks"]["mlp"]["up"]["kernel"][0]
    columns = np.round(np.asarray(gradient / jnp.abs(gradient).max()), 6)
    assert len(np.unique(columns, axis=1).T) == columns.shape[1] == 40


def test_a_stack_is_repeated():
    small, large = model_of(), model_of(depth=5)
    params, more = (paths(tree) for tree in grown(small, large, depth="stack"))
    for name, value in params.items():
        expected = value[np.array([0, 1, 0, 1, 0])] if "/blocks/" in name else value
        np.testing.assert_array_equal(more[name], expected, err_msg=name)


REFUSED = {
    "narrower": ({"mlp": MLP(factor=4.0)}, {}, {}, "nothing shrinks: give the model at least the size"),
    "width": (
        {},
        {"width": 12},
        {},
        r"is \[2, 8, 8\], and .* is \[2, 12, 12\] in this model: only scanned layers and the hidden layers of MLPs "
        "grow, not width: keep it",
    ),
    "vocabulary": ({"tied": False}, {"tied": False, "width": 16}, {"include": "head"}, "not width"),
    "post-norm": (
        {"norm_placement": "post"},
        {"norm_placement": "post", "depth": 4},
        {},
        "init.depth is identity, but the blocks of decoder are post-norm: set init.depth to stack",
    ),
    "not scanned": ({"scan": False}, {"scan": False, "depth": 3}, {}, "nothing in .* fills decoder/blocks/2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_grow_is_one_line(case):
    before, after, fields, said = REFUSED[case]
    with pytest.raises(UserError, match=said) as error:
        grown(model_of(**before), model_of(**after), **fields)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_starts_from_a_smaller_run(tmp_path):
    changes = {"optim.accumulate": "1", "train.steps": "3", "train.evaluate_every": "null", "model.decoder.width": "8"}
    chosen = override(experiment(), changes)
    train(chosen, tmp_path / "small", lambda *_: [Silent()], on_message=lambda text: None)
    larger = override(chosen, {"model.decoder.depth": "3", "model.decoder.mlp.factor": "5.0"})
    larger = larger.replace(init=Grow(path=str(tmp_path / "small")))
    state = assemble(larger, larger.tokenizer.build().vocabulary).first_state()
    small, model = open_run(tmp_path / "small"), bind(larger.model, larger.tokenizer.build().vocabulary)
    np.testing.assert_allclose(logits(model, state.params), logits(small.model, small.params), rtol=2e-5, atol=2e-6)
    said = []
    train(larger, tmp_path / "large", lambda *_: [Silent()], on_message=said.append)
    assert "small, step 3, grown" in "\n".join(said)
