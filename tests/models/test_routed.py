"""Models with mixtures of experts: what they cost, who goes where, and decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import ADAPTERS, LIGHT, TOWER, build, columns, example, lively, tiny
from polygpt.errors import SpecError
from polygpt.evaluation.likelihood import score
from polygpt.models.decoder import DecoderSpec
from polygpt.models.describe import describe
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.experts import MixtureOfExperts
from polygpt.parameters import paths

ROW = [example(3, ("image", 4), 2, ("audio", 3), 2, seed=1)]
T = 16


def test_flops_and_parameters_of_a_mixture():
    """Mixtral 8x7B (2401.04088), table 1: 46.7B parameters, of which 12.9B are active."""
    mixtral = MixtureOfExperts(8, 2, factor=3.5)
    attention = DecoderSpec().attention.replace(heads=32, kv_heads=8)
    decoder = DecoderSpec(4096, 32, attention, mixtral, tied=False)
    found = describe(ModelSpec(decoder), 32_000, 1)
    block = 4096 * (2 * 4096 + 2 * 1024) + 4096 * 8 + 2 * 4096
    expert, rest = 3 * 4096 * 14336, 2 * 32_000 * 4096 + 4096
    assert found.parameters == 32 * (block + 8 * expert) + rest == 46_702_792_704
    assert found.active == 32 * (block + 2 * expert) + rest == 12_879_925_248
    matrices = 32 * (block - 2 * 4096 + 2 * expert) + 32_000 * 4096
    assert found.flops_per_token == 3 * (2 * matrices + 32 * 4 * 4096)


def test_towers_count_active_experts_too():
    routed = TOWER.replace(mlp=MixtureOfExperts(4, 2))
    adapters = {name: adapter.replace(tower=routed) for name, adapter in ADAPTERS.items()}
    narrow = TOWER.replace(mlp=MixtureOfExperts(2, 2))
    dense = {name: adapter.replace(tower=narrow) for name, adapter in ADAPTERS.items()}
    for part, other in zip(
        describe(tiny(adapters=adapters), 31, 8).parts, describe(tiny(adapters=dense), 31, 8).parts, strict=True
    ):
        if part.name.startswith("adapters/"):
            places = {"adapters/image": 4, "adapters/audio": 8}[part.name]
            assert part.flops - other.flops == 2 * places * 8 * 2, "two more columns of the router"
            assert part.active - other.active == 8 * 2 and part.parameters > part.active


def test_paths_and_axes():
    model = bind(tiny(adapters={}, mlp=MixtureOfExperts(4, 2, shared=1)), 31)
    shapes = {path: leaf.shape for path, leaf in paths(model.abstract()).items() if "/mlp/" in path}
    assert shapes == {
        "decoder/blocks/mlp/experts/down/kernel": (2, 4, 48, 16),
        "decoder/blocks/mlp/experts/gate/kernel": (2, 4, 16, 48),
        "decoder/blocks/mlp/experts/up/kernel": (2, 4, 16, 48),
        "decoder/blocks/mlp/router/kernel": (2, 16, 4),
        "decoder/blocks/mlp/shared/down/kernel": (2, 48, 16),
        "decoder/blocks/mlp/shared/gate/kernel": (2, 16, 48),
        "decoder/blocks/mlp/shared/up/kernel": (2, 16, 48),
    }
    axes = model.axes()["decoder"]["blocks"]["mlp"]
    assert axes["experts"]["gate"]["kernel"] == ("layers", "experts", "width", "hidden")
    assert axes["experts"]["down"]["kernel"] == ("layers", "experts", "hidden", "width")


def test_each_modality_goes_to_its_own_experts():
    """By the gradients of the experts, of what a row of one modality alone says."""
    model = bind(tiny(adapters=LIGHT, depth=1, mlp=MixtureOfExperts(6, 2, groups=(2, 2, 1))), 31)
    params, batch = lively(model), build([ROW], T, adapters=LIGHT)

    @jax.jit
    def gradient(params, modality):
        here_BT1 = (batch.modality_BT == modality)[..., None]
        total = lambda params: jnp.sum(jnp.where(here_BT1, jnp.sin(model.apply(params, batch).hidden_BTD), 0))  # noqa: E731
        return jax.grad(total)(params)["decoder"]["blocks"]["mlp"]["experts"]["down"]["kernel"][0]

    for modality, own in enumerate([{0, 1}, {2, 3}, {4}]):
        used = {e for e, kernel in enumerate(gradient(params, modality)) if np.asarray(kernel).any()}
        assert used <= own | {5} and used & own, "its own, and the one that is open to all"


def test_groups_have_to_fit_the_model():
    with pytest.raises(SpecError, match="it must have one number for each of text, image, audio"):
        tiny(mlp=MixtureOfExperts(8, 2, groups=(4, 4)))
    with pytest.raises(SpecError, match="it must have one number for each of the tower's one modality"):
        towers = {"image": ADAPTERS["image"].replace(tower=TOWER.replace(mlp=MixtureOfExperts(8, 2, groups=(4, 4))))}
        bind(tiny(adapters=towers), 31)


@pytest.mark.parametrize("capacity", [pytest.param(None, marks=pytest.mark.slow), 0.5], ids=["dropless", "capacity"])
def test_token_by_token_equals_the_whole_row(capacity):
    """Where training drops choices decoding does not, and is equal to what the model without a capacity computes."""
    mlp = MixtureOfExperts(6, 2, groups=(2, 2, 1), shared=1, capacity=capacity)
    model = bind(tiny(adapters=LIGHT, mlp=mlp), 31)
    params, batch = lively(model), build([ROW], T, adapters=LIGHT)
    whole = bind(model.spec.replace(decoder=model.spec.decoder.replace(mlp=mlp.replace(capacity=None))), 31)
    expected_BTV = np.asarray(jax.jit(whole.apply)(params, batch).logits_BTV)
    decode = jax.jit(model.decode)
    logits_BTV, cache = decode(params, columns(batch, 0, 13, media=True), model.init_cache(1, T))
    got = [logits_BTV]
    for t in range(13, T):
        logits_BTV, cache = decode(params, columns(batch, t, t + 1, media=False), cache)
        got.append(logits_BTV)
    real = batch.segment_BT > 0
    np.testing.assert_allclose(np.concatenate(got, axis=1)[real], expected_BTV[real], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(jax.jit(model.apply)(params, batch).logits_BTV, expected_BTV)
    trained = np.asarray(jax.jit(model.apply)(params, batch, jax.random.key(0)).logits_BTV)
    assert (np.abs(trained - expected_BTV)[real].max() > 1e-2) == (capacity is not None)


def test_padding_and_neighbouring_rows_do_not_matter():
    model = bind(tiny(adapters={}, mlp=MixtureOfExperts(4, 2, capacity=0.7)), 31)
    params, key = lively(model), jax.random.key(0)
    apply = jax.jit(lambda params, batch: model.apply(params, batch, key))
    rows = [[example(9, seed=1)], [example(12, seed=2)]]
    batch = build(rows, 12, adapters={})
    before = np.asarray(apply(params, batch).logits_BTV)
    noise = batch.replace(tokens_BT=np.where(batch.segment_BT == 0, 7, batch.tokens_BT).astype(np.int32))
    swapped = jax.tree.map(lambda x: x[::-1], noise)
    real = batch.segment_BT > 0
    np.testing.assert_allclose(apply(params, swapped).logits_BTV[::-1][real], before[real], rtol=0, atol=1e-6)


@pytest.mark.parametrize("before", [5, 9])
def test_an_example_scores_the_same_alone_and_packed_behind_another(before):
    model = bind(tiny(adapters={}, mlp=MixtureOfExperts(4, 2, capacity=0.5)), 31)
    params, own = lively(model), example(11, seed=2)
    rows = [[own]], [[example(before, seed=1), own]]
    alone, packed = (score(model, params, build(row, 20, adapters={}), np.ones(31)).mean_loss for row in rows)
    np.testing.assert_allclose(packed[-1], alone[0], rtol=1e-6)
