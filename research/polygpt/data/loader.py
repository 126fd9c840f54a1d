"""The loader: a weighted mixture of tasks as an endless, exactly reproducible stream of batches.

The order of examples (reshuffled every epoch, divided among data shards, mixed by weight) and the changes of each
example are functions of an index into the stream. The state of an iterator is therefore a few integers, and the batches
do not depend on the number of workers. Grain runs the workers but does not determine the order: its chain of map
datasets takes longer to compute an index than it takes to lay out an example. Packing happens in the training process.

A data shard is a process, or a group of processes, that reads rows no other shard reads: processes that share the
sequence or the layers of a row form one data shard.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from polygpt.data.augment import Augment
from polygpt.data.example import Example
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.mixture import Order, reshard
from polygpt.data.packing import Packer, Row, collate
from polygpt.data.reading import Groups, LaidOut, read_ahead, row_or_bad_record
from polygpt.data.resharding import Resharding
from polygpt.data.scores import Scores, open_scores, require_same
from polygpt.data.sources.base import Source
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.data.transforms.base import Transform
from polygpt.errors import BadRecord, SpecError, UserError
from polygpt.migration import batches_state
from polygpt.sequence import PREFERENCE, Batch, top_ids, top_log_p
from polygpt.spec import Spec

LOOKAHEAD = 8
"""A batch is complete once this many examples did not fit; the next batch begins with them."""
LOGGED = 5
"""Number of skipped records per reason that are logged individually; the rest are only counted."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task(Spec):
    """One part of the training data."""

    source: Source
    """The source of its examples."""
    weight: float = 1.0
    """Sampling weight, relative to the weights of the other tasks."""
    augment: tuple[Augment, ...] = ()
    """Random changes of media in training, applied in order."""
    prompt_weight: float = 0.0
    """Loss weight of prompts in training: PaliGemma (2407.07726), section 5.2, "loss on the prefix". Evaluation scores
    only answers."""
    transform: tuple[Transform, ...] = ()
    """Random changes of whole examples in training, applied in order, before media are decoded."""
    paired: bool = True
    """With `layout.pairs`, whether an example without a rejected answer is a bad record. false: it is laid out as
    without `layout.pairs`, and preference objectives ignore it."""

    def validate(self):
        self.require(self.weight > 0, "weight", "positive")
        self.require(self.prompt_weight >= 0, "prompt_weight", "0 or above")


