"""How blocks are joined: parallel, sandwich, a user's own; patterns of layers; stochastic depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from batches import build, columns, example, lively, tiny
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.block import BlockSpec, Layer, Sequential
from polygpt.blocks.parallel import Parallel
from polygpt.blocks.sandwich import Sandwich
from polygpt.blocks.stack import StackSpec
from polygpt.errors import SpecError
from polygpt.models.describe import describe
from polygpt.models.functional import bind
from polygpt.nn.experts import MixtureOfExperts
from polygpt.nn.mlp import MLP
from polygpt.nn.norms import LayerNorm, RMSNorm
from polygpt.overrides import override
from polygpt.parameters import paths
from polygpt.spec import from_json, to_json

T = 12
ROWS = [[example(7, seed=1), example(4, seed=2)], [example(12, seed=3)]]
BATCH = build(ROWS, T, adapters={})
FORMS = {
    "parallel": {"block": Parallel()},
    "two norms": {"block": Parallel(shared_norm=False)},
    "sandwich": {"block": Sandwich()},
    "experts every second": {"pattern": (None, Layer(mlp=MixtureOfExperts(experts=3, top_k=2)))},
    "mixed": {"pattern": (MultiHead(4), Layer(block=Parallel()), Layer(norm=LayerNorm(), mlp=MLP(), block=Sandwich()))},
}


def model_of(form, depth=6, **fields):
    return bind(tiny(adapters={}, depth=depth, **FORMS[form], **fields), 31)


@dataclasses.dataclass(frozen=True)
class Plain(BlockSpec):
    """A user's own block: attention alone, without norms."""

    def build(self, parts, rngs):
        return PlainBlock(parts, rngs)


class PlainBlock(nnx.Module):
    def __init__(self, parts, rngs):
        self.mix = parts.attention.build(parts.dims, rngs)

    def __call__(self, x_BTD, context, cache=None, key=None):
        y_BTD, cache = self.mix(x_BTD, context, cache)
        return x_BTD + y_BTD, cache, {}


FORMS["own"] = {"block": Plain()}


def normalised(x, scale):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6) * scale


@pytest.mark.parametrize("form", ["parallel", "two norms", "sandwich"])
def test_a_block_is_the_formula(form):
    """In float64, with attention and feed-forward layer of their own tests."""
    model = model_of(form, depth=1, scan=False)
    params = lively(model, scale=0.3)
    with model._merged(params) as module:
        block, context = module.decoder.blocks[0], module.decoder._context(BATCH, None)[0]
        x_BTD = jax.random.normal(jax.random.key(0), (2, T, 16))
        y_BTD = block(x_BTD, context)[0]
        scale = {name: np.asarray(leaf) for name, leaf in paths(params["decoder"]["blocks"]["0"]).items()}
        x = np.asarray(x_BTD, np.float64)

        def norm(name, x):
            return normalised(x, scale[f"{name}/scale"])

        def attention(x):
            return np.asarray(block.attention(jnp.asarray(x, jnp.float32), context)[0], np.float64)

        def mlp(x):
            return np.asarray(block.mlp(jnp.asarray(x, jnp.float32)), np.float64)

        if form == "sandwich":
            x = x + norm("attention_output_norm", attention(norm("attention_norm", x)))
            expected = x + norm("mlp_output_norm", mlp(norm("mlp_norm", x)))
        else:
            other = "attention_norm" if form == "parallel" else "mlp_norm"
            expected = x + attention(norm("attention_norm", x)) + mlp(norm(other, x))
    np.testing.assert_allclose(y_BTD, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_scanned_equals_unrolled_and_decoding_equals_reading(form):
    model = model_of(form)
    params, p = lively(model, scale=0.2), len(model.spec.decoder.period())
    unrolled = bind(model.spec.replace(decoder=model.spec.decoder.replace(scan=False)), 31)
    blocks = params["decoder"]["blocks"]

    def block(layer):
        return jax.tree.map(lambda leaf: leaf[layer // p], blocks if p == 1 else blocks[str(layer % p)])

    own = {**params, "decoder": {**params["decoder"], "blocks": {str(layer): block(layer) for layer in range(6)}}}
    assert paths(unrolled.abstract()).keys() == paths(own).keys()
    logits_BTV = jax.jit(model.apply)(params, BATCH).logits_BTV
    np.testing.assert_allclose(logits_BTV, jax.jit(unrolled.apply)(own, BATCH).logits_BTV, rtol=0, atol=2e-5)

    row, cache, found = jax.tree.map(lambda x: x[1:], BATCH), model.init_cache(1, T), []
    decode = jax.jit(model.decode)
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, 12)):
        logits, cache = decode(params, columns(row, start, stop, media=False), cache)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1)[0], logits_BTV[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_no_position_sees_later_ones_or_other_examples(form):
    model = model_of(form)
    params = lively(model, scale=0.2)
    before = np.asarray(jax.jit(model.apply)(params, BATCH).hidden_BTD)
    tokens_BT = BATCH.tokens_BT.copy()
    tokens_BT[0, 5], tokens_BT[1, 6] = 1, 2
    after = np.asarray(jax.jit(model.apply)(params, BATCH.replace(tokens_BT=tokens_BT)).hidden_BTD)
    moved_BT = np.abs(after - before).max(axis=-1) > 0
    expected_BT = np.zeros((2, T), bool)
    expected_BT[0, 5:7] = expected_BT[1, 6:] = True
    assert not moved_BT[~expected_BT].any() and moved_BT[expected_BT].all()


def test_sizes_are_counted_by_layer():
    spec = tiny(adapters={}, depth=4, **FORMS["experts every second"])
    model = bind(spec, 31)
    made = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract()))
    described = describe(spec, 31, T)
    expert = MixtureOfExperts(experts=3, top_k=2).idle(16)
    assert described.parameters == made and made - described.active == 2 * expert


