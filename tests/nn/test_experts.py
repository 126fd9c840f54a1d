"""Mixtures of experts against a loop over positions in float64, and what they must not depend on."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from polygpt.errors import SpecError
from polygpt.nn.experts import MixtureOfExperts

B, T, D, E = 3, 10, 8, 4
RNG = np.random.default_rng(0)
X_BTD = np.float32(RNG.normal(size=(B, T, D)))
SEGMENT_BT = np.int32([[1] * 6 + [2] * 4, [1] * 7 + [0] * 3, [0] * T])
MODALITY_BT = np.where(SEGMENT_BT > 0, RNG.integers(0, 3, (B, T)), -1).astype(np.int32)

SPECS = {
    "dropless": MixtureOfExperts(E, 2),
    "three of four, not normalised, two shared": MixtureOfExperts(E, 3, normalize=False, shared=2),
    "switch": MixtureOfExperts(E, 1, normalize=False, capacity=1.0, activation="gelu"),
    "capacity": MixtureOfExperts(E, 2, capacity=0.6, shared=1),
    "groups": MixtureOfExperts(6, 2, groups=(2, 1, 1)),
    "groups, capacity, batch": MixtureOfExperts(
        6, 2, normalize=False, capacity=0.5, groups=(2, 2, 2), balance="batch"
    ),
}  # fmt: skip


def context(segment_BT=SEGMENT_BT, modality_BT=MODALITY_BT, training=True):
    return SimpleNamespace(query=SimpleNamespace(segment=segment_BT, modality=modality_BT), training=training)


def built(spec, seed=1):
    """(function of parameters and arrays, lively parameters)"""
    graphdef, state = nnx.split(spec.build(D, rngs=nnx.Rngs(0), dtype="float32", output_scale=1.0))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.5, x.shape)), nnx.to_pure_dict(state))

    def run(params, x_BTD, segment_BT=SEGMENT_BT, modality_BT=MODALITY_BT, training=True):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)(x_BTD, context(segment_BT, modality_BT, training))

    return run, params


# --- the loop ---------------------------------------------------------------------------------------------------------


def activate(name, x):
    if name == "silu":
        return x / (1 + np.exp(-x))
    return x * (1 + erf(x / np.sqrt(2))) / 2


def expert(p, e, x, name):
    gate, up, down = (np.float64(p[part]["kernel"][e]) for part in ("gate", "up", "down"))
    return (activate(name, x @ gate) * (x @ up)) @ down


def may_choose(spec, modality):
    if not spec.groups:
        return list(range(spec.experts))
    start = sum(spec.groups[:modality])
    return [*range(start, start + spec.groups[modality]), *range(sum(spec.groups), spec.experts)]


def reference(spec, params, x_BTD, segment_BT, modality_BT, capacity):
    """(y, losses): position after position, in float64."""
    y_BTD = np.zeros(x_BTD.shape)
    dropped = z = balance = 0.0
    tallies = {}
    for b in range(len(x_BTD)):
        taken = dict.fromkeys(range(spec.experts), 0)
        for t in range(x_BTD.shape[1]):
            x = np.float64(x_BTD[b, t])
            if spec.shared:
                gate, up, down = (np.float64(params["shared"][part]["kernel"]) for part in ("gate", "up", "down"))
                y_BTD[b, t] += (activate(spec.activation, x @ gate) * (x @ up)) @ down
            if segment_BT[b, t] == 0:
                continue
            mine = may_choose(spec, modality_BT[b, t])
            logits = (x @ np.float64(params["router"]["kernel"]))[mine]
            z += np.log(np.exp(logits).sum()) ** 2
            likely = dict(zip(mine, np.exp(logits) / np.exp(logits).sum(), strict=True))
            chosen = sorted(mine, key=lambda e: -likely[e])[: spec.top_k]
            norm = sum(likely[e] for e in chosen) if spec.normalize else 1.0
            key = (None if spec.balance == "batch" else b, modality_BT[b, t] if spec.groups else None)
            tally = tallies.setdefault(
                key, {"n": 0, "E": len(mine), "f": np.zeros(spec.experts), "P": np.zeros(spec.experts)}
            )
            tally["n"] += 1
            for e, p in likely.items():
                tally["P"][e] += p
            for e in chosen:
                tally["f"][e] += 1
                taken[e] += 1
                if capacity is not None and taken[e] > capacity:
                    dropped += 1 / spec.top_k
                else:
                    y_BTD[b, t] += likely[e] / norm * expert(params["experts"], e, x, spec.activation)
    for tally in tallies.values():
        n, k = tally["n"], spec.top_k
        balance += n * tally["E"] * np.sum(tally["f"] / (k * n) * tally["P"] / n)
    return y_BTD, {"load_balance": balance, "router_z": z} | ({} if capacity is None else {"dropped": dropped})


@pytest.mark.parametrize("name", SPECS)
def test_it_is_the_loop_over_positions(name):
    spec = SPECS[name]
    run, params = built(spec)
    y_BTD, losses = jax.jit(run)(params, X_BTD)
    capacity = None if spec.capacity is None else int(np.ceil(spec.capacity * spec.top_k * T / spec.experts))
    expected_BTD, expected = reference(spec, params, X_BTD, SEGMENT_BT, MODALITY_BT, capacity)
    np.testing.assert_allclose(y_BTD, expected_BTD, rtol=0, atol=1e-5 * np.abs(expected_BTD).max())
    assert losses.keys() == expected.keys()
    for loss, value in expected.items():
        np.testing.assert_allclose(losses[loss], value, rtol=1e-5)
    assert capacity is None or expected["dropped"] > 0, "something is dropped"


def test_capacity_for_all_is_dropless():
    spec = MixtureOfExperts(E, 2, capacity=E / 2)
    assert spec.slots(T) == T
    (run, params), (dropless, _) = built(spec), built(spec.replace(capacity=None))

    def outputs(run):
        def total(params, x_BTD):
            y_BTD, losses = run(params, x_BTD)
            dropped = losses.pop("dropped", 0)
            return jnp.sum(jnp.sin(y_BTD)) + losses["load_balance"] + losses["router_z"], (y_BTD, dropped)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(params, X_BTD)

    ours, others = outputs(run), outputs(dropless)
    assert ours[0][1][1] == 0
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_gradients_equal_finite_differences():
    """Where no choice changes: the routers' weights, the experts and the input are all differentiated."""
    spec = MixtureOfExperts(E, 2, capacity=0.6)
    run, params = built(spec)

    @jax.jit
    def total(params):
        y_BTD, losses = run(params, X_BTD)
        return jnp.sum(jnp.sin(y_BTD)) + 0.1 * losses["load_balance"] + 0.01 * losses["router_z"]

    gradient, step = jax.grad(total)(params), 1e-2
    rng = np.random.default_rng(5)
    for path in (("router", "kernel"), ("experts", "down", "kernel"), ("experts", "gate", "kernel")):
        along = jax.tree.map(np.zeros_like, params)
        inner, slope = along, gradient
        for key in path[:-1]:
            inner, slope = inner[key], slope[key]
        inner[path[-1]] = direction = np.float32(rng.normal(size=inner[path[-1]].shape))
        direction /= np.linalg.norm(direction)

        def at(s, along=along):
            return float(total(jax.tree.map(lambda p, d: p + np.float32(s) * d, params, along)))

        # Richardson: errors of fourth order; float32 sums leave some 1e-4 of the difference.
        expected = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
        np.testing.assert_allclose(np.sum(slope[path[-1]] * direction), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["dropless", "capacity", "groups"])
