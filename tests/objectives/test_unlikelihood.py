"""Unlikelihood against its formula in float64."""

import numpy as np
import pytest
from given import close, given, log_softmax, value_and_gradient

from batches import build, example
from polygpt.objectives.unlikelihood import Unlikelihood

V = 31


@pytest.fixture(scope="module")
def batch():
    rows = [[example(6, seed=1), example(("image", 4), 9, seed=2)], [example(12, seed=3)], []]
    batch = build(rows, 20)
    rng = np.random.default_rng(0)
    tokens_BT = np.where(batch.modality_BT == 0, rng.integers(0, 4, batch.shape), 0)  # few, so that they repeat
    weight_BT = batch.weight_BT * rng.choice([0, 0.5, 1], batch.shape)
    return batch.replace(
        tokens_BT=np.int32(tokens_BT), target_BT=np.int32(np.roll(tokens_BT, -1, axis=1)), weight_BT=weight_BT
    )


def candidates(batch, b, t, prompt):
    earlier = range(t + 1)
    return {
        int(batch.tokens_BT[b, s])
        for s in earlier
        if batch.segment_BT[b, s] == batch.segment_BT[b, t]
        and batch.modality_BT[b, s] == 0
        and (prompt or (s > 0 and batch.weight_BT[b, s - 1] != 0))
    } - {int(batch.target_BT[b, t])}


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("block", [None, 7])
def test_values_and_gradients_are_those_of_the_formula(prompt, block, batch):
    params = given(*batch.shape, V)
    value, gradient = value_and_gradient(Unlikelihood(prompt), params, batch, block=block)
    p_BTV = np.exp(log_softmax(params))
    expected, of_logits_BTV = 0.0, np.zeros(p_BTV.shape)
    for b, t in np.argwhere(batch.weight_BT != 0):
        for token in candidates(batch, b, t, prompt):
            p = p_BTV[b, t, token]
            expected -= batch.weight_BT[b, t] * np.log(1 - p)
            of_logits_BTV[b, t] += batch.weight_BT[b, t] * p / (1 - p) * (np.eye(V)[token] - p_BTV[b, t])
    assert expected > 0
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    close(gradient["hidden"], of_logits_BTV @ np.float64(params["head"]).T, 1e-5)


def test_a_certain_repetition_has_a_finite_loss(batch):
    params = {"hidden": np.full((*batch.shape, 1), 90, np.float32), "head": np.eye(1, V, 2, dtype=np.float32)}
    value, gradient = value_and_gradient(Unlikelihood(), params, batch)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in gradient.values())
