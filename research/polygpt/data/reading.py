"""Reading ahead: the examples of a stream, laid out by Grain's thread or its worker processes."""

import pickle
import sys

import grain
from absl import flags

from polygpt.data.layout import MediaCache, lay_out
from polygpt.data.mixture import Order
from polygpt.data.packing import Row
from polygpt.data.pickling import dumps
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.errors import BadRecord

GROUP = 16
"""Examples that travel together from a worker: each journey costs as much as laying out a short example."""


class LaidOut:
    """The stream laid out, by random access: rows, and the faults of records. Travels to the workers."""

    def __init__(self, data, examples: dict, tokenizer: Tokenizer, adapters: dict, order: Order):
        self.data, self.examples, self.tokenizer, self.adapters, self.order = data, examples, tokenizer, adapters, order
        self.cache = MediaCache(data.cache)

    def __getstate__(self) -> bytes:
        return dumps(self.__dict__)

    def __setstate__(self, state: bytes) -> None:
        self.__dict__.update(pickle.loads(state))

    def __getitem__(self, index: int) -> Row | BadRecord:
        name, position, number = self.order[index]
        task, layout = self.data.tasks[name], self.data.layout
        rng = self.order.generator(name, position) if task.augment else None
        try:
            example = self.examples[name][number]
            given = (example, layout, self.tokenizer, self.adapters, rng, task.augment, self.cache)
            return lay_out(*given, prompt_weight=task.prompt_weight)
        except BadRecord as error:
            return error


class Groups:
    """What `LaidOut` gives from some index on, in groups."""

    def __init__(self, laid_out: LaidOut, start: int):
        self.laid_out, self.start = laid_out, start

    def __len__(self) -> int:
        return sys.maxsize // GROUP

    def __getitem__(self, group: int) -> list[Row | BadRecord]:
        first = self.start + group * GROUP
        return [self.laid_out[index] for index in range(first, first + GROUP)]


def read_ahead(groups: Groups, workers: int) -> grain.IterDataset:
    """The groups in order, made ahead of their use: in a thread, or in so many processes."""
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    dataset = grain.MapDataset.source(groups).to_iter_dataset(read)
    if workers == 0:
        return dataset
    if not flags.FLAGS.is_parsed():  # Grain reads its own flags when it starts workers, which fails in other programs
        flags.FLAGS.mark_as_parsed()
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