def test_padding_touches_nothing(name):
    spec = SPECS[name]
    run, params = built(spec)
    run = jax.jit(run)
    real = SEGMENT_BT > 0
    y_BTD, losses = run(params, X_BTD)
    noisy_BTD, noisy = run(params, np.where(real[..., None], X_BTD, 9.0).astype(np.float32))
    np.testing.assert_array_equal(y_BTD[real], noisy_BTD[real])
    assert losses == noisy or all(losses[key] == noisy[key] for key in losses)
    if not spec.shared:
        assert not np.asarray(y_BTD)[~real].any()


@pytest.mark.parametrize("name", ["dropless", "capacity"])
def test_nothing_sees_what_comes_later(name):
    """Neither by gradient nor, where places run out, by who gets one."""
    spec = SPECS[name]
    run, params = built(spec)
    one = (SEGMENT_BT[:1], MODALITY_BT[:1])

    @jax.jit
    def influence(x_BTD):
        """[T, T]: of a position by another, one row after the other."""
        _, back = jax.vjp(lambda x_BTD: run(params, x_BTD, *one)[0], x_BTD)
        basis = jnp.eye(T * D).reshape(T * D, 1, T, D)
        return jnp.abs(jax.lax.map(lambda row: back(row)[0], basis)).reshape(T, D, T, D).max(axis=(1, 3))

    seen_TT = np.asarray(influence(X_BTD[:1]))
    assert not seen_TT[~np.eye(T, dtype=bool)].any(), "each position goes its own way"
    run = jax.jit(run)
    before = np.asarray(run(params, X_BTD[:1], *one)[0])
    for t in range(1, T):
        changed = X_BTD[:1].copy()
        changed[:, t:] = -changed[:, t:]
        np.testing.assert_array_equal(run(params, changed, *one)[0][:, :t], before[:, :t])


