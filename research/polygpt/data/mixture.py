"""The mixture: which example comes when, as a function of an index into an endless stream."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from polygpt.data.division import Division

TABLE = 2**16
"""Tasks of at most so many examples are shuffled by a table."""


class Order:
    """Which example is which of an endless stream, by random access.

    Each task's examples are shuffled anew every epoch and none is left out or repeated within one. The tasks take turns
    so evenly that after any number of examples each has had its share, give or take one for every task before it.
    """

    def __init__(
        self, tasks: Mapping[str, tuple[int, float]], seed: int, feeder: int = 0, division: Division | None = None
    ):
        """The whole stream, or what is dealt out to one feeder.

        Args:
            tasks: number of examples and weight of each.
            seed: of the shuffles.
            feeder, division: whose stream it is. Each task is divided, so that every feeder sees the same mixture.
        """
        self.tasks, self.seed = tasks, seed
        total = sum(weight for _, weight in tasks.values())
        self.shares = {name: max(1, round(weight / total * 2**30)) for name, (_, weight) in tasks.items()}
        # Seeds of a task do not depend on the other tasks.
        self.entropy = {
            name: [int(word) for word in np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(2)]
            for name in tasks
        }
        self.feeder, self.division = feeder, division or Division()
        self._before = self._turns(self.division.start)
        self._epochs: dict[str, tuple[int, Shuffled]] = {}  # of each task the epoch it is in, as long as it is

    def shard(self, feeder: int, division: Division) -> "Order":
        """What is dealt out to a feeder."""
        return Order(self.tasks, self.seed, feeder, division)

    def __getitem__(self, index: int) -> tuple[str, int, int]:
        """(name of the task, position in the task's endless stream, number of the example)."""
        name, turn = self._turn(index)
        nth = (turn - self._before[name]) * self.division.feeders + self.feeder
        position = self.division.position(name, nth)
        size = self.tasks[name][0]
        epoch, i = divmod(position, size)
        at, numbers = self._epochs.get(name, (-1, None))
        if at != epoch:
            numbers = Shuffled(size, self.entropy[name][0], epoch)
            self._epochs[name] = epoch, numbers
        return name, position, numbers[i]

    def drawn(self, index: int) -> dict[str, int]:
        """How many examples of each task this division has given by an index."""
        return {name: turn - self._before[name] for name, turn in self._turns(index).items()}

    def _turns(self, index: int) -> dict[str, int]:
        """How many times each task was drawn before an index; see `_turn`."""
        turns, before, rest = {}, index, sum(self.shares.values())
        for name, share in self.shares.items():
            left = before * (rest - share) // rest
            turns[name], before, rest = before - left, left, rest - share
        return turns

    def _turn(self, index: int) -> tuple[str, int]:
        """The task that is drawn at an index, and how many times it was drawn before.

        The first task takes its share of the indices, evenly spread, the second its share of those left, and so on.
        """
        before, after, rest = index, index + 1, sum(self.shares.values())
        for name, share in self.shares.items():  # noqa: B007
            left_before, left_after = before * (rest - share) // rest, after * (rest - share) // rest
            if left_before == left_after:
                break
            before, after, rest = left_before, left_after, rest - share
        return name, before - left_before

    def generator(self, name: str, position: int) -> np.random.Generator:
        """The randomness of the example at a position of a task's stream."""
        return np.random.default_rng([*self.entropy[name], position])


def divide_anew(
    orders: Sequence[Order], following: Sequence[int], waiting: Sequence[Sequence[int]], feeders: int
) -> Division:
    """The division among another number of feeders, after one that was given up.

    Args:
        orders: of all feeders of that division, in their order.
        following: the index into its stream that each feeder would have drawn next.
        waiting: indices that each has drawn and not put into a batch yet.
        feeders: how many there are from now on.

    Returns:
        It depends on nothing but the arguments, so that all processes find the same one.
    """
    old = orders[0].division
    drawn = [order.drawn(index) for order, index in zip(orders, following, strict=True)]
    kept = [order[index][:2] for order, indices in zip(orders, waiting, strict=True) for index in indices]
    frontier, left = {}, {}
    for task in orders[0].tasks:
        known = len(old.left.get(task, ()))
        lasts = ((turns[task] - 1) * old.feeders + i for i, turns in enumerate(drawn) if turns[task])
        dealt = max(known, 1 + max(lasts, default=-1))
        undrawn = (n for i, turns in enumerate(drawn) for n in range(turns[task] * old.feeders + i, dealt, old.feeders))
        positions = [old.position(task, n) for n in undrawn] + [position for name, position in kept if name == task]
        frontier[task] = old.frontier.get(task, 0) + dealt - known
        left[task] = np.array(sorted(positions), np.int64)
    return Division(feeders, max(following), frontier, left)


class Shuffled:
    """A permutation of 0, ..., size - 1 that seed and epoch decide, by random access.

    Few examples are shuffled by a table. Many are by a Feistel network of four rounds over the next power of four,
    walked until it hits a number below `size` (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", sections 3
    and 4), which needs no memory. Grain's own shuffle by index takes 13 ms a number where there are two examples, and
    gives one number twice where there are 65,537.
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
