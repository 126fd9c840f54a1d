"""Prefetching: lays out a stream of examples in Grain's thread or its worker processes."""

import dataclasses
import pickle
import sys
from collections.abc import Iterable, Sequence

from polygpt.data.layout import MediaCache, lay_out
from polygpt.data.mixture import Order
from polygpt.data.packing import Row
from polygpt.data.pickling import dumps
from polygpt.data.scores import Scores
from polygpt.data.sources.base import example_at
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.data.transforms.base import transformed
from polygpt.errors import BadRecord, UserError

GROUP = 16
"""Number of examples that a worker sends at once: each transfer costs as much as laying out a short example."""


class LaidOut:
    """Random access to the rows of the stream, with BadRecords for unusable records, and UserErrors for scores that are
    not theirs. Pickled to the workers."""

    def __init__(
        self,
        data,
        examples: dict,
        tokenizer: Tokenizer,
        adapters: dict,
        order: Order,
        scores: Sequence[Scores] = (),
    ):
        self.data, self.examples, self.tokenizer, self.adapters, self.order = data, examples, tokenizer, adapters, order
        self.scores = scores
        self.cache = MediaCache(data.cache)

    def __getstate__(self) -> bytes:
        return dumps(self.__dict__)

    def __setstate__(self, state: bytes) -> None:
        self.__dict__.update(pickle.loads(state))

    def __getitem__(self, index: int) -> Row | UserError:
        name, position, number = self.order[index]
        task, layout = self.data.tasks[name], self.data.layout
        rng = self.order.generator(name, position) if task.augment or task.transform else None
        try:
            example = transformed(example_at(self.examples[name], number), task.transform, rng)
            given = (example, layout, self.tokenizer, self.adapters, rng, task.augment, self.cache)
            row = lay_out(*given, prompt_weight=task.prompt_weight, paired=task.paired)
        except BadRecord as error:
            return error
        try:
            extra = [one.arrays(name, number, example, row) for one in self.scores]
        except UserError as error:
            return error
        return dataclasses.replace(row, extra={k: v for some in (row.extra, *extra) for k, v in some.items()})


def row_or_bad_record(given: Row | UserError) -> Row | BadRecord:
    """What `LaidOut` gives, unless it is an error that ends training, which is raised."""
    if isinstance(given, UserError) and not isinstance(given, BadRecord):
        raise given
    return given


class Groups:
    """The rows of `LaidOut` from index `start` on, in groups."""

    def __init__(self, laid_out: LaidOut, start: int):
        self.laid_out, self.start = laid_out, start

    def __len__(self) -> int:
        return sys.maxsize // GROUP

    def __getitem__(self, group: int) -> list[Row | BadRecord]:
        first = self.start + group * GROUP
        return [self.laid_out[index] for index in range(first, first + GROUP)]


def read_ahead(groups: Groups, workers: int) -> Iterable[list[Row | BadRecord]]:
    """The groups in order, prefetched in a thread (0 workers) or in that many processes."""
    import grain  # imported here, because it imports Orbax, which commands that do not train should not wait for
    from absl import flags

    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    dataset = grain.MapDataset.source(groups).to_iter_dataset(read)
    if workers == 0:
        return dataset
    if not flags.FLAGS.is_parsed():  # Grain reads absl flags when it starts workers, which fails if they are unparsed
        flags.FLAGS.mark_as_parsed()
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
