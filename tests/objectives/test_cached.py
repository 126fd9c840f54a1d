"""Objectives that read cached log-probabilities, against formulas in float64 and against the model itself."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from given import close, given, log_softmax, total, value_and_gradient

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from bigram import random_batch

from polygpt.errors import SpecError
from polygpt.objectives.distillation import Distillation
from polygpt.objectives.dpo import DPO
from polygpt.objectives.ipo import IPO
from polygpt.objectives.simpo import SimPO
from polygpt.objectives.span_distillation import SpanDistillation
from polygpt.objectives.top_k_distillation import TopKDistillation
from polygpt.sequence import FIRST, INSIDE_SPAN

B, T, V, K = 3, 11, 40, 16
STUDENT, TEACHER = given(B, T, V), given(B, T, V, D=9, seed=1)


def with_top(batch, k, where=None):
    """The batch with the teacher's k most likely tokens where a token is scored."""
    log_p_BTV = log_softmax(TEACHER)
    ids_BTk = np.argsort(-log_p_BTV, axis=-1)[..., :k].astype(np.int32)
    where_BT = batch.weight_BT != 0 if where is None else where
    log_p_BTk = np.where(where_BT[..., None], np.take_along_axis(log_p_BTV, ids_BTk, axis=-1), np.nan)
    extra = {"teacher.ids": np.where(where_BT[..., None], ids_BTk, 0), "teacher.log_p": np.float32(log_p_BTk)}
    return batch.replace(extra=extra)


@pytest.fixture
def batch():
    weight_BT = np.random.default_rng(1).choice([0.0, 0.5, 1.0], size=(B, T)).astype(np.float32)
    weight_BT[-1] = 0  # a row of padding
    return random_batch(B, T, weight=weight_BT)


@pytest.mark.parametrize(
    "temperature, remainder, block", [(1.0, "bucket", None), (1.0, "renormalised", 7), (2.5, "renormalised", None)]
)
def test_all_tokens_give_the_loss_of_the_teacher_itself(temperature, remainder, block, batch):
    online = value_and_gradient(Distillation(temperature=temperature), STUDENT, batch, {"teacher": TEACHER})
    objective = TopKDistillation(temperature=temperature, remainder=remainder)
    close(value_and_gradient(objective, STUDENT, with_top(batch, V), block=block), online, 1e-6)
    np.testing.assert_allclose(objective.weight(with_top(batch, V)), Distillation().weight(batch))


@pytest.mark.parametrize("temperature, remainder", [(1.0, "bucket"), (1.0, "renormalised"), (2.5, "renormalised")])
@pytest.mark.parametrize("block", [None, 7])
def test_some_tokens_and_the_remainder(temperature, remainder, block, batch):
    with_scores = with_top(batch, K)
    objective = TopKDistillation(temperature=temperature, remainder=remainder)
    value, gradient = value_and_gradient(objective, STUDENT, with_scores, block=block)
    ids_BTk = np.argsort(-log_softmax(TEACHER), axis=-1)[..., :K]
    p_BTk, q_BTk = (
        np.take_along_axis(np.exp(log_softmax(one | {"head": np.float64(one["head"]) / t})), ids_BTk, axis=-1)
        for one, t in ((TEACHER, 1.0), (STUDENT, temperature))
    )
    if remainder == "bucket":
        p_BTk, q_BTk = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], axis=-1) for x in (p_BTk, q_BTk))
    else:
        p_BTk = p_BTk ** (1 / temperature)
        p_BTk /= p_BTk.sum(-1, keepdims=True)
    expected = temperature**2 * np.sum(batch.weight_BT * np.sum(p_BTk * np.log(p_BTk / q_BTk), axis=-1))
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    assert np.isfinite(np.asarray(gradient["hidden"])).all()


def test_a_remainder_without_probability_is_no_fault(batch):
    certain = with_top(batch, 2)
    certain.extra["teacher.log_p"][..., 0] *= 0  # probability 1
    certain.extra["teacher.log_p"][..., 1] = np.where(batch.weight_BT != 0, -np.inf, np.nan)
    value, gradient = value_and_gradient(TopKDistillation(), STUDENT, certain)
    likely_BT = np.take_along_axis(log_softmax(STUDENT), certain.extra["teacher.ids"], axis=-1)[..., 0]
    np.testing.assert_allclose(value, -np.sum(batch.weight_BT * likely_BT), rtol=1e-6)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("objective", [TopKDistillation(), SpanDistillation()])
