"""Walking a whole dataset: every record that cannot be used, and how long the others are."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from polygpt.data.layout import lay_out
from polygpt.data.loader import DataSpec, open_task
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.errors import BadRecord


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is known of a task's records after walking through all of them.

    Attributes:
        records: how many there are.
        faults: those that cannot be used.
        lengths: int32, positions of each of the others.
        predicted: int32, positions of each of them that have a loss weight.
        media: by modality, how many items they have together.
    """

    records: int
    faults: tuple[BadRecord, ...]
    lengths: np.ndarray
    predicted: np.ndarray
    media: Mapping[str, int]

    @property
    def reasons(self) -> Counter[str]:
        """How many records cannot be used, by reason."""
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
        }


def check(
    data: DataSpec,
    tokenizer: Tokenizer,
    adapters: Mapping,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> dict[str, Findings]:
    """Lays out every example of every task, without augmentation, as training would.

    Args:
        data, tokenizer, adapters: as in `train_batches`.
        progress: called after each record with the task's name, the records done and how many there are.

    Returns:
        The findings of each task. Bad records are among them and are not raised.

    Raises:
        UserError: if a source cannot be opened or is empty.
    """
    return {name: _walk(name, task, data, tokenizer, adapters, progress) for name, task in data.tasks.items()}


def _walk(name, task, data, tokenizer, adapters, progress) -> Findings:
    examples = open_task(name, task)
    faults, lengths, predicted, media = [], [], [], dict.fromkeys(adapters, 0)
    for i in range(len(examples)):
        try:
            row = lay_out(examples[i], data.layout, tokenizer, adapters, prompt_weight=task.prompt_weight)
        except BadRecord as error:
            faults.append(error)
        else:
            lengths.append(len(row))
            predicted.append(np.count_nonzero(row.weight))
            for modality, items in row.media.items():
                media[modality] += len(items)
        progress(name, i + 1, len(examples))
    return Findings(len(examples), tuple(faults), np.array(lengths, np.int32), np.array(predicted, np.int32), media)
