"""The mixture: the order of examples, as a function of an index into an endless stream."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from polygpt.data.resharding import Resharding

TABLE = 2**16
"""Tasks of up to this many examples are shuffled with a table."""


class Order:
    """Random access to an endless stream of examples.

    Each task is reshuffled every epoch, and an epoch contains each of its examples exactly once. Tasks are interleaved
    evenly: after any number of examples each task has had its share, up to one example per task listed before it.
    """

    def __init__(
        self,
        tasks: Mapping[str, tuple[int, float]],
        seed: int,
        data_shard: int = 0,
        resharding: Resharding | None = None,
    ):
        """The whole stream, or the stream of one data shard.

        Args:
            tasks: number of examples and weight of each task.
            seed: seed of the shuffles.
            data_shard, resharding: the data shard of this stream. Each task is divided among all data shards, so all
                see the same mixture.
        """
        self.tasks, self.seed = tasks, seed
        total = sum(weight for _, weight in tasks.values())
        self.shares = {name: max(1, round(weight / total * 2**30)) for name, (_, weight) in tasks.items()}
        # The seeds of a task do not depend on the other tasks.
        self.entropy = {
            name: [int(word) for word in np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(2)]
            for name in tasks
        }
        self.data_shard, self.resharding = data_shard, resharding or Resharding()
        self._before = self._turns(self.resharding.start)
        self._epochs: dict[str, tuple[int, Shuffled]] = {}  # the current epoch of each task

    def shard(self, data_shard: int, resharding: Resharding) -> "Order":
        """The stream of one data shard."""
        return Order(self.tasks, self.seed, data_shard, resharding)

    def __getitem__(self, index: int) -> tuple[str, int, int]:
        """(task, position in the endless stream of the task, index of the example)."""
        name, turn = self._turn(index)
        nth = (turn - self._before[name]) * self.resharding.data_shards + self.data_shard
        position = self.resharding.position(name, nth)
        size = self.tasks[name][0]
        epoch, i = divmod(position, size)
        at, numbers = self._epochs.get(name, (-1, None))
        if at != epoch:
            numbers = Shuffled(size, self.entropy[name][0], epoch)
            self._epochs[name] = epoch, numbers
        return name, position, numbers[i]

    def drawn_before(self, index: int) -> dict[str, int]:
        """Number of examples of each task drawn in this resharding before an index."""
        return {name: turn - self._before[name] for name, turn in self._turns(index).items()}

    def _turns(self, index: int) -> dict[str, int]:
        """How often each task was drawn before an index; see `_turn`."""
        turns, before, rest = {}, index, sum(self.shares.values())
        for name, share in self.shares.items():
            left = before * (rest - share) // rest
            turns[name], before, rest = before - left, left, rest - share
        return turns

    def _turn(self, index: int) -> tuple[str, int]:
        """The task drawn at an index, and how often it was drawn before.

        The first task takes its share of the indices, evenly spaced; the second its share of the rest; and so on.
        """
        before, after, rest = index, index + 1, sum(self.shares.values())
        for name, share in self.shares.items():  # noqa: B007
            left_before, left_after = before * (rest - share) // rest, after * (rest - share) // rest
            if left_before == left_after:
                break
            before, after, rest = left_before, left_after, rest - share
        return name, before - left_before

    def generator(self, name: str, position: int) -> np.random.Generator:
        """The generator for the augmentation of the example at a position of a task's stream."""
        return np.random.default_rng([*self.entropy[name], position])


def reshard(
    orders: Sequence[Order], following: Sequence[int], waiting: Sequence[Sequence[int]], data_shards: int
) -> Resharding:
    """The resharding that continues an earlier one on a different number of data shards.

    Args:
        orders: the orders of all data shards of the earlier resharding.
        following: the index that each data shard would have drawn next.
        waiting: the indices that each data shard has drawn but not yet put into a batch.
        data_shards: the new number of data shards.

    Returns:
        The new resharding. It depends only on the arguments, so all processes compute the same one.
    """
    old = orders[0].resharding
    drawn = [order.drawn_before(index) for order, index in zip(orders, following, strict=True)]
    kept = [order[index][:2] for order, indices in zip(orders, waiting, strict=True) for index in indices]
    frontier, left = {}, {}
    for task in orders[0].tasks:
        known = len(old.left.get(task, ()))
        lasts = ((turns[task] - 1) * old.data_shards + i for i, turns in enumerate(drawn) if turns[task])
        dealt = max(known, 1 + max(lasts, default=-1))
        undrawn = (
            n for i, turns in enumerate(drawn) for n in range(turns[task] * old.data_shards + i, dealt, old.data_shards)
        )
        positions = [old.position(task, n) for n in undrawn] + [position for name, position in kept if name == task]
        frontier[task] = old.frontier.get(task, 0) + dealt - known
        left[task] = np.array(sorted(positions), np.int64)
    return Resharding(data_shards, max(following), frontier, left)


class Shuffled:
    """Random access to a permutation of 0, ..., size - 1, determined by seed and epoch.

    Small tasks use a table. Large ones use a Feistel network of four rounds over the next power of four, iterated until
    the result is below `size` (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", sections 3 and 4), which
    needs no memory. Grain's own index shuffle takes 13 ms per number for two examples, and for 65,537 examples it
    repeats a number.
    """

    def __init__(self, size: int, seed: int, epoch: int):
        self.size, self.table, self.keys = size, None, []
        if size <= TABLE:
            self.table = np.random.default_rng([seed, epoch]).permutation(size)
        else:
            self.keys = np.random.SeedSequence([seed, epoch]).generate_state(4, np.uint64).tolist()

    def __getitem__(self, i: int) -> int:
        if self.table is not None:
            return int(self.table[i])
        half = ((self.size - 1).bit_length() + 1) // 2
        mask = (1 << half) - 1
        while True:
            left, right = i >> half, i & mask
            for key in self.keys:
                mixed = (right + key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
                mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
                left, right = right, left ^ (mixed >> 64 - half)
            i = left << half | right
            if i < self.size:
                return i
