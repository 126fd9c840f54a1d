"""The loader: a weighted mixture of tasks as an endless, exactly repeatable stream of batches.

The order of examples (shuffled anew every epoch, sharded by process, mixed by weight) is a function of an index into
the stream, and so is each example's augmentation. Grain runs the workers; its own chain of map datasets took longer to
say which example comes next than it takes to lay that out. Packing comes last, in the training process. The state of an
iterator is therefore a few integers, and the batches do not depend on the number of workers.
"""

import dataclasses
import logging
import pickle
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import grain
from absl import flags

from polygpt.data.augment import Augment
from polygpt.data.example import Example
from polygpt.data.layout import LayoutSpec, MediaCache, lay_out
from polygpt.data.mixture import Order
from polygpt.data.packing import Packer, Row, collate
from polygpt.data.pickling import dumps
from polygpt.data.sources.base import Source
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.errors import BadRecord, UserError
from polygpt.sequence import Batch
from polygpt.spec import Spec

LOOKAHEAD = 8
"""A batch that is being packed is closed when so many examples found no room; the next batch begins with them."""
GROUP = 16
"""Examples that travel together from a worker: each journey costs as much as laying out a short example."""
LOGGED = 5
"""Skipped records of each reason that are logged one by one; the rest are counted."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task(Spec):
    """Examples of one kind."""

    source: Source
    """Where they come from."""
    weight: float = 1.0
    """Share of the examples drawn, relative to the weights of the other tasks."""
    augment: tuple[Augment, ...] = ()
    """Random changes of the media in training, applied in order."""

    def validate(self):
        self.require(self.weight > 0, "weight", "positive")


@dataclasses.dataclass(frozen=True)
class DataSpec(Spec):
    """What the model is trained on."""

    tasks: Mapping[str, Task]
    """The tasks by name, mixed by weight."""
    layout: LayoutSpec
    """How examples become rows."""
    rows: int
    """Rows of the global batch (B), divided among the processes."""
    workers: int = 0
    """Processes that decode; 0 decodes in a thread of the training process."""
    cache: int = 512
    """Megabytes of decoded media that each process or worker keeps in memory; 0 keeps none."""
    on_bad_record: Literal["raise", "skip"] = "raise"
    """Whether a record that cannot be used stops the training or is counted and left out."""

    def validate(self):
        self.require(len(self.tasks) > 0, "tasks", "at least one task")
        self.require(self.rows > 0, "rows", "positive")
        self.require(self.workers >= 0, "workers", "0 or above")
        self.require(self.cache >= 0, "cache", "0 or above")


def train_batches(
    data: DataSpec,
    tokenizer: Tokenizer,
    adapters: Mapping,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "TrainBatches":
    """An endless iterator over this process's rows of each batch, as NumPy arrays.

    Args:
        data: what to load.
        tokenizer: the tokenizer.
        adapters: the model's adapters, by modality.
        seed: decides the order of examples and their augmentations.
        process_index, process_count: which share of the rows and of the examples is this process's.

    Raises:
        UserError: if a source cannot be opened or is empty, or the rows cannot be divided among the processes.
    """
    if data.rows % process_count:
        raise UserError(f"data.rows is {data.rows}: it must be a multiple of the {process_count} processes")
    examples = {name: open_task(name, task) for name, task in data.tasks.items()}
    return TrainBatches(data, examples, tokenizer, adapters, seed, process_index, process_count)


def open_task(name: str, task: Task) -> Sequence[Example]:
    """The examples of a task; raises UserError that names the task if there are none."""
    examples = task.source.open()
    if len(examples) == 0:
        raise UserError(f"task {name!r}: its source {type(task.source).__name__} has no examples")
    return examples


class TrainBatches(Iterator[Batch]):
    """See `train_batches`.

    Attributes:
        skipped: how many records were left out, by reason, since the beginning of the training.
    """

    def __init__(self, data, examples, tokenizer, adapters, seed, process_index, process_count):
        self.skipped: Counter[str] = Counter()
        self._data, self._adapters = data, dict(adapters)
        self._rows, self._processes = data.rows // process_count, process_count
        self._counts = {name: len(some) for name, some in examples.items()}
        order = Order({name: (self._counts[name], task.weight) for name, task in data.tasks.items()}, seed)
        self._laid_out = _LaidOut(data, examples, tokenizer, self._adapters, order.shard(process_index, process_count))
        self._next = 0  # index into the stream of the example that comes next
        self._waiting: list[tuple[int, Row]] = []  # examples that found no room in the last batch, with their indices
        self._stream: Iterator[list[Row | BadRecord]] | None = None
        self._drawn: list[Row | BadRecord] = []  # the rest of the group under way, last first

    def __next__(self) -> Batch:
        packer = Packer(self._rows, self._data.layout.length, self._adapters, self._data.layout.packing)
        lookahead = min(LOOKAHEAD, self._rows)
        waiting, failures = [], 0
        for index, row in self._waiting:
            if not packer.add(row):
                waiting.append((index, row))
        while not packer.closed and len(waiting) < lookahead:
            index, row = self._next, self._draw()
            if isinstance(row, BadRecord):
                failures += 1
                self._skip(row, failures)
                continue
            failures = 0
            if not packer.add(row):
                waiting.append((index, row))
        self._waiting = waiting
        return packer.batch()

    def get_state(self) -> dict:
        """Where the stream stands, as JSON data: `set_state` of an equal iterator continues from there, to the bit."""
        return {
            "next": self._next,
            "waiting": [index for index, _ in self._waiting],
            "skipped": dict(self.skipped),
            "processes": self._processes,
            "examples": dict(self._counts),
        }

    def set_state(self, state: dict) -> None:
        """Continues where `get_state` was called.

        Raises:
            UserError: if that was one of another number of processes, or of examples of a task.
            BadRecord: if an example that waits to be packed cannot be used any more, unless such are skipped.
        """
        if state["processes"] != self._processes:
            raise UserError(
                f"the data iterator was saved by {state['processes']} processes and cannot be divided among "
                f"{self._processes}: resume with as many"
            )
        for name in state["examples"] | self._counts:
            had, has = state["examples"].get(name, 0), self._counts.get(name, 0)
            if had != has:
                raise UserError(
                    f"task {name!r} had {had} examples and has {has} now: the data changed since the checkpoint; "
                    "use another workdir or restore the data"
                )
        self.close()
        self._next, self.skipped = state["next"], Counter(state["skipped"])
        self._waiting = []
        for index in state["waiting"]:
            row = self._laid_out[index]
            if isinstance(row, BadRecord):
                self._skip(row, failures=0)
            else:
                self._waiting.append((index, row))

    def close(self) -> None:
        """Ends the workers. The iterator can be used again."""
        if self._stream is not None:
            self._stream.close()
        self._stream, self._drawn = None, []

    def _draw(self) -> Row | BadRecord:
        if self._stream is None:
            self._stream = iter(_read_ahead(_Groups(self._laid_out, self._next), self._data.workers))
        if not self._drawn:
            self._drawn = next(self._stream)[::-1]
        self._next += 1
        return self._drawn.pop()

    def _skip(self, error: BadRecord, failures: int) -> None:
        if self._data.on_bad_record == "raise":
            raise error
        self.skipped[error.reason] += 1
        if self.skipped[error.reason] <= LOGGED:
            log.warning("skipped %s", error)
        if failures >= sum(self._counts.values()):
            counts = ", ".join(f"{reason} {n}" for reason, n in self.skipped.most_common())
            raise UserError(f"{failures} records in a row cannot be used ({counts}), the last one: {error}")


class _LaidOut:
    """The stream laid out, by random access: rows, and the faults of records. Travels to the workers."""

    def __init__(self, data: DataSpec, examples: dict, tokenizer: Tokenizer, adapters: dict, order: Order):
        self.data, self.examples, self.tokenizer, self.adapters, self.order = data, examples, tokenizer, adapters, order
        self.cache = MediaCache(data.cache)

    def __getstate__(self) -> bytes:
        return dumps(self.__dict__)

    def __setstate__(self, state: bytes) -> None:
        self.__dict__.update(pickle.loads(state))

    def __getitem__(self, index: int) -> Row | BadRecord:
        name, position, number = self.order[index]
        augment = self.data.tasks[name].augment
        rng = self.order.generator(name, position) if augment else None
        try:
            example = self.examples[name][number]
            return lay_out(example, self.data.layout, self.tokenizer, self.adapters, rng, augment, self.cache)
        except BadRecord as error:
            return error


class _Groups:
    """What `_LaidOut` gives from some index on, in groups."""

    def __init__(self, laid_out: _LaidOut, start: int):
        self.laid_out, self.start = laid_out, start

    def __len__(self) -> int:
        return sys.maxsize // GROUP

    def __getitem__(self, group: int) -> list[Row | BadRecord]:
        first = self.start + group * GROUP
        return [self.laid_out[index] for index in range(first, first + GROUP)]


def _read_ahead(groups: _Groups, workers: int) -> grain.IterDataset:
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    dataset = grain.MapDataset.source(groups).to_iter_dataset(read)
    if workers == 0:
        return dataset
    if not flags.FLAGS.is_parsed():  # Grain reads its own flags when it starts workers, which fails in other programs
        flags.FLAGS.mark_as_parsed()
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


def example_batches(
    examples: Sequence[Example], layout: LayoutSpec, tokenizer: Tokenizer, adapters: Mapping, rows: int
) -> Iterator[tuple[Batch, list[Example]]]:
    """The examples in order, a row each, for evaluation; the last batch is filled up with rows of padding.

    Raises:
        BadRecord: for an example that cannot be used.
    """
    for start in range(0, len(examples), rows):
        some = [examples[i] for i in range(start, min(start + rows, len(examples)))]
        laid_out = [lay_out(example, layout, tokenizer, adapters) for example in some]
        yield collate(laid_out + [None] * (rows - len(some)), layout.length, adapters), some