@pytest.mark.parametrize("block", [None, 7])
def test_positions_without_weight_reach_neither_sum_nor_gradient(objective, block, batch):
    with_scores = with_top(batch, K)
    with_scores.extra["teacher"] = np.where(batch.weight_BT != 0, -1.0, np.nan).astype(np.float32)
    clean = value_and_gradient(objective, STUDENT, with_scores, block=block)
    unused_BT1 = (batch.weight_BT == 0)[..., None]
    dirty = STUDENT | {"hidden": np.where(unused_BT1, np.nan, STUDENT["hidden"])}
    found = value_and_gradient(objective, dirty, with_scores, block=block)
    if block is None:
        found[1]["head"] = clean[1]["head"]  # of all logits: a product with all hidden vectors
    jax.tree.map(np.testing.assert_array_equal, found, clean)
    assert clean[0] > 0 and not np.any(np.asarray(clean[1]["hidden"])[unused_BT1[..., 0]])


def test_what_was_not_written_is_told(batch):
    with pytest.raises(
        SpecError, match="the scores 'teacher' are not in data.scores: write them with polygpt data score"
    ):
        TopKDistillation().weight(batch)
    only_targets = batch.replace(extra={"teacher": np.zeros((B, T), np.float32)})
    with pytest.raises(
        SpecError, match="'teacher' were written without --top: write them with polygpt data score --top 16"
    ):
        TopKDistillation().weight(only_targets)
    with pytest.raises(
        SpecError, match="remainder is 'bucket': it must be renormalised with a temperature other than 1"
    ):
        TopKDistillation(temperature=2.0)


SPANS = [[(0, 3), (3, 4), (6, 9)], [(1, 2), (2, 7), (7, 11)], []]
"""By row, where spans begin and end."""


@pytest.mark.parametrize("temperature", [1.0, 100.0])
@pytest.mark.parametrize("block", [None, 7])
def test_spans_are_compared_as_two_outcomes(temperature, block):
    rng = np.random.default_rng(3)
    batch = random_batch(B, T, weight=1.0)
    given_BT, weight_BT = np.full((B, T), np.nan, np.float32), np.zeros((B, T), np.float32)
    own_BT = np.take_along_axis(log_softmax(STUDENT), np.asarray(batch.target_BT)[..., None], axis=-1)[..., 0]
    expected = 0.0
    for b, spans in enumerate(SPANS):
        for begin, end in spans:
            given_BT[b, begin : end - 1] = INSIDE_SPAN
            given_BT[b, end - 1] = -rng.exponential(4.0)
            weight_BT[b, begin:end] = rng.choice([0.5, 1.0])
            p, q = (np.exp(np.float64(x) / temperature) for x in (given_BT[b, end - 1], own_BT[b, begin:end].sum()))
            kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
            expected += weight_BT[b, begin] * temperature * kl
    batch = batch.replace(weight_BT=weight_BT, extra={"teacher": given_BT})
    objective = SpanDistillation(temperature=temperature)
    value, gradient = value_and_gradient(objective, STUDENT, batch, block=block)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(
        objective.weight(batch), sum(weight_BT[b, e - 1] for b, s in enumerate(SPANS) for _, e in s)
    )
    assert not np.asarray(gradient["hidden"])[np.isnan(given_BT)].any()


@pytest.mark.parametrize("objective", [DPO(beta=0.3), IPO(beta=0.3, per_token=True), DPO(label_smoothing=0.2)])
def test_scores_of_answers_replace_the_reference(objective):
    signs_BT = np.zeros((B, T), np.int32)
    signs_BT[0, 1:4], signs_BT[0, 6:10], signs_BT[1, 2:5], signs_BT[1, 8:10] = 1, -1, 1, -1
    signs_BT[[0, 1], [1, 2]] = FIRST
    segment_BT = np.where(np.arange(T) < 5, 1, 2) * np.array([1, 1, 0])[:, None]
    batch = random_batch(B, T, weight=1.0).replace(segment_BT=segment_BT, extra={"preference": signs_BT})
    target_BT = np.asarray(batch.target_BT)
    log_p_BT = np.take_along_axis(log_softmax(TEACHER), target_BT[..., None], axis=-1)[..., 0]
    scores_BT = np.where(signs_BT != 0, log_p_BT, np.nan).astype(np.float32)
    cached = objective.replace(scores="base")
    assert (cached.others, cached.cached) == ((), ("base",)) and objective.cached == ()
    found = value_and_gradient(cached, STUDENT, batch.replace(extra={"preference": signs_BT, "base": scores_BT}))
    close(found, value_and_gradient(objective, STUDENT, batch, {"reference": TEACHER}), 1e-6)
    with pytest.raises(SpecError, match="the scores 'base' are not in data.scores"):
        total(cached, STUDENT, batch)


def test_an_objective_without_a_reference_reads_no_scores():
    with pytest.raises(SpecError, match="scores is 'base': it must be null"):
        SimPO(scores="base")
