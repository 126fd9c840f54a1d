"""Walking a whole dataset: every record that cannot be used, and what the others need."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from polygpt.data import fit
from polygpt.data.example import Example, Medium
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.loader import DataSpec, open_task
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.errors import BadRecord


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is known of a task's records after all of them have been laid out.

    Attributes:
        layout: how they were laid out.
        records: number of records.
        faults: the records that cannot be used.
        lengths: int32, positions of each of the others.
        predicted: int32, positions of each of the others that have a loss weight.
        media: by modality, number of items in the others.
        needs: float64 [n, columns], what each record needs that can be used or could be with other settings; see
            `fit.columns`.
        unread: media files of the source's folder that no record names.
    """

    layout: LayoutSpec
    records: int
    faults: tuple[BadRecord, ...]
    lengths: np.ndarray
    predicted: np.ndarray
    media: Mapping[str, int]
    needs: np.ndarray
    unread: tuple[Path, ...] = ()

    @property
    def reasons(self) -> Counter[str]:
        """Number of records that cannot be used, by reason."""
        return Counter(fault.reason for fault in self.faults)

    def summary(self) -> dict:
        """The counts, as JSON data; lengths by minimum, median, 95th percentile, maximum and sum."""
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
            "unread": [str(file) for file in self.unread],
        }


def check(
    data: DataSpec,
    tokenizer: Tokenizer,
    adapters: Mapping,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> dict[str, Findings]:
    """Lays out every example of every task as training would, without augmentation.

    Args:
        data, tokenizer, adapters: as in `train_batches`.
        progress: called after each record with the task's name, the records done and the number of records.

    Returns:
        The findings of each task. Bad records are among them and are not raised.

    Raises:
        UserError: if a source cannot be opened or is empty.
    """
    return {name: _walk(name, task, data, tokenizer, adapters, progress) for name, task in data.tasks.items()}


def fitting(
    found: Mapping[str, Findings], adapters: Mapping, share: float, lengths: Mapping[str, str]
) -> tuple[dict[str, int | float], set[str]]:
    """The smallest settings that take a share of each task's records, but for those that no setting would take.

    Args:
        found: what `check` found, by task.
        adapters: as in `check`.
        share: of the records, up to 1.
        lengths: by task, the dotted name of the field that sets the length of its rows.

    Returns:
        The fields to change, by dotted name, and the tasks of which some record would be left out.
    """
    names = fit.columns(adapters)
    known = {task: findings for task, findings in found.items() if len(findings.needs)}
    bounds = {task: fit.smallest(findings.needs, share) for task, findings in known.items()}
    if not bounds:
        return {}, set(found)
    common = np.max(list(bounds.values()), axis=0)
    wanted, left_out = fit.adapter_settings(dict(zip(names, common, strict=True)), adapters), set(found) - set(known)
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
    for i in range(len(examples)):
        example: Example | None = None
        watched = {modality: fit.Watched(adapter) for modality, adapter in adapters.items()}
        try:
            example = examples[i]
            named |= {p.source for p in example.parts if isinstance(p, Medium) and isinstance(p.source, Path)}
            row = lay_out(example, data.layout, tokenizer, watched, prompt_weight=task.prompt_weight)
        except BadRecord as fault:
            faults.append(fault)
            if example is not None and fit.mendable(fault):
                needs.append(fit.need_beyond(example, data.layout, tokenizer, adapters))
        else:
            lengths.append(len(row))
            predicted.append(np.count_nonzero(row.weight))
            for modality, items in row.media.items():
                media[modality] += len(items)
            needs.append(fit.need(row, {modality: one.frames for modality, one in watched.items()}, adapters))
        progress(name, i + 1, len(examples))
    needs = np.array([some for some in needs if some is not None], float).reshape(-1, len(fit.columns(adapters)))
    unread = tuple(file for file in getattr(examples, "files", tuple)() if file not in named)
    lengths, predicted = np.array(lengths, np.int32), np.array(predicted, np.int32)
    return Findings(data.layout, len(examples), tuple(faults), lengths, predicted, media, needs, unread)
