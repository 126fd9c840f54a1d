"""The contracts of sources and objectives, held by every class found in the folders."""

import pickle
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from discovery import minimal, specs

from batches import build, example
from polygpt.data.example import Example
from polygpt.data.labels import Label
from polygpt.data.sources.base import Source
from polygpt.errors import UserError
from polygpt.objectives.base import BatchObjective, Objective, TokenObjective
from polygpt.objectives.labelled import LabelObjective
from polygpt.objectives.preference import PreferenceObjective
from polygpt.objectives.routing import RoutingObjective

BASES = (TokenObjective, RoutingObjective, BatchObjective, LabelObjective, PreferenceObjective)
ALL_OBJECTIVES = [found for found in specs("polygpt.objectives", Objective) if found.values[0] not in BASES]
LABELLED = [found for found in ALL_OBJECTIVES if issubclass(found.values[0], LabelObjective)]
OTHERS = [found for found in ALL_OBJECTIVES if minimal(found.values[0]).others]
OTHERS += [found for found in ALL_OBJECTIVES if issubclass(found.values[0], (PreferenceObjective, BatchObjective))]
OTHERS += [found for found in ALL_OBJECTIVES if minimal(found.values[0]).cached]
OTHERS += [found for found in ALL_OBJECTIVES if found.id in ("MultiToken", "ParameterPenalty", "RDrop")]
"""Read more than the logits of one pass: tested with their files."""
OBJECTIVES = [found for found in ALL_OBJECTIVES if found not in (*LABELLED, *OTHERS)]
ROWS = [[example(6, seed=1), example(3, seed=2)], [example(9, seed=3)], [example(("image", 4), 2, seed=4)], []]


@pytest.mark.parametrize("cls", specs("polygpt.data", Source))
def test_a_source_gives_the_same_examples_always_or_says_what_is_missing(cls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a source of files finds none
    try:
        examples = minimal(cls).open()
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert len(examples) > 0 and isinstance(examples[0], Example) and examples[0].place
    copy = pickle.loads(pickle.dumps(examples))
    for i in (0, len(examples) // 2, len(examples) - 1):
        assert examples[i] == examples[i] == copy[i]
        assert examples[i].answer, "something to learn"
    with pytest.raises(IndexError):
        examples[len(examples)]


@pytest.fixture(scope="module")
def batch():
    return build(ROWS, 12, weight=0.5)


def logits(batch, seed: int = 0):
    return np.float32(np.random.default_rng(seed).normal(size=(*batch.shape, 31)) * 3)


def outputs(logits_BTV):
    # A routed model gives sums over rows beside its logits: here, how many there are.
    names = (found.values[0].loss for found in OBJECTIVES if issubclass(found.values[0], RoutingObjective))
    return SimpleNamespace(logits_BTV=logits_BTV, losses=dict.fromkeys(names, np.float32(len(logits_BTV))), block=None)


@pytest.mark.parametrize("cls", OBJECTIVES)
def test_an_objective_is_a_sum_and_a_weight(cls, batch):
    objective, logits_BTV = minimal(cls), logits(batch)
    total, weight = objective(outputs(logits_BTV), batch)
    assert total.shape == weight.shape == () and total.dtype == weight.dtype == np.float32
    assert total > 0 and weight > 0
    assert objective(outputs(logits(batch, 1)), batch)[1] == weight, "the weight knows the batch alone"
    parts = [
        objective(outputs(logits_BTV[i : i + 2]), jax.tree.map(lambda x, i=i: x[i : i + 2], batch)) for i in (0, 2)
    ]
    np.testing.assert_allclose(np.sum(parts, axis=0), [total, weight], rtol=1e-5, err_msg="rows may be split")


@pytest.mark.parametrize("cls", OBJECTIVES)
def test_an_objective_does_not_read_positions_without_weight(cls, batch):
    objective, logits_BTV = minimal(cls), logits(batch)
    dirty = np.where((batch.weight_BT > 0)[..., None], logits_BTV, np.nan)
    gradient = jax.grad(lambda x: objective(outputs(x), batch)[0])
    assert objective(outputs(dirty), batch)[0] == objective(outputs(logits_BTV), batch)[0]
    np.testing.assert_array_equal(gradient(dirty), gradient(logits_BTV))
    assert np.isfinite(gradient(dirty)).all()


# --- objectives of labels ---------------------------------------------------------------------------------------------

K = 4
FITTING = [Label(classes=K), Label((K,), classes=2), Label((K,))]


def labelled(cls):
    """The objective, outputs of its head, and a batch in which a third of the numbers of its label are known."""
    objective, rng = minimal(cls), np.random.default_rng(2)
    label = next(label for label in FITTING if objective.mismatch(K, label) is None)
    shape = (4, 12, *label.shape)
    numbers = np.float32(rng.normal(size=shape) if label.classes is None else rng.integers(0, label.classes, shape))
    known = rng.random(shape) < 1 / 3
    batch = SimpleNamespace(extra={objective.named: np.where(known, numbers, np.float32(np.nan))})
    return objective, np.float32(rng.normal(size=(4, 12, K)) * 2), batch, known.reshape(4, 12, -1)


def of_head(scores_BTK):
    return SimpleNamespace(head=lambda name: scores_BTK)


def rows_of(batch, rows):
    return SimpleNamespace(extra={name: array[rows] for name, array in batch.extra.items()})


@pytest.mark.parametrize("cls", LABELLED)
def test_an_objective_of_labels_is_a_sum_over_known_numbers(cls):
    objective, scores_BTK, batch, known = labelled(cls)
    total, weight = objective(of_head(scores_BTK), batch)
    assert total.shape == () and total.dtype == weight.dtype == np.float32 and weight == known.sum()
    parts = [objective(of_head(scores_BTK[rows]), rows_of(batch, rows)) for rows in (slice(1), slice(1, 4))]
    np.testing.assert_allclose(np.sum(parts, axis=0), [total, weight], rtol=1e-5, err_msg="rows may be split")


@pytest.mark.parametrize("cls", LABELLED)
def test_an_objective_of_labels_does_not_read_positions_without_one(cls):
    objective, scores_BTK, batch, known = labelled(cls)
    dirty = np.where(known.any(axis=-1, keepdims=True), scores_BTK, np.nan)
    loss = jax.value_and_grad(lambda x: objective.total(of_head(x), batch))
    (clean, gradient), (same, dirty_gradient) = loss(scores_BTK), loss(dirty)
    assert clean == same and np.any(gradient)
    np.testing.assert_array_equal(gradient, dirty_gradient)
    none = rows_of(batch, slice(0, 1))
    none.extra[objective.named] = np.full_like(none.extra[objective.named], np.nan)
    value, gradient = jax.value_and_grad(lambda x: objective.total(of_head(x), none))(scores_BTK[:1])
    assert value == objective.weight(none) == 0 and not np.any(gradient)