@dataclasses.dataclass(frozen=True)
class DataSpec(Spec):
    """The training data."""

    tasks: Mapping[str, Task]
    """The tasks by name, mixed by weight."""
    layout: LayoutSpec
    """How to turn examples into rows."""
    batch_size: int
    """Rows of the global batch (B), divided among the data shards."""
    workers: int = 0
    """Number of decoding worker processes; 0 decodes in a thread of the training process."""
    cache: int = 512
    """Megabytes of decoded media to cache in memory, per process or worker."""
    on_bad_record: Literal["raise", "skip"] = "raise"
    """Whether an unusable record stops training, or is skipped and counted."""
    log_examples: bool = False
    """Whether to log the examples of each step: one line per step in examples-*.jsonl in the run folder, with
    [task, position in its stream, index of the example] for each example."""
    scores: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Folders by name, in which `polygpt data score` has cached log-probabilities under a model: objectives read them
    in place of a teacher or reference. The examples must be the same in every epoch."""

    def validate(self):
        self.require(len(self.tasks) > 0, "tasks", "at least one task")
        self.require(self.batch_size > 0, "batch_size", "positive")
        self.require(self.workers >= 0, "workers", "0 or above")
        self.require(self.cache >= 0, "cache", "0 or above")
        for name, task in self.tasks.items() if self.scores else ():
            if changing := [*task.augment, *task.transform]:
                raise SpecError(
                    f"DataSpec.tasks[{name!r}] has {type(changing[0]).__name__}, which changes its examples in every "
                    f"epoch, but scores ({', '.join(self.scores)}) are of fixed examples: remove one or the other, or "
                    "transform the source once with Transformed"
                )
        for name in self.scores:
            taken = {*self.layout.labels, PREFERENCE} & {name, top_ids(name), top_log_p(name)}
            self.require(not taken, "scores", "named differently from all labels")
        for name, task in self.tasks.items() if self.layout.prompt_span == "bidirectional" else ():
            if task.prompt_weight > 0:
                raise SpecError(
                    f"DataSpec.tasks[{name!r}].prompt_weight is {task.prompt_weight}: it must be 0 if "
                    "layout.prompt_span is 'bidirectional', because prompts would then see the tokens they predict"
                )


def train_batches(
    data: DataSpec,
    tokenizer: Tokenizer,
    adapters: Mapping,
    *,
    seed: int,
    data_shard: int = 0,
    data_shards: int = 1,
) -> "TrainBatches":
    """An endless iterator over one data shard's rows of the batches, as NumPy arrays.

    Args:
        data: the training data.
        tokenizer: the tokenizer.
        adapters: the model's adapters, by modality.
        seed: determines the order of examples and their random changes.
        data_shard, data_shards: index of this data shard, and number of data shards.

    Raises:
        UserError: if a source cannot be opened or is empty, the model has no adapter for the modality of an
            augmentation, the rows cannot be divided among the data shards, or scores are missing or of other data.
    """
    require_data(data, adapters, data_shards)
    examples = {name: open_task(name, task) for name, task in data.tasks.items()}
    import grain  # noqa: F401  (in the caller's thread: a process that exits while a thread imports prints tracebacks)

    return TrainBatches(data, examples, tokenizer, adapters, seed, data_shard, data_shards)


def require_data(data: DataSpec, adapters: Mapping, data_shards: int) -> None:
    """Raises the errors of `train_batches` that need no source."""
    if data.batch_size % data_shards:
        raise UserError(
            f"data.batch_size is {data.batch_size}: it must be a multiple of the {data_shards} data shards "
            "(processes, or groups of them, that read different rows)"
        )
    for name, task in data.tasks.items():
        for one in task.augment:
            if one.modality not in adapters:
                has = f"the model's adapters are {', '.join(adapters)}" if adapters else "the model reads only text"
                raise UserError(f"task {name!r}: {type(one).__name__} needs an adapter for {one.modality}: {has}")


def extra_shapes(data: DataSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    """What `Batch.extra` has in training, by name: the shape after [B, T], and the dtype.

    Raises:
        UserError: if scores cannot be read.
    """
    found = {name: (label.shape, "float32") for name, label in data.layout.labels.items()}
    if data.layout.pairs:
        found[PREFERENCE] = ((), "int32")
    for name, folder in data.scores.items():
        found |= Scores(name, folder).shapes()
    return found


def open_task(name: str, task: Task) -> Sequence[Example]:
    """Opens the examples of a task. Raises UserError, naming the task, if there are none."""
    examples = task.source.open()
    if len(examples) == 0:
        raise UserError(f"task {name!r}: its source {type(task.source).__name__} has no examples")
    return examples


class TrainBatches(Iterator[Batch]):
    """See `train_batches`.

    Attributes:
        skipped: number of records skipped since training began, by reason; the run's total is the sum over data shards.
        last_examples: the examples of the last batch, as (task, position in its stream, index of the example), if
            `data.log_examples`; otherwise empty.
    """

    def __init__(self, data, examples, tokenizer, adapters, seed, data_shard, data_shards):
        self.skipped: Counter[str] = Counter()
        self.last_examples: tuple[tuple[str, int, int], ...] = ()
        self._data, self._adapters = data, dict(adapters)
        self._examples, self._tokenizer, self._seed = examples, tokenizer, seed
        self._rows, self._data_shard, self._data_shards = data.batch_size // data_shards, data_shard, data_shards
        self._counts = {name: len(some) for name, some in examples.items()}
        self._order = Order({name: (self._counts[name], task.weight) for name, task in data.tasks.items()}, seed)
        scores = open_scores(data, tokenizer, self._counts)
        self._laid_out = LaidOut(data, examples, tokenizer, self._adapters, self._order, scores)
        self._follow(Resharding(data_shards))
        self._next = 0  # index into the stream of the next example
        self._waiting: list[tuple[int, Row]] = []  # (index, row) of examples that did not fit into the last batch
        self._stream: Iterator[list[Row | BadRecord]] | None = None
        self._drawn: list[Row | BadRecord] = []  # the rest of the current group, last first

    def __next__(self) -> Batch:
        packer = Packer(self._rows, self._data.layout.seq_len, self._adapters, self._data.layout.packing)
        lookahead = min(LOOKAHEAD, self._rows)
        packed, waiting, failures = [], [], 0
        for index, row in self._waiting:
            if packer.add(row):
                packed.append(index)
            else:
                waiting.append((index, row))
        while not packer.closed and len(waiting) < lookahead:
            index, row = self._next, self._draw()
            if isinstance(row, BadRecord):
                failures += 1
                self._skip(row, failures)
                continue
            failures = 0
            if packer.add(row):
                packed.append(index)
            else:
                waiting.append((index, row))
        self._waiting = waiting
        if self._data.log_examples:
            self.last_examples = tuple(self._order[index] for index in packed)
        return packer.batch()

    def get_state(self) -> dict[str, Any]:
        """The state of this data shard's stream, as JSON data; see `set_state`."""
        return {
            "data_shard": self._data_shard,
            "next": self._next,
            "waiting": [index for index, _ in self._waiting],
            "skipped": dict(self.skipped),
            "examples": dict(self._counts),
            "resharding": self._order.resharding.to_json(),
            "weights": {name: weight for name, (_, weight) in self._order.tasks.items()},
            "scores": {str(one.folder): one.manifest.fingerprint for one in self._laid_out.scores},
        }

    def under(self, data: DataSpec, adapters: Mapping) -> "TrainBatches":
        """The batches of the same examples with other settings, from the beginning; `set_state` continues."""
        given = self._examples, self._tokenizer, adapters, self._seed, self._data_shard, self._data_shards
        return TrainBatches(data, *given)

    def set_state(self, states: Sequence[dict[str, Any]]) -> None:
        """Continues where the data shards of a run stopped; bit for bit if their number is unchanged.

        Otherwise all examples that were in no batch yet are resharded: an epoch still contains every example once
        (except skipped records), and the mixture keeps its proportions. So they are if the weights of the tasks have
        changed: each task continues where it was. Layout and batch size may change too: the order of examples stays,
        and those that waited to be packed are laid out again and come first.

        Args:
            states: the results of `get_state` of all data shards after the same step, in any order, with or without
                duplicates.

        Raises:
            UserError: if the state of a data shard is missing, or examples of a task or scores have changed.
            BadRecord: if an example waiting to be packed has become unusable, unless bad records are skipped.
        """
        states = batches_state(list(states))
        by_shard = {state["data_shard"]: state for state in states}
        resharding = Resharding.from_json(states[0]["resharding"])
        missing = sorted(set(range(resharding.data_shards)) - set(by_shard))
        if missing:
            raise UserError(
                f"the checkpoint has no state of the data iterator of data shard {', '.join(map(str, missing))} of "
                f"{resharding.data_shards}: it is incomplete; use another one"
            )
        saved = [by_shard[i] for i in range(resharding.data_shards)]
        self._require_same_data(saved[0]["examples"])
        require_same(self._laid_out.scores, saved[0].get("scores", {}))
        self.close()
        before = Order(self._order.tasks, self._seed)
        if "weights" in states[0]:
            before = Order({name: (self._counts[name], w) for name, w in states[0]["weights"].items()}, self._seed)
        if resharding.data_shards == self._data_shards and before.shares == self._order.shares:
            state = saved[self._data_shard]
            following, waiting, skipped = state["next"], state["waiting"], state["skipped"]
        else:
            orders = [before.shard(i, resharding) for i in range(resharding.data_shards)]
            nexts, waiting = [state["next"] for state in saved], [state["waiting"] for state in saved]
            resharding = reshard(orders, nexts, waiting, self._data_shards)
            following, waiting = resharding.start, []
            skipped = sum((Counter(state["skipped"]) for state in saved if self._data_shard == 0), Counter())
        self._follow(resharding)
        self._next, self.skipped, self._waiting = following, Counter(skipped), []
        for index in waiting:
            row = row_or_bad_record(self._laid_out[index])
            if isinstance(row, BadRecord):
                self._skip(row, failures=0)
            else:
                self._waiting.append((index, row))

    def close(self) -> None:
        """Stops the workers. The iterator can still be used."""
        if self._stream is not None:
            self._stream.close()
        self._stream, self._drawn = None, []

    def _follow(self, resharding: Resharding) -> None:
        self._order = self._order.shard(self._data_shard, resharding)
        self._laid_out.order = self._order.shard(
            self._data_shard, resharding
        )  # a separate copy: another thread reads it

    def _require_same_data(self, examples: Mapping[str, int]) -> None:
        for name in examples | self._counts:
            had, has = examples.get(name, 0), self._counts.get(name, 0)
            if had != has:
                raise UserError(
                    f"task {name!r} had {had} examples and now has {has}: the data changed since the checkpoint; "
                    "restore the data or use another workdir"
                )

    def _draw(self) -> Row | BadRecord:
        if self._stream is None:
            self._stream = iter(read_ahead(Groups(self._laid_out, self._next), self._data.workers))
        if not self._drawn:
            self._drawn = next(self._stream)[::-1]
        self._next += 1
        return row_or_bad_record(self._drawn.pop())

    def _skip(self, error: BadRecord, failures: int) -> None:
        if self._data.on_bad_record == "raise":
            remedy = "polygpt data check lists all such records, and data.on_bad_record=skip leaves them out"
            raise BadRecord(error.reason, error.place, f"{error.detail}; {remedy}" if error.detail else remedy)
        self.skipped[error.reason] += 1
        if self.skipped[error.reason] <= LOGGED:
            log.warning("skipped %s", error)
        if failures >= sum(self._counts.values()):
            counts = ", ".join(f"{reason} {n}" for reason, n in self.skipped.most_common())
            raise UserError(f"{failures} unusable records in a row ({counts}); the last: {error}")


def example_batches(
    examples: Sequence[Example], layout: LayoutSpec, tokenizer: Tokenizer, adapters: Mapping, batch_size: int
) -> Iterator[tuple[Batch, list[Example]]]:
    """The examples in order, one per row, for evaluation. The last batch is filled up with padding rows.

    Raises:
        BadRecord: if an example is unusable.
    """
    for start in range(0, len(examples), batch_size):
        some = [examples[i] for i in range(start, min(start + batch_size, len(examples)))]
        laid_out = [lay_out(example, layout, tokenizer, adapters) for example in some]
        yield collate(laid_out + [None] * (batch_size - len(some)), layout.seq_len, adapters), some