def test_a_form_is_set_on_the_command_line_and_kept_as_json():
    spec = override(
        StackSpec(norm=RMSNorm()), {"block": "polygpt.blocks.parallel:Parallel", "block.shared_norm": "false"}
    )
    assert spec.block == Parallel(shared_norm=False)
    for form in FORMS.values():
        one = StackSpec(depth=6, **form)
        assert from_json(to_json(one)) == one
    layer = (
        '[null, {"class": "polygpt.blocks.block:Layer", "attention": null, "mlp": null, "norm": null, "block": null}]'
    )
    assert override(StackSpec(), {"pattern": layer}).period() == StackSpec(pattern=(None, None)).period()
    with pytest.raises(SpecError, match="norm_placement is 'post': it must be 'pre' with Sandwich blocks"):
        StackSpec(block=Sandwich(), norm_placement="post")
    with pytest.raises(SpecError, match="norm_placement is 'post': it must be 'pre' with Parallel blocks"):
        StackSpec(pattern=(None, Layer(block=Parallel())), norm_placement="post")
    assert StackSpec(block=Sequential(), norm_placement="post").norm_placement == "post"


# --- stochastic depth -------------------------------------------------------------------------------------------------


def test_rows_skip_blocks_at_the_rate_of_the_depth_and_keep_the_mean():
    depth, rate, rows = 2, 0.6, 4000
    model = bind(tiny(adapters={}, depth=depth, drop_path=rate, scan=False), 31)
    params = lively(model, scale=0.3)
    row = build([[example(3, seed=1)]], 5, adapters={})
    batch = jax.tree.map(lambda x: np.repeat(x, rows, axis=0), row)
    with model._merged(params) as module:
        decoder = module.decoder
        x_BTD = module.embed(batch)[0]
        context = decoder._context(batch, None)[0]
        block = decoder.blocks[0]
        y_BTD = block(x_BTD, context)[0]
        for layer in range(depth):
            output = decoder._with_drop_path((y_BTD, None, {}), x_BTD, layer, jax.random.key(layer))[0]
            same_B = np.asarray((output == x_BTD).all(axis=(1, 2)))
            expected = rate * (layer + 1) / depth
            assert abs(same_B.mean() - expected) < 4 * (expected * (1 - expected) / rows) ** 0.5
            added = np.asarray(output - x_BTD)[~same_B]
            np.testing.assert_allclose(added, np.asarray(y_BTD - x_BTD)[~same_B] / (1 - expected), rtol=1e-4, atol=1e-5)


def test_stochastic_depth_is_for_training_alone():
    model = bind(tiny(adapters={}, drop_path=0.5), 31)
    plain = bind(tiny(adapters={}), 31)
    params = lively(model)
    same = plain.apply(params, BATCH).hidden_BTD
    np.testing.assert_array_equal(model.apply(params, BATCH).hidden_BTD, same)
    assert not np.array_equal(model.apply(params, BATCH, jax.random.key(0)).hidden_BTD, same)
