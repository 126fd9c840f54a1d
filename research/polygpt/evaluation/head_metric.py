"""Metrics of what heads of a model predict: their base classes, and the outputs that they compare."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import jax
import numpy as np

from polygpt.evaluation.metric import Measure
from polygpt.objectives.apart import number_apart
from polygpt.objectives.contrastive import RESIDUAL
from polygpt.objectives.labelled import require_label
from polygpt.objectives.view import View
from polygpt.sequence import Batch
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class OutputMetric(Spec):
    """Base class of metrics of the outputs of heads. A new metric is a file with a subclass."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the heads whose outputs it reads."""
        raise NotImplementedError(f"{type(self).__name__} names no heads")

    @property
    def view(self) -> View | None:
        """How the batch that the model reads is derived from that of the data, as for an objective, with fixed keys."""
        return None

    @property
    def layer(self) -> int | None:
        """The block of the decoder whose output its heads read, with the modalities of an example as segments of the
        batch that it gets; null for the last vectors of the model."""
        return None

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The values it returns, in table order; they need no answers."""
        raise NotImplementedError(f"{type(self).__name__} declares no measures")

    @property
    def needs(self) -> str:
        """What an example must have to be compared, for messages."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it needs")

    def rows(self, outputs: Mapping[str, np.ndarray], batch: Batch) -> tuple[np.ndarray, ...]:
        """What it compares of a batch, NumPy arrays [N, ...] with any N, given the outputs [B, T, K] of its heads."""
        raise NotImplementedError(f"{type(self).__name__} defines no rows")

    def __call__(self, *rows: np.ndarray) -> dict[str, float]:
        """Values by the names in `measures`, given the rows of all batches, N >= 1."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__")

    def check_with(self, model, layout) -> None:
        """Raises SpecError if the model (`ModelSpec`) or the layout lacks what it reads."""


@dataclasses.dataclass(frozen=True)
class HeadMetric(OutputMetric):
    """Base class of metrics that compare the outputs of a head with a label.

    `__call__` gets outputs_NK and label_Nn of all N positions with a label; unknown numbers are NaN.
    """

    head: str
    """Name of the head in `model.heads`."""
    label: str | None = None
    """Name of the label in `data.layout.labels`; null for that of the head."""

    @property
    def named(self) -> str:
        """The name of the label, with which the names of all measures begin."""
        return self.head if self.label is None else self.label

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.head,)

    @property
    def needs(self) -> str:
        return f"the label {self.named!r}"

    def rows(self, outputs, batch):
        label_BTn = np.asarray(batch.extra[self.named]).reshape(*batch.shape, -1)
        has_BT = ~np.isnan(label_BTn).all(axis=-1)
        return outputs[self.head][has_BT], label_BTn[has_BT]

    def check_with(self, model, layout) -> None:
        require_label(self.head, self.named, model, layout)


@partial(jax.jit, static_argnames=("model", "names", "view", "layer"))
def _outputs(model, params, batch: Batch, names: tuple[str, ...], view: View | None, layer: int | None):
    if view is not None:
        batch = view(batch, jax.random.split(jax.random.key(0), batch.shape[0]))
    if layer is None:
        hidden_BTD, _ = model.hidden(params, batch)
    else:
        *_, found = model.hidden(params, batch, capture=(RESIDUAL,))
        hidden_BTD, batch = found[RESIDUAL][layer], number_apart(batch)
    found = {name: model.head(params, name, hidden_BTD, batch) for name in names}
    return model.replicated((found, dataclasses.replace(batch, media={})))


def measured(model, params, batches: Iterable[Batch], metrics: Sequence[OutputMetric]) -> dict[str, float]:
    """The values of the metrics over all batches. Those that find nothing to compare are left out."""
    passes = {(metric.view, metric.layer): {} for metric in metrics}
    for metric in metrics:
        passes[metric.view, metric.layer] |= dict.fromkeys(metric.reads)
    found: list[list[tuple[np.ndarray, ...]]] = [[] for _ in metrics]
    for batch in batches:
        seen = {
            of: jax.tree.map(np.asarray, _outputs(model, params, batch, tuple(sorted(names)), *of))
            for of, names in passes.items()
        }
        for metric, parts in zip(metrics, found, strict=True):
            parts.append(metric.rows(*seen[metric.view, metric.layer]))
    joined = [tuple(map(np.concatenate, zip(*parts, strict=True))) for parts in found]
    return {
        key: value
        for metric, rows in zip(metrics, joined, strict=True)
        if len(rows[0])
        for key, value in metric(*rows).items()
    }
