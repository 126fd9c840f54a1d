"""The decoder's mask, noise on embeddings, DropConnect, initialisation by pattern, a model class of one's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import build, example, lively, tiny
from polygpt.errors import SpecError
from polygpt.heads.linear import LinearHead
from polygpt.models.drop_connect import DropConnect
from polygpt.models.functional import bind
from polygpt.models.initial import Initial
from polygpt.models.low_rank import LowRank
from polygpt.models.multimodal import ModelSpec, MultimodalModel
from polygpt.parameters import paths

BATCH = build([[example(7, seed=1), example(4, seed=2)], [example(10, seed=3)]], 12, adapters={})
KEY = jax.random.key(0)


def hidden(model, params, batch=BATCH, key=None):
    return np.asarray(model.hidden(params, batch, key)[0])


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask, first", [("causal", 5), ("spans", 5), ("bidirectional", 0)])
def test_a_position_sees_what_the_mask_says(mask, first):
    model = bind(tiny(adapters={}, mask=mask), 31)
    params, tokens_BT = lively(model), BATCH.tokens_BT.copy()
    tokens_BT[0, 5] += 1
    moved_BT = (hidden(model, params) != hidden(model, params, BATCH.replace(tokens_BT=tokens_BT))).any(axis=-1)
    assert moved_BT.sum() == 7 - first and moved_BT[0, first:7].all()


def test_spans_are_seen_whole_with_their_mask_alone():
    span_BT = np.zeros_like(BATCH.span_BT)
    span_BT[0, :4] = 1
    both = [bind(tiny(adapters={}, mask=mask), 31) for mask in ("causal", "spans")]
    params = lively(both[0])
    differ = [(hidden(m, params, BATCH.replace(span_BT=span_BT)) != hidden(m, params)).any() for m in both]
    assert differ == [False, True]


def test_an_encoder_cannot_generate():
    with pytest.raises(SpecError, match="model.decoder.mask is 'bidirectional'.* can generate"):
        bind(tiny(adapters={}, mask="bidirectional"), 31).init_cache(1, 4)


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_on_embeddings_is_neftune_s():
    model = bind(tiny(adapters={}, depth=0, embedding_noise=5.0), 31)
    decoder = model.module(model.init(KEY)).decoder
    noise_BTD = np.asarray(decoder._noise(jnp.zeros((2, 12, 16)), BATCH, KEY))
    bound_BT = 5.0 / np.sqrt(16 * np.where(BATCH.segment_BT == 2, 4, np.where(np.arange(2)[:, None], 10, 7)))
    scaled = noise_BTD[BATCH.segment_BT > 0] / bound_BT[BATCH.segment_BT > 0][:, None]
    assert not noise_BTD[BATCH.segment_BT == 0].any()
    assert 0.95 < np.abs(scaled).max() < 1 and abs(scaled.std() - 3**-0.5) < 0.04
    params, plain = lively(model), bind(tiny(adapters={}, depth=0), 31)
    np.testing.assert_array_equal(hidden(model, params), hidden(plain, params))
    assert (hidden(model, params, key=KEY) != hidden(plain, params))[BATCH.segment_BT > 0].all()


# --- DropConnect ------------------------------------------------------------------------------------------------------


def test_elements_of_matrices_are_dropped_in_training_alone():
    rule = DropConnect(0.25, pattern="mlp/.*kernel$")
    model = bind(tiny(adapters={}).replace(drop_connect=rule), 31)
    params, traits = lively(model), paths(model.traits)
    dropped = paths(rule.dropped(params, traits, KEY))
    for name, value in paths(params).items():
        if "mlp/" not in name or not name.endswith("kernel"):
            np.testing.assert_array_equal(dropped[name], value)
            continue
        kept = np.asarray(dropped[name]) != 0
        assert abs(kept.mean() - 0.75) < 4 * (0.75 * 0.25 / kept.size) ** 0.5
        np.testing.assert_allclose(np.asarray(dropped[name])[kept], np.asarray(value)[kept] / 0.75, rtol=1e-6)
    plain = bind(tiny(adapters={}), 31)
    np.testing.assert_array_equal(hidden(model, params), hidden(plain, params))
    assert (hidden(model, params, key=KEY) != hidden(plain, params)).any()


def test_a_dropped_element_has_no_gradient():
    rule = DropConnect(0.5, pattern="up/kernel$")
    model = bind(tiny(adapters={}).replace(drop_connect=rule), 31)
    params = lively(model)
    found = jax.grad(lambda params: jnp.sum(model.hidden(params, BATCH, KEY)[0] ** 2))(params)
    gradient = paths(found)["decoder/blocks/mlp/up/kernel"]
    kept = paths(rule.dropped(params, paths(model.traits), jax.random.fold_in(KEY, 2)))["decoder/blocks/mlp/up/kernel"]
    assert np.array_equal(np.asarray(gradient) != 0, np.asarray(kept) != 0)


# --- initial values ---------------------------------------------------------------------------------------------------


def test_patterns_decide_initial_values():
    rules = (
        Initial("query/kernel$", "orthogonal", 2.0),
        Initial("mlp/down/kernel$", "fan_in", 3.0, depth_scaled=True),
        Initial("^text/table$", "fixed", 0.5),
    )
    spec, plain = tiny(adapters={}, width=32, depth=4).replace(initial=rules), tiny(adapters={}, width=32, depth=4)
    found, others = (paths(bind(one, 31).init(KEY)) for one in (spec, plain))
    query = np.asarray(found.pop("decoder/blocks/attention/query/kernel"), np.float64)
    for layer in query:
        np.testing.assert_allclose(layer.T @ layer, 4 * np.eye(32), atol=1e-5)
    assert not np.array_equal(query[0], query[1])
    down = np.asarray(found.pop("decoder/blocks/mlp/down/kernel"))
    assert abs(down.std() / (3 / (down.shape[1] * 8) ** 0.5) - 1) < 0.03
    table = np.asarray(found.pop("text/table"))
    assert abs(table.std() / 0.5 - 1) < 0.08
    for name, value in found.items():
        np.testing.assert_array_equal(value, others[name])


def test_patterns_that_meet_nothing_are_told():
    for changes, words in (
        (
            {"initial": (Initial("nothing", "fixed"),)},
            r"model.initial\[0\].pattern 'nothing' matches no matrix: .*like",
        ),
        ({"initial": (Initial("kernel", "fixed"), Initial("up", "fan_in"))}, r"initial\[1\].pattern 'up' matches only"),
        ({"drop_connect": DropConnect(0.1, "scale$")}, "model.drop_connect.pattern 'scale.' matches no matrix"),
        (
            {"drop_connect": DropConnect(0.1, "^heads?/"), "heads": {"kind": LinearHead(3)}},
            "model.drop_connect.pattern '.*' matches no matrix",  # heads are not dropped
        ),
    ):
        with pytest.raises(SpecError, match=words):
            bind(tiny(adapters={}).replace(**changes), 31).abstract()


def test_frozen_matrices_under_low_rank_updates_can_be_initialised_and_dropped():
    spec = tiny(adapters={}).replace(low_rank=LowRank("query"), initial=(Initial("query/kernel", "fixed", 0.0),))
    spec = spec.replace(drop_connect=DropConnect(0.5))
    model = bind(spec, 31)
    params = model.init(KEY)
    assert not np.any(paths(params)["decoder/blocks/attention/query/kernel"])
    assert np.isfinite(hidden(model, params, key=KEY)).all()


# --- a model class ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shouting(ModelSpec):
    """A model that another module computes."""

    volume: float = 2.0
    """Factor on the logits."""

    def build(self, vocabulary, rngs):
        return Louder(self, vocabulary, rngs)


class Louder(MultimodalModel):
    def __init__(self, spec, vocabulary, rngs):
        super().__init__(spec, vocabulary, rngs)
        self.volume = spec.volume

    def logits(self, hidden_BTD):
        return self.volume * super().logits(hidden_BTD)


def test_a_subclass_of_the_specification_builds_another_model():
    spec = tiny(adapters={})
    model, plain = bind(Shouting(**vars(spec)), 31), bind(spec, 31)
    params = lively(plain)
    found, expected = (one.apply(params, BATCH).logits_BTV for one in (model, plain))
    np.testing.assert_allclose(found, 2 * expected, rtol=1e-6)
