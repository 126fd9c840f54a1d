"""Retrieval: whether the embedding of one modality finds that of another of the same example."""

import dataclasses

import numpy as np

from polygpt.errors import SpecError
from polygpt.evaluation.head_metric import OutputMetric
from polygpt.evaluation.metric import Measure
from polygpt.objectives.apart import Apart, example_of, last_of
from polygpt.objectives.contrastive import require_apart, require_heads


@dataclasses.dataclass(frozen=True)
class Retrieval(OutputMetric):
    """`<name>_r1`, ... and `<name>_back_r1`, ...: the share of examples whose partner is among the k most similar of
    the task's examples, from the first modality to the second and back.

    With `label`, any example of the same label counts as a partner. Ties count against the model.
    """

    heads: tuple[str, str]
    """Names of the projections in `model.heads` of both modalities."""
    between: tuple[int, int] = (1, 0)
    """Numbers of the modalities: 0 is text, adapters count from 1 in the model's order."""
    name: str = "retrieval"
    """With which the names of its measures begin."""
    at: tuple[int, ...] = (1, 5)
    """Numbers of most similar examples, k."""
    label: str | None = None
    """Name of a label in `data.layout.labels` of one number; null if only the example itself is right."""
    bidirectional: bool = True
    """As in the contrastive objective."""
    layer: int | None = None
    """As in the contrastive objective."""

    def validate(self):
        self.require(bool(self.at) and min(self.at) >= 1, "at", "numbers of at least 1")
        self.require(bool(self.name), "name", "not empty")
        self.require(self.layer is None or self.layer >= 0, "layer", "null or at least 0")

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.heads))

    @property
    def view(self) -> Apart | None:
        return Apart(self.bidirectional) if self.layer is None else None

    @property
    def needs(self) -> str:
        return "both modalities"

    @property
    def measures(self) -> tuple[Measure, ...]:
        names = [f"{self.name}{way}_r{k}" for way in ("", "_back") for k in self.at]
        return tuple(
            Measure(name, "higher", share=True, brief=k == 0, needs="likelihood") for k, name in enumerate(names)
        )

    def check_with(self, model, layout) -> None:
        require_heads(self.heads, self.between, model)
        require_apart(self.layer, model)
        if self.label is not None and self.label not in layout.labels:
            raise SpecError(f"reads the label {self.label!r}, which is not in data.layout.labels")

    def rows(self, outputs, batch):
        E, found, valid = max(1, int(np.max(example_of(batch)))), [], True  # examples of the fullest row
        for head, modality in zip(self.heads, self.between, strict=True):
            at_BE, there_BE = map(np.asarray, last_of(batch, modality, E))
            found.append(np.take_along_axis(outputs[head], at_BE[..., None], axis=1))
            valid = valid & there_BE
        label_BE = np.full(valid.shape, np.nan)
        if self.label is not None:
            segment_BT, label_BT = (
                np.asarray(example_of(batch)),
                np.asarray(batch.extra[self.label]).reshape(batch.shape),
            )
            for e in range(E):
                own_BT = np.where(segment_BT == e + 1, label_BT, np.nan)
                here_B = ~np.isnan(own_BT).all(axis=1)
                label_BE[here_B, e] = np.nanmax(own_BT[here_B], axis=1)
        return (*(x_BEK[valid] for x_BEK in found), label_BE[valid])

    def __call__(self, left_NK, right_NK, label_N):
        similarity_NN = left_NK.astype(np.float64) @ right_NK.T.astype(np.float64)
        same_NN = np.eye(len(label_N), dtype=bool)
        if self.label is not None:
            same_NN |= label_N[:, None] == label_N[None]
        values = []
        for similarity, same in ((similarity_NN, same_NN), (similarity_NN.T, same_NN.T)):
            best_N = np.where(same, similarity, -np.inf).max(axis=1)
            ahead_N = ((similarity >= best_N[:, None]) & ~same).sum(axis=1)
            values += [float((ahead_N < k).mean()) for k in self.at]
        return dict(zip((one.name for one in self.measures), values, strict=True))
