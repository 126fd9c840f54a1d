"""Penalties on parameters against their formulas, however the batch is split."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from bigram import Bigram, random_batch

from polygpt.errors import SpecError
from polygpt.objectives.loss import Loss
from polygpt.objectives.parameter_penalty import ParameterPenalty

MODEL = Bigram()
PARAMS, START = (MODEL.init(jax.random.key(i)) for i in range(2))
FROZEN = {"embedding": False, "hidden": {"kernel": True, "bias": True}, "head": {"kernel": True}}


def gradient(objective, accumulate=1):
    loss = Loss(MODEL, {"penalty": (objective, 1.0)}, FROZEN, accumulate)
    seen = loss.seen(random_batch(), jax.random.key(0))
    means, found = loss.gradient(PARAMS, {"start": START}, seen, loss.weights(seen), None)
    return means["penalty"], found


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("toward", [None, "start"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_penalty_and_its_gradient(norm, toward, accumulate):
    value, found = gradient(ParameterPenalty("kernel|embedding", norm, toward), accumulate)
    expected = 0.0
    for part in ("hidden", "head"):  # the embedding is frozen
        x = np.float64(PARAMS[part]["kernel"]) - (np.float64(START[part]["kernel"]) if toward else 0)
        expected += np.abs(x).sum() if norm == "l1" else (x**2).sum() / 2
        np.testing.assert_allclose(found[part]["kernel"], np.sign(x) if norm == "l1" else x, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert not np.any(found["embedding"]) and not np.any(found["hidden"]["bias"])


def test_a_pattern_without_a_trained_parameter_is_refused():
    with pytest.raises(SpecError, match=r"'\^embedding' matches no trained parameter"):
        gradient(ParameterPenalty("^embedding"))
