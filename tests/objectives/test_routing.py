"""Objectives of routed layers, through a model: means over real positions, however the rows are split."""

import jax
import numpy as np
import pytest

from batches import build, example, lively, tiny
from polygpt.errors import SpecError
from polygpt.models.functional import bind
from polygpt.nn.experts import MixtureOfExperts
from polygpt.objectives.dropped import Dropped
from polygpt.objectives.load_balance import LoadBalance
from polygpt.objectives.router_z import RouterZLoss

OBJECTIVES = [LoadBalance(), RouterZLoss(), Dropped()]
BATCH = build([[example(9, seed=1)], [example(5, seed=2), example(7, seed=3)], []], 12, adapters={})


@pytest.fixture(scope="module")
def model():
    """(function of a batch giving the (total, weight) of every objective, model, parameters)"""
    model = bind(tiny(adapters={}, mlp=MixtureOfExperts(4, 2, capacity=0.8)), 31)
    params = lively(model)

    def evaluate(batch):
        outputs = model.apply(params, batch, jax.random.key(0))  # as in training, where choices are dropped
        return [objective(outputs, batch) for objective in OBJECTIVES]

    return jax.jit(evaluate), model, params


def test_sums_and_weights_of_parts_add_up_to_the_whole(model):
    evaluate, _, _ = model
    whole = evaluate(BATCH)
    parts = [evaluate(jax.tree.map(lambda x, b=b: x[b : b + 1], BATCH)) for b in range(3)]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-5)
    assert [float(weight) for _, weight in whole] == [21.0] * 3
    (balance, _), (z, _), (dropped, _) = whole
    assert 2 * 1.0 <= balance / 21 <= 2 * 2.0, "two layers, each from 1 to E / top_k"
    assert z > 0 and 0 < dropped / 21 < 2
    assert parts[2][0][0] == 0, "a row of padding alone"


def test_routers_that_choose_alike_are_balanced(model):
    """Equal logits: probabilities are equal, and the loss is 1 a layer whatever is chosen."""
    _, model, params = model
    params = jax.tree.map(np.copy, params)
    params["decoder"]["blocks"]["mlp"]["router"]["kernel"][:] = 0
    outputs = jax.jit(model.apply)(params, BATCH)
    total, weight = LoadBalance()(outputs, BATCH)
    np.testing.assert_allclose(total / weight, 2.0, rtol=1e-5)
    total, weight = RouterZLoss()(outputs, BATCH)
    np.testing.assert_allclose(total / weight, 2 * np.log(4) ** 2, rtol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.loss)
def test_a_model_without_routed_layers_is_told(objective):
    model = bind(tiny(adapters={}), 31)
    with pytest.raises(SpecError, match=f"{type(objective).__name__} needs '{objective.loss}', which no layer"):
        jax.eval_shape(lambda params: objective(model.apply(params, BATCH), BATCH), model.abstract())
