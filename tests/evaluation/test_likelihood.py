"""Likelihood against NumPy in float64."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.data.packing import collate
from polygpt.evaluation.likelihood import Likelihoods, score, summary, token_scores
from polygpt.models.multimodal import ModelSpec
from polygpt.objectives.base import scores_and_best
from polygpt.sequence import NAMED_ARRAYS

V, T = 11, 9


class Table:
    """A bigram model: the logits of a position are the row of its token."""

    spec = ModelSpec()

    def apply(self, params, batch, key=None):
        return types.SimpleNamespace(logits_BTV=params[batch.tokens_BT])

    def token_scores(self, params, batch):
        return scores_and_best(self.apply(params, batch).logits_BTV, batch.target_BT)

    def replicated(self, tree):
        return tree


MODEL = Table()
TABLE = np.random.default_rng(0).normal(0, 2, (V, V)).astype(np.float32)
BYTES = np.array([1, 2, 3, 1, 1, 4, 1, 2, 1, 0, 0], np.int32)


def batch_of(n, seed=1):
    """n rows with targets and uneven weights, the last position of each row and every first one unpredicted."""
    rng = np.random.default_rng(seed)
    batch = collate([None] * n, T, {})
    batch.tokens_BT[:] = rng.integers(0, V, (n, T))
    batch.target_BT[:] = rng.integers(0, V, (n, T))
    batch.weight_BT[:] = rng.choice([0, 0.5, 1], (n, T))
    batch.weight_BT[:, [0, -1]] = 0
    batch.weight_BT[:, 1] = 1
    batch.segment_BT[:] = 1
    return batch


def reference(batch):
    """The figures, token by token."""
    loss = weight = nats = size = correct = count = 0
    for token, target, w in zip(batch.tokens_BT.ravel(), batch.target_BT.ravel(), batch.weight_BT.ravel(), strict=True):
        if w == 0:
            continue
        logits = TABLE[token].astype(np.float64)
        nll = np.log(np.exp(logits).sum()) - logits[target]
        loss, weight = loss + w * nll, weight + w
        nats, size = nats + w * nll, size + w * BYTES[target]
        correct, count = correct + (logits.argmax() == target), count + 1
    return {
        "loss": loss / weight,
        "perplexity": np.exp(loss / weight),
        "bits_per_byte": nats / np.log(2) / size,
        "token_accuracy": correct / count,
    }


def rows(batch, start, stop):
    arrays = {name: array[start:stop] for name, array in vars(batch).items() if name not in NAMED_ARRAYS}
    return type(batch)(**arrays, media={})


@pytest.mark.parametrize("size", [1, 4, 12])
def test_figures_equal_numpy_under_any_batch_size(size):
    batch = batch_of(12)
    params = jnp.asarray(TABLE)
    scores = Likelihoods.join(score(MODEL, params, rows(batch, i, i + size), BYTES) for i in range(0, 12, size))
    figures = summary(scores)
    assert figures.pop("n") == 12
    assert figures == pytest.approx(reference(batch), rel=1e-6)
    assert all(type(value) is float for value in figures.values())


def test_padding_rows_and_what_they_hold_do_not_count():
    batch = batch_of(5)
    expected = score(MODEL, jnp.asarray(TABLE), rows(batch, 0, 3), BYTES)
    batch.segment_BT[3:] = 0
    batch.weight_BT[3:] = 0
    assert summary(score(MODEL, jnp.asarray(TABLE), batch, BYTES)) == summary(expected)


def test_packed_examples_are_scored_apart():
    batch = batch_of(2)
    batch.segment_BT[0, 4:], batch.segment_BT[1, 6:] = 2, 0
    batch.weight_BT[1, 6:] = 0
    scores = score(MODEL, jnp.asarray(TABLE), batch, BYTES)
    parts = [(0, slice(0, 4)), (0, slice(4, T)), (1, slice(0, 6))]
    for i, (b, t) in enumerate(parts):
        part = type(batch)(**{k: v[b : b + 1, t] for k, v in vars(batch).items() if k not in NAMED_ARRAYS}, media={})
        assert summary(scores[i : i + 1]) == pytest.approx(reference(part) | {"n": 1}, rel=1e-6)
    assert len(scores.loss) == 3


def test_mean_loss_of_each_example():
    batch = batch_of(4)
    scores = score(MODEL, jnp.asarray(TABLE), batch, BYTES)
    expected = [reference(rows(batch, i, i + 1))["loss"] for i in range(4)]
    assert np.allclose(scores.mean_loss, expected, rtol=1e-6)


def test_unpredicted_positions_may_hold_nan():
    batch = batch_of(2)
    expected = summary(score(MODEL, jnp.asarray(TABLE), batch, BYTES))
    batch.weight_BT[batch.tokens_BT == 3] = 0
    without = summary(score(MODEL, jnp.asarray(TABLE), batch, BYTES))
    spoiled = np.where(np.arange(V)[:, None] == 3, np.nan, TABLE)
    assert summary(score(MODEL, jnp.asarray(spoiled), batch, BYTES)) == without != expected


def test_a_uniform_model_knows_nothing():
    scores = score(MODEL, jnp.zeros((V, V)), batch_of(3), np.ones(V, np.int32))
    figures = summary(scores)
    assert figures["perplexity"] == pytest.approx(V, rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(np.log2(V), rel=1e-6)


def test_text_without_bytes_has_no_bits_per_byte():
    scores = score(MODEL, jnp.asarray(TABLE), batch_of(3), np.zeros(V, np.int32))
    assert "bits_per_byte" not in summary(scores)


def test_sums_are_taken_in_float64():
    n = 1_000_000
    scores = Likelihoods(*(np.full(n, value) for value in (0.1, 1.0, 1.0, 1.0, 1.0)))
    assert summary(scores)["loss"] == pytest.approx(0.1, rel=1e-12)
    assert scores.loss.dtype == np.float64


def test_one_program_serves_all_batches_of_a_shape():
    model, batch = Table(), batch_of(3)
    before = token_scores._cache_size()
    for seed in range(3):
        score(model, jnp.asarray(TABLE) + seed, batch_of(3, seed), BYTES)
    assert token_scores._cache_size() == before + 1
    assert batch.shape == (3, T)


@pytest.mark.filterwarnings("error")
def test_a_perplexity_beyond_all_numbers_is_infinite():
    one = np.ones(1)
    assert summary(Likelihoods(loss=800 * one, weight=one, bytes=one, correct=one, tokens=one))["perplexity"] == np.inf
