"""What heads predict against labels: the base class of its metrics, and the outputs that they compare."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial

import jax
import numpy as np

from polygpt.evaluation.metric import Measure
from polygpt.objectives.labelled import require_label
from polygpt.sequence import Batch
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class HeadMetric(Spec):
    """Base class of metrics that compare the outputs of a head with a label. A new metric is a file with a subclass."""

    head: str
    """Name of the head in `model.heads`."""
    label: str | None = None
    """Name of the label in `data.layout.labels`; null for that of the head."""

    @property
    def named(self) -> str:
        """The name of the label, with which the names of all measures begin."""
        return self.head if self.label is None else self.label

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The values it returns, in table order; they need no answers."""
        raise NotImplementedError(f"{type(self).__name__} declares no measures")

    def __call__(self, outputs_NK: np.ndarray, label_Nn: np.ndarray) -> dict[str, float]:
        """Values by the names in `measures`, over all N >= 1 positions with a label; unknown numbers are NaN."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__")

    def check_with(self, model, layout) -> None:
        """Raises SpecError if the model (`ModelSpec`) lacks the head, or the layout the label."""
        require_label(self.head, self.named, model, layout)


@partial(jax.jit, static_argnames=("model", "names"))
def _outputs(model, params, batch: Batch, names: tuple[str, ...]):
    hidden_BTD, _ = model.hidden(params, batch)
    return model.replicated({name: model.head(params, name, hidden_BTD, batch) for name in names})


def measured(model, params, batches: Iterable[Batch], metrics: Sequence[HeadMetric]) -> dict[str, float]:
    """The values of the metrics over all positions of the batches that have their labels.

    Metrics whose label no position has are left out.
    """
    names = tuple(sorted({metric.head for metric in metrics}))
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in metrics]
    for batch in batches:
        outputs = _outputs(model, params, batch, names)
        for metric, pairs in zip(metrics, found, strict=True):
            label_BTn = np.asarray(batch.extra[metric.named]).reshape(*batch.shape, -1)
            has_BT = ~np.isnan(label_BTn).all(axis=-1)
            pairs.append((np.asarray(outputs[metric.head])[has_BT], label_BTn[has_BT]))
    joined = [tuple(map(np.concatenate, zip(*pairs, strict=True))) for pairs in found]
    return {
        key: value
        for metric, (outputs_NK, label_Nn) in zip(metrics, joined, strict=True)
        if len(label_Nn)
        for key, value in metric(outputs_NK, label_Nn).items()
    }
