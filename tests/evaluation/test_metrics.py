"""Metrics of generated text, and statistics, where the truth is known."""

import numpy as np
import pytest

from polygpt.data.sources.text_files import TextFiles
from polygpt.errors import SpecError
from polygpt.evaluation.bootstrap import bootstrap_mean
from polygpt.evaluation.classification import Classification
from polygpt.evaluation.metric import normalize
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.evaluation.transcription import Transcription


def test_normalize_leaves_what_a_listener_hears():
    assert normalize("  Don't — STOP!  Ça… va: twenty-one. ") == "dont stop ça va twenty one"
    assert normalize("Cafe\u0301") == normalize("café") == "café"
    assert normalize("5 + 3") == "5 + 3"
    assert normalize(" ?! ") == ""


@pytest.mark.parametrize("metric", [Classification(), Transcription()])
def test_a_metric_gives_exactly_what_it_declares(metric):
    figures = metric(["one", "two"], ["one", "three"])
    assert set(figures) == {one.name for one in metric.measures}
    assert all(not one.share or 0 <= figures[one.name] <= 1 for one in metric.measures)


def test_directions_are_known_of_every_measure():
    task = EvalTask(TextFiles(("a.txt",)), metrics=(Classification(), Transcription()))
    known = {name: one.better for name, one in task.measures().items()}
    lower = {"loss", "perplexity", "bits_per_byte", "wer", "cer"}
    assert known == {name: "lower" if name in lower else "higher" for name in known} and lower < set(known)
    assert list(known)[-4:] == ["loss", "perplexity", "bits_per_byte", "token_accuracy"]


def test_classification_by_hand():
    truths = ["one", "one", "two", "three"]
    figures = Classification()(["one", "One. ", "one", "nothing of the sort"], truths)
    assert figures["exact_match"] == 0.25
    assert figures["accuracy"] == 0.5
    # one: precision 2/3, recall 1, F1 0.8; two and three are never right; what is no label only counts as missed.
    assert figures["f1"] == pytest.approx(0.8 / 3)
    assert all(type(value) is float for value in figures.values())


def test_classification_of_perfect_and_of_empty_answers():
    truths = ["cat", "dog"]
    assert Classification()(truths, truths) == {"exact_match": 1.0, "accuracy": 1.0, "f1": 1.0}
    assert Classification()(["", ""], truths) == {"exact_match": 0.0, "accuracy": 0.0, "f1": 0.0}


def edits(truth, prediction):
    """Levenshtein distance, the textbook way."""
    row = list(range(len(prediction) + 1))
    for i, t in enumerate(truth, 1):
        last, row[0] = row[0], i
        for j, p in enumerate(prediction, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (t != p))
    return row[-1]


def test_error_rates_equal_a_textbook_edit_distance():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["a", "bc", "def", "g"], rng.integers(1, 8))) for _ in range(40)]
    truths, predictions = texts[:20], texts[20:]
    figures = Transcription()(predictions, truths)
    pairs = list(zip(truths, predictions, strict=True))
    words = sum(edits(t.split(), p.split()) for t, p in pairs) / sum(len(t.split()) for t in truths)
    characters = sum(edits(t, p) for t, p in pairs) / sum(map(len, truths))
    assert figures == {"wer": pytest.approx(words), "cer": pytest.approx(characters)}


@pytest.mark.parametrize(
    "prediction, truth, wer, cer",
    [
        ("", "two words", 1.0, 1.0),
        ("two words", "", 2.0, 9.0),
        ("", "", 0.0, 0.0),
        ("Two, words!", "two words", 0.0, 0.0),
        ("two", "two words", 0.5, 6 / 9),
    ],
)
def test_error_rates_of_empty_and_equal_transcripts(prediction, truth, wer, cer):
    assert Transcription()([prediction], [truth]) == {"wer": pytest.approx(wer), "cer": pytest.approx(cer)}


def test_an_empty_truth_among_others_counts_as_insertions():
    assert Transcription()(["a b", "c"], ["a b", ""])["wer"] == 0.5


def test_error_rates_without_normalization_see_case():
    assert Transcription(normalized=False)(["A b"], ["a b"])["wer"] == 0.5


def test_the_bootstrap_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    trials, covered = 300, 0
    for trial in range(trials):
        _, low, high = bootstrap_mean(rng.exponential(2.0, 60), resamples=400, seed=trial)
        covered += low <= 2.0 <= high
    # Skewed samples of 60 are covered a little less than 95 %; three binomial deviations are 0.038.
    assert 0.88 <= covered / trials <= 0.985


def test_the_bootstrap_interval_is_as_wide_as_theory_says():
    values = np.random.default_rng(2).normal(3, 1, 400)
    mean, low, high = bootstrap_mean(values)
    assert mean == pytest.approx(values.mean(), abs=1e-12)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(400), rel=0.08)
    assert low < mean < high


def test_the_bootstrap_is_seeded():
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_the_bootstrap_of_a_constant_has_no_width():
    assert bootstrap_mean([0.5] * 7) == (0.5, 0.5, 0.5)


def test_too_few_resamples_are_an_error():
    with pytest.raises(SpecError, match="resamples is 100: it must be at least 2000"):
        EvaluationSpec(resamples=100)
