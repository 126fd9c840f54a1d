"""Objectives of labels against torch, and what an experiment with them must have."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from polygpt.data.labels import Label
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.sources.embedded import Embedded
from polygpt.errors import SpecError
from polygpt.heads.linear import LinearHead
from polygpt.models.multimodal import ModelSpec
from polygpt.objectives.classification import LabelClassification
from polygpt.objectives.multi_label import MultiLabel
from polygpt.objectives.regression import Regression
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import Constant
from polygpt.training.experiment import Experiment, TrainSpec

B, T, K = 3, 5, 4


def batch_of(label):
    return SimpleNamespace(extra={"own": np.float32(label)})


def both(objective, scores_BTK, batch):
    """The mean of an objective and its gradient with respect to the outputs of the head."""

    def mean(scores_BTK):
        total, weight = objective(SimpleNamespace(head=lambda name: scores_BTK), batch)
        return total / weight

    return jax.value_and_grad(mean)(scores_BTK)


def torch_mean(loss, scores, chosen, *targets):
    """The same of a torch loss over the chosen positions or numbers."""
    torch = pytest.importorskip("torch")
    x = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    value = loss(torch, x, torch.tensor(chosen), *map(torch.tensor, targets))
    value.backward()
    return value.item(), x.grad.numpy()


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-6)


@pytest.fixture
def scores():
    return np.float32(np.random.default_rng(0).normal(size=(B, T, K)) * 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification_is_the_cross_entropy_of_torch(smoothing, scores):
    rng = np.random.default_rng(1)
    label, known = rng.integers(0, K, (B, T)), rng.random((B, T)) < 0.5
    found = both(
        LabelClassification("own", label_smoothing=smoothing), scores, batch_of(np.where(known, label, np.nan))
    )

    def loss(torch, x, chosen, label):
        return torch.nn.CrossEntropyLoss(label_smoothing=smoothing)(x[chosen], label[chosen])

    assert_same(found, torch_mean(loss, scores, known, label))


def test_multi_label_is_the_binary_cross_entropy_of_torch(scores):
    rng = np.random.default_rng(1)
    label, known = rng.integers(0, 2, (B, T, K)), rng.random((B, T, K)) < 0.5
    found = both(MultiLabel("own"), scores, batch_of(np.where(known, label, np.nan)))

    def loss(torch, x, chosen, label):
        return torch.nn.BCEWithLogitsLoss()(x[chosen], label[chosen].double())

    assert_same(found, torch_mean(loss, scores, known, label))
    certain = both(MultiLabel("own"), np.float32([[[200.0, -200.0]]]), batch_of([[[1, 0]]]))
    assert certain[0] == 0 and not np.any(certain[1])


@pytest.mark.parametrize("name", ["mse", "huber", "poisson"])
def test_regression_is_the_loss_of_torch(name, scores):
    rng = np.random.default_rng(1)
    label, known = np.float32(rng.poisson(3.0, (B, T, K))), rng.random((B, T, K)) < 0.5
    found = both(Regression("own", loss=name, delta=0.7), scores, batch_of(np.where(known, label, np.nan)))

    def loss(torch, x, chosen, label):
        losses = {
            "mse": torch.nn.MSELoss(),
            "huber": torch.nn.HuberLoss(delta=0.7),
            "poisson": torch.nn.PoissonNLLLoss(),
        }
        return losses[name](x[chosen], label[chosen].double())

    assert_same(found, torch_mean(loss, scores, known, label))


def test_gaussian_regression_is_the_likelihood_of_torch(scores):
    rng = np.random.default_rng(1)
    label, known = rng.normal(size=(B, T, 2)), rng.random((B, T, 2)) < 0.5
    found = both(Regression("own", loss="gaussian"), scores, batch_of(np.where(known, label, np.nan)))

    def loss(torch, x, chosen, label):
        mean, log_variance = x.split(2, dim=-1)
        return torch.nn.GaussianNLLLoss()(mean[chosen], label[chosen], log_variance.exp()[chosen])

    assert_same(found, torch_mean(loss, scores, known, np.float32(label).astype(np.float64)))


def test_a_single_number_needs_no_axis(scores):
    label = np.random.default_rng(1).normal(size=(B, T))
    found = both(Regression("own"), scores[..., :1], batch_of(label))
    np.testing.assert_allclose(found[0], ((scores[..., 0] - label) ** 2).mean(), rtol=1e-6)


# --- what an experiment must have -------------------------------------------------------------------------------------

MODEL = ModelSpec(heads={"kind": LinearHead(3)})
COUNTS = {"free": Label((3,)), "low": Label((3,), minimum=-1), "counts": Label((3,), minimum=0)}
CLASSES = {"kind": Label(classes=3), "seen": Label((3,), classes=2), "flag": Label(classes=2)}
LAYOUT = LayoutSpec(8, labels={"size": Label(), **CLASSES, **COUNTS})


@pytest.mark.parametrize(
    "objective, message",
    [
        (LabelClassification("kinds"), "reads the head 'kinds', which is not in model.heads: did you mean kind"),
        (LabelClassification("kind", "sise"), "reads the label 'sise', .* data.layout.labels: did you mean size"),
        (
            LabelClassification("kind", "size"),
            r"'size' and its head 'kind' do not fit: declare it as .* Label\(classes",
        ),
        (LabelClassification("kind", "seen"), "do not fit: declare it as one of several classes"),
        (MultiLabel("kind", "flag"), "its head 'kind' do not fit: it has 1 numbers and the head has 3 outputs"),
        (MultiLabel("kind", "size"), "do not fit: declare it as 0 or 1"),
        (Regression("kind", "size"), "it has 1 numbers, for which the head must have 1 outputs, not 3"),
        (Regression("kind", "seen", loss="gaussian"), "the head must have 6 outputs, not 3"),
        (
            Regression("kind", "free", loss="poisson"),
            r"'free' .* counts are at least 0: declare it as Label\(minimum=0\)",
        ),
        (Regression("kind", "low", loss="poisson"), r"declare it as Label\(minimum=0\)"),
    ],
)
def test_a_head_or_a_label_that_does_not_fit_is_named(objective, message):
    with pytest.raises(SpecError, match=message):
        objective.check_with(MODEL, LAYOUT)


def test_what_fits_is_accepted():
    LabelClassification("kind").check_with(MODEL, LAYOUT)
    MultiLabel("kind", "seen").check_with(MODEL, LAYOUT)
    Regression("kind", "seen").check_with(MODEL, LAYOUT)
    Regression("kind", "counts", loss="poisson").check_with(MODEL, LAYOUT)
    Regression("kind", "seen", loss="poisson").check_with(MODEL, LAYOUT)


def test_a_head_of_another_number_of_classes_is_refused():
    with pytest.raises(SpecError, match="it has 5 classes and the head has 3 outputs; they must be equal"):
        LabelClassification("kind").check_with(MODEL, LayoutSpec(8, labels={"kind": Label(classes=5)}))


def test_an_experiment_names_its_objective():
    data = DataSpec({"text": Task(Embedded("text"))}, LAYOUT, batch_size=2)
    given = {"data": data, "optim": Optim(Constant(1e-3)), "train": TrainSpec(steps=1)}
    message = "^objectives.mine: reads the head 'kind', which is not in model.heads: there are none"
    with pytest.raises(SpecError, match=message):
        Experiment("labels", **given, objectives={"mine": (LabelClassification("kind"), 1.0)})
    Experiment("labels", **given, model=MODEL, objectives={"mine": (LabelClassification("kind"), 1.0)})
