"""Checks a whole dataset: finds every unusable record and what the other records require."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from polygpt.data import fit
from polygpt.data.example import Example, Medium
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.loader import DataSpec, open_task
from polygpt.data.scores import open_scores
from polygpt.data.sources.base import example_at
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.data.transforms.base import transformed
from polygpt.errors import BadRecord, UserError
from polygpt.sequence import PREFERENCE


@dataclasses.dataclass(frozen=True)
class Findings:
    """The result of laying out all records of a task.

    Attributes:
        layout: the layout used.
        records: number of records.
        faults: the unusable records.
        lengths: int32, number of positions of each usable record.
        predicted: int32, number of positions with a loss weight in each usable record.
        media: number of items in usable records, by modality.
        labelled: number of usable records with a label, by name.
        paired: number of usable records that are pairs of answers.
        needs: float64 [n, columns], the requirements of each record that is usable or would be with other settings; see
            `fit.columns`.
        unread: media files in the source's folder that no record names.
    """

    layout: LayoutSpec
    records: int
    faults: tuple[BadRecord, ...]
    lengths: np.ndarray
    predicted: np.ndarray
    media: Mapping[str, int]
    needs: np.ndarray
    unread: tuple[Path, ...] = ()
    labelled: Mapping[str, int] = dataclasses.field(default_factory=dict)
    paired: int = 0

    @property
    def reasons(self) -> Counter[str]:
        """Number of unusable records by reason."""
        return Counter(fault.reason for fault in self.faults)

    def summary(self) -> dict:
        """The counts as JSON data; lengths as minimum, median, 95th percentile, maximum and sum."""
        lengths = {}
        if len(self.lengths):
            low, median, high, top = np.percentile(self.lengths, [0, 50, 95, 100]).tolist()
            lengths = {"min": int(low), "median": median, "p95": high, "max": int(top), "sum": int(self.lengths.sum())}
        return {
            "records": self.records,
            "bad": dict(self.reasons.most_common()),
            "positions": lengths,
            "predicted": int(self.predicted.sum()),
            "media": dict(self.media),
            "labelled": dict(self.labelled),
            "pairs": self.paired,
            "unread": [str(file) for file in self.unread],
        }


def check(
    data: DataSpec,
    tokenizer: Tokenizer,
    adapters: Mapping,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> dict[str, Findings]:
    """Lays out every example of every task as training would, with one draw of the transformations and no augmentation.

    Args:
        data, tokenizer, adapters: as in `train_batches`.
        progress: called after each record with the task's name, the records done and the number of records.

    Returns:
        The findings of each task. Bad records are part of the findings and are not raised.

    Raises:
        UserError: if a source cannot be opened or is empty.
    """
    return {name: _walk(name, task, data, tokenizer, adapters, progress) for name, task in data.tasks.items()}


def score_faults(
    data: DataSpec,
    tokenizer: Tokenizer,
    adapters: Mapping,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> list[str]:
    """A line for each example whose scores (`data.scores`) are not its own, are damaged or missing.

    Args are those of `check`.

    Raises:
        UserError: if scores cannot be opened, or all are of other data.
    """
    examples = {name: open_task(name, task) for name, task in data.tasks.items()}
    scores, faults = open_scores(data, tokenizer, {name: len(some) for name, some in examples.items()}), []
    for name, task in data.tasks.items():
        for i in range(len(examples[name])):
            try:
                example = example_at(examples[name], i)
                given = {"prompt_weight": task.prompt_weight, "paired": task.paired}
                row = lay_out(example, data.layout, tokenizer, adapters, **given)
            except BadRecord:
                continue  # a fault that `check` finds
            for one in scores:
                try:
                    one.arrays(name, i, example, row)
                except UserError as error:
                    faults.append(str(error))
            progress(f"scores of {name}", i + 1, len(examples[name]))
    return faults


def fitting(
    found: Mapping[str, Findings], adapters: Mapping, share: float, lengths: Mapping[str, str]
) -> tuple[dict[str, int | float], set[str]]:
    """The smallest settings that accept a fraction of each task's records, ignoring records that no setting accepts.

    Where examples share rows, a row takes as many items of each medium as fill it.

    Args:
        found: the result of `check`.
        adapters: as in `check`.
        share: the fraction of records, up to 1.
        lengths: by task, the dotted name of the field that sets its row length.

    Returns:
        The fields to change, by dotted name, and the tasks that would still lose some record.
    """
    names = fit.columns(adapters)
    known = {task: findings for task, findings in found.items() if len(findings.needs)}
    bounds = {task: fit.smallest(findings.needs, share) for task, findings in known.items()}
    if not bounds:
        return {}, set(found)
    common = np.max(list(bounds.values()), axis=0)
    packed = [task for task, findings in known.items() if findings.layout.packing]
    full = None
    if packed:
        seq_len = max(fit.row_length(int(bounds[task][0]), known[task].layout) for task in packed)
        full = fit.filling(np.concatenate([known[task].needs for task in packed]), seq_len, adapters)
    wanted = fit.adapter_settings(dict(zip(names, common, strict=True)), adapters, full)
    left_out = set(found) - set(known)
    for field in dict.fromkeys(lengths[task] for task in known):
        sharing = [task for task in known if lengths[task] == field]
        length, layout = max(bounds[task][0] for task in sharing), known[sharing[0]].layout
        wanted |= {} if (now := fit.row_length(int(length), layout)) == layout.seq_len else {field: now}
        within = np.array([max(length, now), *common[1:]])
        left_out |= {task for task in sharing if known[task].records > (known[task].needs <= within).all(axis=1).sum()}
    return wanted, left_out


def _walk(name, task, data, tokenizer, adapters, progress) -> Findings:
    examples = open_task(name, task)
    faults, lengths, predicted, media, needs = [], [], [], dict.fromkeys(adapters, 0), []
    named: set[Path] = set()
    labelled, paired = dict.fromkeys(data.layout.labels, 0), 0
    for i in range(len(examples)):
        example: Example | None = None
        watched = {modality: fit.FrameCounter(adapter) for modality, adapter in adapters.items()}
        try:
            example = transformed(example_at(examples, i), task.transform, np.random.default_rng(i))
            named |= {p.source for p in example.parts if isinstance(p, Medium) and isinstance(p.source, Path)}
            given = {"prompt_weight": task.prompt_weight, "paired": task.paired}
            row = lay_out(example, data.layout, tokenizer, watched, **given)
        except BadRecord as fault:
            faults.append(fault)
            if example is not None and fit.fixable_by_settings(fault):
                needs.append(fit.need_beyond(example, data.layout, tokenizer, adapters))
        else:
            lengths.append(len(row))
            predicted.append(np.count_nonzero(row.weight))
            for modality, items in row.media.items():
                media[modality] += len(items)
            for label in labelled:
                labelled[label] += bool(np.isfinite(row.extra[label]).any())
            paired += bool(np.any(row.extra.get(PREFERENCE, 0)))
            needs.append(fit.need(row, {modality: one.frames for modality, one in watched.items()}, adapters))
        progress(name, i + 1, len(examples))
    needs = np.array([some for some in needs if some is not None], float).reshape(-1, len(fit.columns(adapters)))
    unread = tuple(file for file in getattr(examples, "files", tuple)() if file not in named)
    lengths, predicted = np.array(lengths, np.int32), np.array(predicted, np.int32)
    counts = {"records": len(examples), "media": media, "labelled": labelled, "paired": paired}
    counts |= {"lengths": lengths, "predicted": predicted, "needs": needs}
    return Findings(data.layout, faults=tuple(faults), unread=unread, **counts)
