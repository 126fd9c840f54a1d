"""Groups of layers: the same updates with stacked parameters as with one parameter per layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import VOCABULARY, build, example
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.sliding import SlidingWindow
from polygpt.errors import SpecError
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.objectives.loss import Loss
from polygpt.objectives.next_token import NextToken
from polygpt.optim.groups import Group
from polygpt.optim.optim import Optim
from polygpt.optim.optimizers import SGD, AdamW, Lion, Muon
from polygpt.optim.schedules import Constant
from polygpt.parameters import SomeLayers, Traits, paths

DEPTH = 4
GROUPS = (
    Group("blocks/.*kernel", layers=(0, 2), freeze=True),
    Group("blocks", layers=(1, 3), learning_rate=0.5, weight_decay=0.3),
    Group("blocks", layer_decay=0.5),
)


def model_of(scan=True, depth=DEPTH, **fields):
    fields = {"attention": MultiHead(heads=2)} | fields
    return bind(ModelSpec(DecoderSpec(width=8, depth=depth, scan=scan, **fields)), VOCABULARY)


def one_by_one(params):
    """The parameters with one entry per layer, in the form of a stack that is not scanned."""
    blocks = params["decoder"]["blocks"]
    layers = {str(i): jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(DEPTH)}
    return {**params, "decoder": {**params["decoder"], "blocks": layers}}


@pytest.mark.parametrize("optimizer", [AdamW(), SGD(), Lion(), Muon()], ids=lambda found: type(found).__name__)
def test_stacked_layers_are_updated_like_separate_ones(optimizer):
    stacked, separate = model_of(), model_of(scan=False)
    optim, rng = Optim(Constant(0.1), optimizer, groups=GROUPS), np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), stacked.abstract())

    def updates(model, params, gradients):
        transformation = optim.build(model.traits, 10)

        @jax.jit
        def two_steps(params, gradients):
            state = transformation.init(params)
            _, state = transformation.update(gradients, state, params)
            return transformation.update(gradients, state, params)[0]

        return two_steps(params, gradients)

    def masked(gradient, train):
        if not isinstance(train, SomeLayers):
            return gradient * train
        return gradient * np.reshape(train.trained, (-1, *[1] * (gradient.ndim - 1)))

    gradients = jax.tree.map(lambda x: 0.1 * x[::-1], params)
    gradients = jax.tree.map(masked, gradients, optim.trainable(stacked.traits))
    ours = one_by_one(updates(stacked, params, gradients))
    others = updates(separate, one_by_one(params), one_by_one(gradients))
    for name, update in paths(ours).items():
        np.testing.assert_allclose(update, paths(others)[name], rtol=1e-5, atol=1e-7, err_msg=name)
    kernels = ours["decoder"]["blocks"]
    assert not np.any(kernels["1"]["attention"]["query"]["kernel"])
    assert np.all(kernels["2"]["attention"]["query"]["kernel"])


def test_frozen_layers_have_no_gradient():
    model = model_of()
    optim = Optim(Constant(0.1), groups=(Group("blocks", layers=(0, 3), freeze=True),))
    params = model.init(jax.random.key(0))
    batch = build([[example(9)]], 10, adapters={})
    loss = Loss(model, {"next": (NextToken(), 1.0)}, optim.trainable(model.traits))
    whole = Loss(model, {"next": (NextToken(), 1.0)}, Optim(Constant(0.1)).trainable(model.traits))

    def gradient(loss):
        seen = loss.seen(batch, jax.random.key(1))
        return loss.gradient(params, {}, seen, loss.weights(seen), None, lambda x: x, shards=1)[1]

    found, expected = (jax.jit(lambda one=one: gradient(one))() for one in (loss, whole))
    for name, value in paths(found).items():
        frozen = 3 if "blocks" in name else 0
        assert not np.any(value[:frozen]), name
        np.testing.assert_allclose(value[frozen:], paths(expected)[name][frozen:], rtol=1e-4, atol=1e-7, err_msg=name)


def test_layers_are_numbered_through_patterns():
    pattern = (MultiHead(heads=2), SlidingWindow(heads=2, window=4))
    for scan in (True, False):
        traits = paths(model_of(scan, pattern=pattern).traits)
        held = {name.split("/")[2]: own.layers for name, own in traits.items() if name.endswith("query/kernel")}
        assert held == ({"0": (0, 2), "1": (1, 3)} if scan else {str(i): (i,) for i in range(DEPTH)})
        assert {own.depth for name, own in traits.items() if "blocks" in name} == {DEPTH}
    assert traits["text/table"].layers == ()


def test_the_table_shows_layers():
    model = model_of()
    optim = Optim(Constant(0.1), groups=(Group("blocks", layers=(0, 1), freeze=True), Group("", layer_decay=0.9)))
    said = optim.table(model.traits)
    assert "blocks, layer 0" in said and "1 x 0.9^(L - layer) x schedule" in said
    rules = paths(optim.rules(model.traits))["decoder/blocks/attention/query/kernel"].parts
    assert [(begin, end, rule.layer_factor) for begin, end, rule in rules] == [
        (0, 1, 1.0),
        *((layer, layer + 1, pytest.approx(0.9 ** (DEPTH - layer))) for layer in range(1, DEPTH)),
    ]


@pytest.mark.parametrize(
    "group, said",
    [
        (Group("blocks", layers=(4, 6)), r"takes nothing in the layers \[4, 6\]: there are the layers 0 to 3"),
        (Group("text", layers=(0, 1)), r"takes nothing in the layers \[0, 1\]: text/table is in no stack"),
        (Group("text", layer_decay=0.5), "has a layer_decay and takes no stacked layer"),
    ],
)
def test_a_range_that_meets_nothing_is_an_error(group, said):
    with pytest.raises(SpecError, match=f"the group '{group.pattern}' {said}"):
        Optim(Constant(0.1), groups=(group,)).rules(model_of().traits)


def test_traits_of_arrays_outside_of_stacks_have_no_layers():
    assert Traits((3,), (None,), False).layers == ()
