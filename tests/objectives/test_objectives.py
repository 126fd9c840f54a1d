"""Objectives against formulas, and their silence where the loss weight is 0."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import tiny
from polygpt.errors import SpecError
from polygpt.objectives.base import Objective
from polygpt.objectives.dpo import DPO
from polygpt.objectives.focal import Focal
from polygpt.objectives.masked_lm import MaskedLM
from polygpt.objectives.multi_token import MultiToken
from polygpt.objectives.next_token import NextToken
from polygpt.objectives.r_drop import RDrop
from polygpt.objectives.unlikelihood import Unlikelihood
from polygpt.objectives.z_loss import ZLoss

B, T, V = 3, 5, 11


@pytest.fixture
def logits_BTV():
    return np.random.default_rng(0).normal(size=(B, T, V)).astype(np.float32) * 3


@pytest.fixture
def batch():
    rng = np.random.default_rng(1)
    weight_BT = rng.choice([0.0, 0.5, 1.0], size=(B, T)).astype(np.float32)
    weight_BT[-1] = 0.0  # a padding row
    return SimpleNamespace(target_BT=rng.integers(0, V, (B, T), np.int32), weight_BT=weight_BT)


def outputs(logits_BTV):
    return SimpleNamespace(logits_BTV=jnp.asarray(logits_BTV))


def log_probabilities(logits_BTV):
    logits_BTV = logits_BTV.astype(np.float64)
    return logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))


def test_next_token_is_the_weighted_cross_entropy(logits_BTV, batch):
    total, weight = NextToken()(outputs(logits_BTV), batch)
    picked_BT = np.take_along_axis(log_probabilities(logits_BTV), batch.target_BT[..., None], -1)[..., 0]
    np.testing.assert_allclose(total, -(picked_BT * batch.weight_BT).sum(), rtol=1e-6)
    np.testing.assert_allclose(weight, batch.weight_BT.sum(), rtol=0)
    assert total.dtype == weight.dtype == jnp.float32


def test_label_smoothing_is_cross_entropy_with_the_smoothed_target(logits_BTV, batch):
    smooth = 0.1
    total, _ = NextToken(label_smoothing=smooth)(outputs(logits_BTV), batch)
    target_BTV = (1 - smooth) * np.eye(V)[batch.target_BT] + smooth / V
    expected_BT = -(target_BTV * log_probabilities(logits_BTV)).sum(-1)
    np.testing.assert_allclose(total, (expected_BT * batch.weight_BT).sum(), rtol=1e-6)


def test_label_smoothing_outside_its_range_is_refused():
    with pytest.raises(SpecError, match="label_smoothing is 1.0"):
        NextToken(label_smoothing=1.0)


def test_z_loss_is_the_square_of_the_log_normaliser(logits_BTV, batch):
    total, _ = ZLoss()(outputs(logits_BTV), batch)
    log_z_BT = np.log(np.exp(logits_BTV.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(total, (log_z_BT**2 * batch.weight_BT).sum(), rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5])
def test_focal_loss_weights_the_cross_entropy_by_what_is_missing_to_certainty(gamma, logits_BTV, batch):
    total, _ = Focal(gamma)(outputs(logits_BTV), batch)
    log_p_BT = np.take_along_axis(log_probabilities(logits_BTV), batch.target_BT[..., None], -1)[..., 0]
    expected_BT = -((1 - np.exp(log_p_BT)) ** gamma) * log_p_BT
    np.testing.assert_allclose(total, (expected_BT * batch.weight_BT).sum(), rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_focal_loss_of_a_certain_token_has_a_gradient_of_zero(gamma):
    batch = SimpleNamespace(target_BT=jnp.asarray([[0]]), weight_BT=jnp.ones((1, 1)))
    gradient = jax.grad(lambda logits: Focal(gamma)(outputs(logits), batch)[0])(jnp.asarray([[[60.0, 0.0, -5.0]]]))
    np.testing.assert_allclose(gradient, np.zeros((1, 1, 3)), atol=1e-12)


def test_an_exponent_without_a_finite_gradient_is_refused():
    with pytest.raises(SpecError, match="gamma is 0.5"):
        Focal(0.5)


@pytest.mark.parametrize("objective", [NextToken(label_smoothing=0.1), ZLoss()], ids=["next_token", "z_loss"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38])
def test_positions_without_weight_reach_neither_sum_nor_gradient(objective, garbage, logits_BTV, batch):
    unused_BT = batch.weight_BT == 0

    def loss(logits):
        return objective(outputs(logits), batch)[0]

    dirty_BTV = np.where(unused_BT[..., None], garbage, logits_BTV).astype(np.float32)
    clean, gradient = jax.value_and_grad(loss)(logits_BTV)
    dirty, dirty_gradient = jax.value_and_grad(loss)(dirty_BTV)
    assert clean == dirty
    np.testing.assert_array_equal(gradient, dirty_gradient)
    assert not np.any(np.asarray(gradient)[unused_BT]) and np.any(gradient)


@pytest.mark.parametrize("objective", [NextToken(), ZLoss()], ids=["next_token", "z_loss"])
def test_sums_and_weights_of_parts_add_up_to_the_whole(objective, logits_BTV, batch):
    whole = objective(outputs(logits_BTV), batch)
    rows = [SimpleNamespace(target_BT=batch.target_BT[i], weight_BT=batch.weight_BT[i]) for i in range(B)]
    parts = [objective(outputs(logits_BTV[i]), row) for i, row in enumerate(rows)]
    np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=1e-6)


def test_an_objective_that_defines_no_total_says_so(logits_BTV, batch):
    with pytest.raises(NotImplementedError, match="Objective defines no total"):
        Objective()(outputs(logits_BTV), batch)


def test_logits_of_minus_infinity_beside_the_target_leave_the_loss_finite():
    logits = jnp.asarray([[[1.0, -jnp.inf, 0.5]]])
    batch = SimpleNamespace(target_BT=jnp.asarray([[0]]), weight_BT=jnp.ones((1, 1)))
    total = NextToken().total(SimpleNamespace(logits_BTV=logits), batch)
    np.testing.assert_allclose(total, np.log(1 + np.exp(-0.5)), rtol=1e-6)


def test_a_negative_weight_raises_the_loss_of_its_token():
    logits = jnp.asarray([[[1.0, 0.0], [2.0, 0.0]]])
    batch = SimpleNamespace(target_BT=jnp.asarray([[0, 0]]), weight_BT=jnp.asarray([[1.0, -1.0]]))
    total = NextToken().total(SimpleNamespace(logits_BTV=logits), batch)
    np.testing.assert_allclose(total, np.log1p(np.exp(-1)) - np.log1p(np.exp(-2)), rtol=1e-6)


def test_a_mask_that_shows_the_targets_or_hides_what_is_read_is_refused():
    encoder, causal = tiny(mask="bidirectional"), tiny(mask="causal")
    for objective in (NextToken(), Focal(), DPO(), MultiToken(("next",)), Unlikelihood(), RDrop()):
        with pytest.raises(SpecError, match=r"predicts the next token, which model\.decoder\.mask .* shows"):
            objective.check_with(encoder, None)
    with pytest.raises(SpecError, match=r"set model\.decoder\.mask to 'spans' or 'bidirectional'"):
        MaskedLM.small().check_with(causal, None)
    for objective, model in ((MaskedLM.small(), encoder), (ZLoss(), encoder), (NextToken(), causal)):
        objective.check_with(model, None)
