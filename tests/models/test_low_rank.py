"""Low-rank updates: the model before them at first, the merged matrices afterwards, and nothing else trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import LIGHT, build, example, lively, tiny
from polygpt.errors import SpecError
from polygpt.models.functional import bind
from polygpt.models.low_rank import LowRank
from polygpt.nn.experts import MixtureOfExperts
from polygpt.optim.mup import MuP
from polygpt.parameters import Traits, paths, tree_of

KINDS = {
    "LoRA": LowRank("attention|mlp", rank=3),
    "rank stabilized": LowRank("attention|mlp", rank=3, rank_stabilized=True),
    "DoRA": LowRank("attention|mlp", rank=3, magnitude=True),
}


@pytest.fixture(scope="module")
def batch():
    return build([(example(9, ("image", 4), 6, seed=1),), (example(3, seed=2), example(12, seed=3))], 24)


def models(kind, **changes):
    spec = tiny(**{"adapters": LIGHT} | changes)
    return bind(spec.replace(low_rank=KINDS[kind]), 31), bind(spec, 31)


def updated(model, size=0.3):
    """Lively parameters, with updates that are not 0."""
    rng = np.random.default_rng(0)
    noise = jax.tree.map(
        lambda x: jnp.asarray(size * rng.normal(size=x.shape), jnp.float32), model.abstract()["low_rank"]
    )
    return jax.tree.map(jnp.asarray, lively(model.merged)) | {"low_rank": noise}


def test_tree_of_is_the_inverse_of_paths():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert tree_of(paths(tree)) == tree


@pytest.mark.parametrize("kind, scan", [("LoRA", True), ("DoRA", False)])
def test_at_first_it_is_the_model_without_updates(kind, scan, batch):
    model, plain = models(kind, scan=scan)
    expected = jax.tree.map(jnp.asarray, lively(plain))
    params = expected | KINDS[kind].initial(jax.random.key(0), paths(plain.traits))
    merged = paths(jax.jit(model.merge)(params))
    for name, value in paths(expected).items():
        ulp = 2e-7 if kind == "DoRA" else 0  # its lengths cancel up to rounding
        np.testing.assert_allclose(merged[name], value, rtol=ulp, atol=0, err_msg=name)
    ours = jax.jit(model.apply)(params, batch).logits_BTV
    np.testing.assert_allclose(ours, jax.jit(plain.apply)(expected, batch).logits_BTV, rtol=0, atol=1e-5)


def test_initial_parameters_are_those_of_the_model_without_updates_and_the_updates():
    model, plain = models("DoRA", adapters={})
    params, expected = paths(model.init(jax.random.key(3))), paths(plain.init(jax.random.key(3)))
    assert paths(model.abstract()).keys() == params.keys() == paths(model.traits).keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(params[name], value, err_msg=name)
    for name in params.keys() - expected.keys():
        if name.endswith("/down"):  # of variance 1 / inputs
            assert 0.5 < np.std(params[name]) * params[name].shape[-2] ** 0.5 < 1.5, name
        else:
            assert not np.any(params[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_merged_matrices_are_those_of_the_paper_and_predict_the_same(kind, batch):
    model, plain = models(kind)
    params, low_rank = updated(model), KINDS[kind]
    whole = jax.jit(model.merge)(params)
    merged, values, updates = paths(whole), paths(params), paths(params["low_rank"])
    changed = {name.rpartition("/")[0] for name in updates}
    assert merged.keys() == paths(plain.abstract()).keys() and model.merged.spec == plain.spec
    for name, value in merged.items():
        expected = np.float64(values[name])
        if name in changed:
            scale = low_rank.alpha / (np.sqrt(3) if kind == "rank stabilized" else 3)
            expected = expected + scale * np.float64(updates[f"{name}/down"]) @ np.float64(updates[f"{name}/up"])
            if kind == "DoRA":  # m V / ||V||, where m is a length of its own for each column
                m = np.linalg.norm(np.float64(values[name]), axis=-2, keepdims=True)
                m *= 1 + np.float64(updates[f"{name}/magnitude"])[..., None, :]
                expected = m * expected / np.linalg.norm(expected, axis=-2, keepdims=True)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    ours = jax.jit(model.apply)(params, batch).logits_BTV
    np.testing.assert_allclose(ours, jax.jit(plain.apply)(whole, batch).logits_BTV, rtol=0, atol=1e-5)


def test_matrices_that_match_get_an_update_and_only_these_are_trained():
    model, plain = models("DoRA")
    added = {name for name in paths(model.traits) if name.startswith("low_rank/")}
    matrices = {
        name for name, own in paths(plain.traits).items() if own.decays and ("attention" in name or "mlp" in name)
    }
    assert added == {f"low_rank/{name}/{part}" for name in matrices for part in ("down", "up", "magnitude")}
    assert {name for name, own in paths(model.traits).items() if own.trained} == added
    for name in matrices:
        own, down, up = (paths(model.traits)[n] for n in (name, f"low_rank/{name}/down", f"low_rank/{name}/up"))
        assert (*down.shape[:-1], up.shape[-1]) == own.shape and down.shape[-1] == up.shape[-2] == 3
        assert (down.axes[:-1], up.axes[-1], down.axes[-1]) == (own.axes[:-1], own.axes[-1], None)


def test_parameters_named_in_also_are_trained_in_full():
    spec = tiny(depth=1).replace(low_rank=LowRank("decoder/.*attention", also="^adapters/image/"))
    trained = {name.split("/")[0] for name, own in paths(bind(spec, 31).traits).items() if own.trained}
    assert trained == {"low_rank", "adapters"}


def test_columns_of_zeros_keep_a_finite_gradient():
    low_rank = LowRank("w", rank=1, magnitude=True)
    updates = {"down": jnp.ones((2, 1)), "up": jnp.zeros((1, 3)), "magnitude": jnp.zeros(3)}
    params = {"w": jnp.zeros((2, 3)), "low_rank": {"w": updates}}
    gradient = jax.grad(lambda params: jnp.sum(low_rank.merged(params)["w"] ** 2))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("field", [{"pattern": "nowhere"}, {"pattern": "norm"}])
def test_a_pattern_that_matches_no_matrix_is_refused(field):
    with pytest.raises(SpecError, match="matches no matrix: names are like"):
        bind(tiny().replace(low_rank=LowRank(**field)), 31)


def test_a_pattern_in_also_that_matches_no_parameter_is_refused():
    with pytest.raises(SpecError, match="low_rank.also.*matches no parameter"):
        bind(tiny().replace(low_rank=LowRank("attention", also="^adapter/")), 31)


def test_a_decayed_vector_is_no_matrix():
    traits = {"scale": Traits((3,), (None,), decays=True), "kernel": Traits((2, 3), (None, None), decays=True)}
    assert set(LowRank(".").matrices(traits)) == {"kernel"}


def test_matrices_are_merged_in_the_same_order_in_every_process():
    """Or else processes compile different programs: the order of a set of strings differs between processes."""
    low_rank, sizes = LowRank(".", rank=1), range(2, 14)
    matrices = {f"w{size}": Traits((1, size), (None, None), decays=True) for size in sizes}
    params = {name: jnp.zeros(own.shape) for name, own in matrices.items()}
    params |= low_rank.initial(jax.random.key(0), matrices)
    program = jax.make_jaxpr(low_rank.merged)(params)
    products = [line.outvars[0].aval.shape[1] for line in program.eqns if line.primitive.name == "dot_general"]
    assert products == [int(name.split("/")[0][1:]) for name in paths(params["low_rank"]) if name.endswith("down")]


def test_invalid_fields_are_refused():
    with pytest.raises(SpecError, match="alpha is 0"):
        LowRank("x", alpha=0.0)
    with pytest.raises(SpecError, match="rank is 0"):
        LowRank("x", rank=0)
    with pytest.raises(SpecError, match="regular expression"):
        LowRank("(")
    with pytest.raises(SpecError, match="low_rank"):
        tiny(width=32).replace(low_rank=LowRank("x"), mup=MuP({"decoder.width": 16}))


def trained_gradient(model, computed):
    """(The gradient of a scalar of the logits with respect to what is trained, the logits), compiled."""

    def scalar(trained, frozen, batch):
        logits_BTV = computed(tree_of(trained | frozen), batch)
        return jnp.sum(jnp.sin(jnp.arange(logits_BTV.size).reshape(logits_BTV.shape)) * logits_BTV), logits_BTV

    return jax.jit(jax.grad(scalar, has_aux=True))


def divided(model, params):
    """The parameters by name: (trained, frozen)."""
    trained = {name: params[name] for name, own in paths(model.traits).items() if own.trained}
    return trained, {name: value for name, value in params.items() if name not in trained}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind, stack",
    [
        ("DoRA", {"remat": "dots"}),
        pytest.param("DoRA", {"remat": "none"}, marks=SLOW),
        pytest.param("DoRA", {"scan": False, "remat": "full"}, marks=SLOW),
        pytest.param("rank stabilized", {"remat": "none"}, marks=SLOW),
        pytest.param("rank stabilized", {"scan": False, "remat": "none"}, marks=SLOW),
    ],
)
def test_updates_inside_the_blocks_equal_merged_matrices(kind, stack):
    model, plain = models(kind, adapters={}, **stack)
    batch = build([(example(9, seed=1), example(7, seed=2))], 20, adapters={})
    given = *divided(model, paths(updated(model, 0.1))), batch
    found, ours = trained_gradient(model, lambda params, batch: model.apply(params, batch).logits_BTV)(*given)
    merged = trained_gradient(model, lambda params, batch: plain.apply(model.merge(params), batch).logits_BTV)
    expected, logits_BTV = merged(*given)
    for name, value in (expected | {"logits": logits_BTV}).items():
        atol = (1e-6 if name == "logits" else 3e-6) * np.abs(value).max()
        np.testing.assert_allclose((found | {"logits": ours})[name], value, rtol=0, atol=atol, err_msg=name)


def test_experts_and_other_modules_that_read_their_matrices_get_them_merged(batch):
    spec = tiny(adapters=LIGHT, mlp=MixtureOfExperts(experts=3, top_k=2)).replace(low_rank=KINDS["DoRA"])
    model, plain = bind(spec, 31), bind(spec.replace(low_rank=None), 31)
    params = updated(model)
    assert any("experts" in name or "gate" in name for name in paths(params["low_rank"]))
    ours = jax.jit(model.apply)(params, batch).logits_BTV
    expected = jax.jit(lambda *given: plain.apply(model.merge(given[0]), given[1]).logits_BTV)(params, batch)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [pytest.param("LoRA", marks=SLOW), "DoRA"])
def test_a_training_step_holds_neither_merged_matrices_nor_their_gradients(kind):
    low_rank = KINDS[kind].replace(pattern="decoder/.*kernel")
    model = bind(tiny(adapters={}, width=64, depth=8, remat="full").replace(low_rank=low_rank), 31)
    params, batch = paths(model.abstract()), build([(example(14),)], 16, adapters={})
    trained, frozen = divided(model, params)
    matrices = sum(4 * np.prod(value.shape) for name, value in frozen.items() if "kernel" in name)

    def temporary(computed):
        program = trained_gradient(model, computed).lower(trained, frozen, batch).compile()
        return program.memory_analysis().temp_size_in_bytes

    inside = temporary(lambda params, batch: model.apply(params, batch).logits_BTV)
    merged = temporary(lambda params, batch: model.merged.apply(model.merge(params), batch).logits_BTV)
    assert inside < 0.4 * matrices < 2 * matrices < merged + inside / 2


def test_decoding_step_by_step_applies_updates_without_merging():
    model, _ = models("LoRA", adapters={}, width=64)
    batch = build([(example(1),)], 1, adapters={})
    program = jax.make_jaxpr(model.decode)(model.abstract(), batch, model.init_cache(1, 4))
    text = str(program)
    assert "dot_general" in text and "f32[2,64,64] = dot_general" not in text and "f32[64,64] = dot_general" not in text