def test_nothing_is_dropped_outside_training():
    run, params = built(SPECS["capacity"])
    dropless, _ = built(SPECS["capacity"].replace(capacity=None))
    got, losses = jax.jit(functools.partial(run, training=False))(params, X_BTD)
    np.testing.assert_array_equal(got, jax.jit(dropless)(params, X_BTD)[0])
    assert losses["dropped"] == 0 and jax.jit(run)(params, X_BTD)[1]["dropped"] > 0


@pytest.mark.parametrize("capacity", [None, 1.25])
def test_experts_that_nobody_chooses_have_zero_gradients(capacity):
    run, params = built(MixtureOfExperts(E, 1, normalize=False, capacity=capacity))
    params["router"]["kernel"][:] = np.float32([[5, -5, -5, -5]])

    def total(params, x_BTD):
        y_BTD, losses = run(params, x_BTD)
        return jnp.sum(jnp.sin(y_BTD)) + losses["load_balance"] + losses["router_z"]

    gradient, towards_x = jax.jit(jax.grad(total, argnums=(0, 1)))(params, np.abs(X_BTD))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, towards_x)))
    for part in gradient["experts"].values():
        assert part["kernel"][0].any() and not part["kernel"][1:].any()


def test_the_router_is_float32_and_the_layer_keeps_its_dtype():
    spec = MixtureOfExperts(E, 2, capacity=2.0)
    graphdef, state = nnx.split(spec.build(D, rngs=nnx.Rngs(0), dtype="bfloat16", output_scale=1.0))
    half = jnp.asarray(X_BTD, jnp.bfloat16)
    y_BTD, losses = jax.jit(lambda state, x_BTD: nnx.merge(graphdef, state)(x_BTD, context()))(state, half)
    assert y_BTD.dtype == jnp.bfloat16 and all(loss.dtype == jnp.float32 for loss in losses.values())
    logits = nnx.merge(graphdef, state).router(half)
    expected = np.float64(np.float32(half)) @ np.float64(nnx.to_pure_dict(state)["router"]["kernel"])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_told():
    for fields, words in [
        ({"top_k": 9}, r"top_k is 9: it must be from 1 to the 8 experts"),
        ({"top_k": 1}, "normalize is True: it must be false with top_k 1"),
        ({"capacity": 0.0}, "capacity is 0.0: it must be null or above 0"),
        ({"groups": (4, 5)}, r"groups is \(4, 5\): it must be at most 8 experts"),
        (
            {"groups": (7, 1)},
            r"groups is \(7, 1\): it must be such that each modality can choose from 2 experts",
        ),
    ]:
        with pytest.raises(SpecError, match=words):
            MixtureOfExperts(**fields)
    with pytest.raises(SpecError, match=r"groups is \(4, 2\): .*one number for each of text, image, audio"):
        MixtureOfExperts(groups=(4, 2)).check_modalities(("text", "image", "audio"))
