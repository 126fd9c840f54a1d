"""muP's rules by hand, the base model to the bit, and what leaves the rules undefined."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import ADAPTERS, VOCABULARY, build, example, lively, tiny
from polygpt.adapters.base import Connector
from polygpt.attention.biases import BucketBias, LearnedBias, T5Bias
from polygpt.attention.contract import Attention
from polygpt.attention.differential import Differential
from polygpt.attention.linear import LinearAttention
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.off_by_one import SoftmaxOffByOne
from polygpt.attention.recurrent import Recurrent
from polygpt.attention.scores import KeyGate, QueryTemperature
from polygpt.attention.talking_heads import TalkingHeads
from polygpt.attention.transformer_xl import TransformerXL
from polygpt.errors import SpecError
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.experts import MixtureOfExperts
from polygpt.nn.norms import RMSNorm
from polygpt.nn.positions import Learned
from polygpt.optim.groups import Group
from polygpt.optim.mup import MuP
from polygpt.optim.optim import Optim
from polygpt.optim.optimizers import SGD, Adafactor, AdamW, Lion, Muon, Optimizer
from polygpt.optim.schedules import Constant
from polygpt.parameters import paths
from polygpt.spec import from_json, to_json

ROWS = [[example(3, ("image", 4), 4, seed=1), example(("audio", 3), 2, seed=2)]]
T = 16


def multimodal(mup: MuP | None = None) -> ModelSpec:
    """A decoder of 64 channels, an image tower of 16, an audio tower of 8."""
    image, audio = ADAPTERS["image"], ADAPTERS["audio"]
    image = image.replace(tower=image.tower.replace(width=16), connector=Connector("mlp"))
    mlp = MixtureOfExperts(experts=4, factor=2.0)
    decoder = DecoderSpec(64, 1, MultiHead(4, 2, bias=True), mlp=mlp, tied=False)
    return ModelSpec(decoder, {"image": image, "audio": audio}, mup=mup)


# The decoder grows four times, the image tower twice, the audio tower not at all.
BASE = MuP({"decoder.width": 16, "adapters.image.tower.width": 8})
OURS = {"decoder.width": 64, "adapters.image.tower.width": 16}

half, quarter, root = 1 / 2, 1 / 4, 2**0.5
RULES = {  # written out by hand: kind, factor on the rate of Adam, of SGD, of Muon, and on initial values
    r"text/table": ("input", 1, 4, 1, 1),
    r"modality/(image|audio)": ("input", 1, 4, 1, 1),
    r"head/kernel": ("output", quarter, quarter, quarter, half),
    r"decoder/norm/scale": ("input", 1, 4, 1, 1),
    r"decoder/blocks/(attention|mlp)_norm/scale": ("input", 1, 4, 1, 1),
    r"decoder/blocks/attention/(query|key|value|output)/kernel": ("hidden", quarter, 1, half, 1),
    r"decoder/blocks/attention/(query|key|value|output)/bias": ("input", 1, 4, 1, 1),
    r"decoder/blocks/mlp/router/kernel": ("output", quarter, quarter, quarter, half),
    r"decoder/blocks/mlp/experts/(gate|up|down)/kernel": ("hidden", quarter, 1, half, 1),
    # 16 pixels go in: the spectral norm sqrt(16) of an update that is orthogonal times 4 has to grow to sqrt(32).
    r"adapters/image/patch/kernel": ("input", 1, 2, root, 1),
    r"adapters/image/patch/bias": ("input", 1, 2, 1, 1),
    r"adapters/image/tower/position/table": ("input", 1, 2, 1, 1),
    r"adapters/image/tower/norm/(scale|bias)": ("input", 1, 2, 1, 1),
    r"adapters/image/tower/blocks/(attention|mlp)_norm/(scale|bias)": ("input", 1, 2, 1, 1),
    r"adapters/image/tower/blocks/attention/(query|key|value|output)/kernel": ("hidden", half, 1, 1 / root, 1),
    r"adapters/image/tower/blocks/mlp/(up|down)/kernel": ("hidden", half, 1, 1 / root, 1),
    r"adapters/image/tower/blocks/mlp/(up|down)/bias": ("input", 1, 2, 1, 1),
    r"adapters/image/connector/hidden/kernel": ("hidden", half, 2, 1 / root, 1),
    r"adapters/image/connector/output/kernel": ("hidden", quarter, 1, half, 1),
    r"adapters/image/connector/(hidden|output)/bias": ("input", 1, 4, 1, 1),
    r"adapters/audio/connector/output/(kernel|bias)": ("input", 1, 4, 1, 1),
    r"adapters/audio/(first|second|tower)/.*": ("fixed", 1, 1, 1, 1),
}


def test_every_parameter_has_the_rule_that_is_written_out_by_hand():
    model = bind(multimodal(BASE), VOCABULARY)
    growth, shapes = paths(model.growth), model.abstract()
    rules = [paths(Optim(Constant(1), own).rules(model.traits, model.growth)) for own in (AdamW(), SGD(), Muon())]
    assert growth.keys() == paths(shapes).keys()
    for name, found in growth.items():
        (hand,) = [rule for pattern, rule in RULES.items() if re.fullmatch(pattern, name)]
        factors = [of_optimizer[name].width_factor for of_optimizer in rules]
        assert (found.kind, found.initial) == (hand[0], hand[4]), name
        np.testing.assert_allclose(factors, hand[1:4], err_msg=name)
    for own in (Lion(), Adafactor()):
        others = paths(Optim(Constant(1), own).rules(model.traits, model.growth))
        assert {name: rule.width_factor for name, rule in others.items()} == {
            name: rule.width_factor for name, rule in rules[0].items()
        }


@pytest.fixture
def drawn_by_numpy(monkeypatch):
    """Initial values without the generator of jax, which takes longer to compile than the rest of a model."""

    def normal(key, shape=()):
        return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    monkeypatch.setattr(jax.random, "normal", normal)


def test_initial_values_are_as_large_as_the_rules_say(drawn_by_numpy):
    params = bind(multimodal(BASE), 500).init(jax.random.key(0))
    sizes = {name: float(jnp.std(leaf)) for name, leaf in paths(params).items()}
    want = {
        "text/table": 16**-0.5,  # that of the base
        "head/kernel": 16**0.5 / 64,
        "decoder/blocks/attention/query/kernel": 64**-0.5,
        "decoder/blocks/attention/output/kernel": (2 * 64) ** -0.5,  # of two branches
        "decoder/blocks/mlp/router/kernel": 16**0.5 / 64,
        "adapters/image/patch/kernel": 16**-0.5,
        "adapters/image/connector/hidden/kernel": 16**-0.5,
        "adapters/image/tower/blocks/attention/query/kernel": 16**-0.5,
    }
    np.testing.assert_allclose([sizes[name] for name in want], list(want.values()), rtol=0.1)


@pytest.mark.parametrize(
    "fields",
    [
        {"attention": MultiHead(4, head_width=8, scores=(BucketBias(), KeyGate(), LearnedBias(), QueryTemperature()))},
        {"attention": MultiHead(4, head_width=8, bias=True, qk_norm=RMSNorm()), "position": T5Bias()},
        {"attention": TransformerXL(4, head_width=8), "position": Learned(32)},
        {
            "attention": MultiHead(4, head_width=8),
            "pattern": (TalkingHeads(4, head_width=8), SoftmaxOffByOne(4, head_width=8, learned=True)),
        },
        {"attention": Differential(2, head_width=8), "scan": False},
    ],
    ids=["scores", "T5", "Transformer-XL", "pattern", "differential"],
)
def test_initial_values_of_tables_and_vectors_are_those_of_the_base_model(drawn_by_numpy, fields):
    def values(width, mup=None):
        spec = tiny(adapters={}, width=width, depth=2, **fields).replace(mup=mup)
        return paths(bind(spec, VOCABULARY).init(jax.random.key(0)))

    wide, base = values(64, MuP({"decoder.width": 16})), values(16)
    for name in (name for name in wide if not name.endswith("kernel")):
        if wide[name].shape == base[name].shape:  # of the same random numbers
            np.testing.assert_allclose(wide[name], base[name], rtol=1e-6, err_msg=name)
        else:
            bound = 6 * (2 * base[name].size) ** -0.5  # six standard errors
            np.testing.assert_allclose(jnp.std(wide[name]), jnp.std(base[name]), rtol=bound, err_msg=name)


def logits(spec: ModelSpec, params):
    model = bind(spec, VOCABULARY)
    rows = ROWS if spec.adapters else [[example(9)]]
    return jax.jit(model.apply)(params, build(rows, T, adapters=spec.adapters)).logits_BTV


def test_logits_of_a_tied_head_are_divided_by_the_growth_of_the_width():
    spec = tiny(adapters={}, width=32, attention=MultiHead(4, head_width=8))
    params = lively(bind(spec, VOCABULARY))
    grown = spec.replace(mup=MuP({"decoder.width": 8}))
    np.testing.assert_allclose(logits(grown, params), logits(spec, params) / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("scale", "base", "want"),
    [
        (None, {"decoder.width": 8}, 2**0.5 / 8),  # heads of 2 channels grow to 8
        (0.5, {"decoder.width": 8}, 0.125),
        (None, {"decoder.width": 8, "decoder.attention.heads": 1, "decoder.attention.kv_heads": 1}, None),
    ],
)
def test_scores_are_divided_by_the_width_of_heads(scale, base, want):
    spec = tiny(adapters={}, width=32, tied=False, attention=MultiHead(4, 2, scale=scale))
    params = lively(bind(spec, VOCABULARY))
    by_hand = spec.replace(decoder=spec.decoder.replace(attention=MultiHead(4, 2, scale=want)))
    found = logits(spec.replace(mup=MuP(base)), params)
    np.testing.assert_array_equal(found, logits(by_hand, params))
    assert want is None or not np.allclose(found, logits(spec, params), rtol=1e-2)


def test_scores_of_towers_and_of_patterns_are_divided_too():
    spec = tiny(width=32, tied=False, attention=MultiHead(4, head_width=8), pattern=(None, MultiHead(4)))
    towers = {name: one.replace(tower=one.tower.replace(width=16)) for name, one in spec.adapters.items()}
    spec = spec.replace(adapters=towers)
    params = lively(bind(spec, VOCABULARY))
    base = {"decoder.width": 16, "adapters.image.tower.width": 8, "adapters.audio.tower.width": 4}
    by_hand = {
        "image": towers["image"].replace(tower=towers["image"].tower.replace(attention=MultiHead(2, scale=2 / 8))),
        "audio": towers["audio"].replace(tower=towers["audio"].tower.replace(attention=MultiHead(2, scale=2**0.5 / 8))),
    }
    decoder = spec.decoder.replace(pattern=(None, MultiHead(4, scale=2 / 8)))
    found = logits(spec.replace(mup=MuP(base)), params)
    np.testing.assert_array_equal(found, logits(ModelSpec(decoder, by_hand), params))


@pytest.mark.parametrize("optimizer", [AdamW(), Lion(), Adafactor(), Muon(), SGD()], ids=lambda own: type(own).__name__)
def test_at_the_width_of_the_base_all_rules_are_the_standard_ones(optimizer):
    ours, other = bind(multimodal(MuP(OURS)), VOCABULARY), bind(multimodal(), VOCABULARY)
    optim = Optim(Constant(0.1), optimizer, groups=(Group("head|table", learning_rate=0.3),))
    assert optim.rules(ours.traits, ours.growth) == optim.rules(other.traits)


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_at_the_width_of_the_base_all_is_the_standard_parametrization_to_the_bit(drawn_by_numpy, tied):
    plain = tiny(adapters={"image": ADAPTERS["image"]}, tied=tied, depth=1)
    grown = plain.replace(mup=MuP({"decoder.width": 16, "adapters.image.tower.width": 8}))
    optim, batch = Optim(Constant(0.1)), build([[example(3, ("image", 4), 4)]], T, adapters=plain.adapters)

    def trained(spec):
        model = bind(spec, VOCABULARY)
        transformation = optim.build(model.traits, 5, model.growth)

        def loss(params):
            logits_BTV = model.apply(params, batch).logits_BTV
            return jnp.mean(logits_BTV**2), logits_BTV

        def step(carry, _):
            params, state = carry
            (_, logits_BTV), gradient = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = transformation.update(gradient, state, params)
            return (jax.tree.map(jnp.add, params, updates), state), logits_BTV

        params = model.init(jax.random.key(3))
        return jax.jit(lambda params: jax.lax.scan(step, (params, transformation.init(params)), length=3))(params)

    jax.tree.map(np.testing.assert_array_equal, trained(grown), trained(plain))


def kernels():
    spec = tiny(adapters={}, width=32, depth=1, attention=MultiHead(4, head_width=8)).replace(
        mup=MuP({"decoder.width": 8})
    )
    model = bind(spec, VOCABULARY)
    return model, lively(model)


def test_rate_times_weight_decay_is_that_of_the_base():
    model, params = kernels()
    zeros = jax.tree.map(jnp.zeros_like, params)
    transformation = Optim(Constant(0.1), AdamW(weight_decay=0.3), no_decay="gate").build(model.traits, 5, model.growth)
    decayed = {name for name in paths(params) if name.endswith("kernel") and "gate" not in name}
    updates, _ = jax.jit(transformation.update)(zeros, transformation.init(params), params)
    for (name, update), parameter in zip(paths(updates).items(), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(update, -0.03 * parameter if name in decayed else 0 * parameter, rtol=1e-6)


def test_groups_give_the_rates_and_decays_of_the_base_and_frozen_ones_stay():
    model, params = kernels()
    ones = jax.tree.map(jnp.ones_like, params)
    groups = (Group("query", freeze=True), Group("attention", learning_rate=0.5, weight_decay=0.2))
    optim = Optim(Constant(0.1), Lion(weight_decay=0.0), clip=None, groups=groups)
    transformation = optim.build(model.traits, 5, model.growth)
    found, _ = jax.jit(transformation.update)(ones, transformation.init(params), params)
    block, own = found["decoder"]["blocks"], params["decoder"]["blocks"]
    assert not np.any(block["attention"]["query"]["kernel"])
    # Heads are 8 channels wide in the base too: what goes in grows four times, but for the output, and what comes out.
    key, output = (block["attention"][name]["kernel"] for name in ("key", "output"))
    np.testing.assert_allclose(key, -0.1 * 0.5 / 4 - 0.1 * 0.5 * 0.2 * own["attention"]["key"]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(output, -0.1 * 0.5 - 0.1 * 0.5 * 0.2 * own["attention"]["output"]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(block["mlp"]["gate"]["kernel"], -0.1 / 4, rtol=1e-6)
    np.testing.assert_allclose(block["mlp_norm"]["scale"], -0.1, rtol=1e-6)
    assert optim.trainable(model.traits)["decoder"]["blocks"]["attention"]["query"]["kernel"] is False


def test_the_table_that_is_printed_says_the_factors():
    model, _ = kernels()
    optim = Optim(Constant(0.1), AdamW(weight_decay=0.3), groups=(Group("query", freeze=True),))
    lines = [line.split() for line in optim.table(model.traits, model.growth).splitlines()]
    assert lines[0] == "group learning rate muP rate initial weight decay tensors parameters".split()
    # text/table and three norms; the keys and values of four heads; the output; gate, up and down of 88 channels, of 24
    # in the base
    assert "query frozen output - x 0.5 - 1 1,024".split() in lines
    assert "(all others), not decayed 1 x schedule input x 1 x 1 0 4 1,088".split() in lines
    assert "(all others), decayed 1 x schedule output x 0.25 x 0.5 1.2 2 2,048".split() in lines
    assert "(all others), decayed 1 x schedule hidden x 0.25 x 1 1.2 2 5,632".split() in lines
    assert len(lines) == 7
    assert "muP" not in optim.table(model.traits)


def test_the_parameters_of_a_checkpoint_are_the_same():
    plain, grown = bind(multimodal(), VOCABULARY), bind(multimodal(BASE), VOCABULARY)
    assert jax.tree.structure(plain.abstract()) == jax.tree.structure(grown.abstract())
    assert plain.axes() == grown.axes()
    assert from_json(to_json(multimodal(BASE))) == multimodal(BASE)


# --- what has no rule -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Strange(Attention):
    """An attention that does not say how it grows."""


@dataclasses.dataclass(frozen=True)
class Unknown(Optimizer):
    """An optimizer that does not say how its updates grow."""


@pytest.mark.parametrize(
    ("decoder", "base", "fault"),
    [
        ({}, {"decoder.widht": 8}, "model.mup.base: decoder.widht: DecoderSpec has no field 'widht': did you mean wid"),
        (
            {},
            {"decoder.depth": 1},
            r"model.mup.base: decoder/.*kernel has shape \(2, .*, and \(1, .*: only widths may differ",
        ),
        ({"scan": False}, {"decoder.depth": 1}, "only one of the models has decoder/blocks/1/"),
        (
            {"mlp": MixtureOfExperts(4)},
            {"decoder.mlp.experts": 2},
            r"kernel has shape \(2, 4, .*only widths may differ",
        ),
        ({"attention": TalkingHeads(4)}, {"decoder.attention.heads": 2}, "after has shape .* two axes under muP"),
        (
            {"attention": Differential(2)},
            {"decoder.width": 8},
            "Differential.head_width is None: it must be that of th",
        ),
        ({"attention": Recurrent(norm=None)}, {"decoder.width": 8}, "Recurrent.norm is None: it must be set if h"),
        ({"attention": Strange()}, {"decoder.width": 8}, "Strange has no rule for muP: define its method mup_scaled"),
    ],
)
def test_a_model_without_a_rule_is_refused(decoder, base, fault):
    with pytest.raises(SpecError, match=fault):
        bind(tiny(adapters={}, **decoder).replace(mup=MuP(base)), VOCABULARY).growth  # noqa: B018


@pytest.mark.parametrize("attention", [Differential(2, head_width=8), LinearAttention(), Recurrent()])
def test_variants_that_keep_their_scores_as_they_are(attention):
    spec = tiny(adapters={}, width=32, tied=False, attention=attention)
    params, batch = lively(bind(spec, VOCABULARY)), build([[example(9)]], T, adapters={})
    found = bind(spec.replace(mup=MuP({"decoder.width": 16})), VOCABULARY).apply(params, batch).logits_BTV
    np.testing.assert_array_equal(found, bind(spec, VOCABULARY).apply(params, batch).logits_BTV)


@pytest.mark.parametrize(
    ("optimizer", "fault"),
    [
        (Unknown(), "optim.optimizer: Unknown has no rule for muP: define its width_factor, or set model.mup to null"),
        (Adafactor(relative=True), "Adafactor.relative is true: muP has no rule for it"),
    ],
)
def test_an_optimizer_without_a_rule_is_refused(optimizer, fault):
    model, _ = kernels()
    with pytest.raises(SpecError, match=fault):
        Optim(Constant(0.1), optimizer).rules(model.traits, model.growth)
