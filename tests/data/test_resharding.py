"""The resharding among data shards: whatever their number from restart to restart, no example is lost or comes
twice."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygpt.data.example import Example, Text
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task, train_batches
from polygpt.data.mixture import Order, reshard
from polygpt.data.resharding import Resharding
from polygpt.data.sources.base import Source
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.errors import BadRecord, UserError
from polygpt.migration import BATCHES

ROWS = 12


class Lines(Sequence):
    """Texts of all lengths; every `bad`-th example cannot be used."""

    def __init__(self, count: int, bad: int):
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Example:
        if self.bad and i % self.bad == 0:
            raise BadRecord("made up", f"example {i}")
        return Example((Text("x" * (1 + i * 7 % 23), 1.0),), f"example {i}")


@dataclasses.dataclass(frozen=True)
class LinesSource(Source):
    count: int
    bad: int = 0

    def open(self):
        return Lines(self.count, self.bad)


TOKENIZER = Bytes().build()
TASKS = {"many": Task(LinesSource(61), weight=3.0), "few": Task(LinesSource(13, bad=5))}
DATA = DataSpec(TASKS, LayoutSpec(seq_len=32), ROWS, on_bad_record="skip", log_examples=True)


class Run:
    """All data shards of a run, in one process."""

    def __init__(self, data_shards: int, states: list[str] | None = None, data: DataSpec = DATA):
        self.data_shards = [
            train_batches(data, TOKENIZER, {}, seed=5, data_shard=i, data_shards=data_shards)
            for i in range(data_shards)
        ]
        for data_shard in self.data_shards if states else ():
            data_shard.set_state([json.loads(state) for state in states])

    def states(self) -> list[str]:
        return [json.dumps(data_shard.get_state()) for data_shard in self.data_shards]

    def skipped(self) -> Counter:
        return sum((data_shard.skipped for data_shard in self.data_shards), Counter())

    def take(self, counts: Sequence[int]) -> list[list[tuple]]:
        """The examples of each of so many batches of each data shard."""
        found = []
        for data_shard, count in zip(self.data_shards, counts, strict=True):
            for _ in range(count):
                batch = next(data_shard)
                assert len(data_shard.last_examples) == batch.segment_BT.max(axis=1).sum()
                found.append(list(data_shard.last_examples))
        return found

    def close(self):
        for data_shard in self.data_shards:
            data_shard.close()


data_shards = st.sampled_from([1, 2, 3, 4, 6])
phases = st.lists(
    data_shards.flatmap(lambda n: st.lists(st.integers(0, 3), min_size=n, max_size=n)), min_size=1, max_size=6
)


@settings(max_examples=30, deadline=None)
@given(phases)
def test_no_example_is_lost_or_repeated_whatever_the_feeders(phases):
    delivered, states, skipped = [], None, Counter()
    for counts in phases:
        run = Run(len(counts), states)
        assert run.skipped() == skipped
        delivered += sum(run.take(counts), [])
        states, skipped = run.states(), run.skipped()
        run.close()
    # What waits now comes when the run goes on: until the epochs that have begun are over.
    run = Run(2, states)
    sizes = {name: task.source.count for name, task in TASKS.items()}
    stops = {name: sizes[name] for name in sizes}
    for name, position, _ in delivered:
        stops[name] = max(stops[name], (position // sizes[name] + 1) * sizes[name])
    bad = {
        name: {i for i in range(sizes[name]) if task.source.bad and i % task.source.bad == 0}
        for name, task in TASKS.items()
    }
    want = {name: stop // sizes[name] * (sizes[name] - len(bad[name])) for name, stop in stops.items()}
    for _ in range(200):
        if all(sum(n == name and p < stop for n, p, _ in delivered) >= want[name] for name, stop in stops.items()):
            break
        delivered += sum(run.take((1, 1)), [])
    run.close()
    for name, size in sizes.items():
        here = [(position, number) for task, position, number in delivered if task == name and position < stops[name]]
        assert len(set(here)) == len(here), "an example came twice"
        for epoch in range(stops[name] // size):
            numbers = [number for position, number in here if position // size == epoch]
            assert sorted(numbers) == [i for i in range(size) if i not in bad[name]]
    assert len({(name, position) for name, position, _ in delivered}) == len(delivered)


def test_as_many_feeders_go_on_to_the_bit_after_another_division():
    states = Run(2)
    states.take((3, 3))
    run = Run(3, states.states())
    run.take((2, 2, 2))
    saved = run.states()
    again = Run(3, [saved[2], saved[0], saved[1], saved[0]])  # in any order, and of two processes of one data shard
    assert again.states() == saved
    for data_shard, other in zip(run.data_shards, again.data_shards, strict=True):
        for _ in range(4):
            np.testing.assert_array_equal(next(data_shard).tokens_BT, next(other).tokens_BT)
            assert data_shard.last_examples == other.last_examples


@pytest.mark.slow
def test_worker_processes_read_what_is_left_over_too():
    before = Run(3)
    before.take((1, 3, 2))
    states = before.states()
    plain, working = Run(2, states), Run(2, states, DATA.replace(workers=1))
    assert plain.take((4, 4)) == working.take((4, 4))
    working.close()


def positions(order: Order, start: int, count: int) -> list[int]:
    return [order[index][1] for index in range(start, start + count)]


def test_what_was_left_over_comes_first():
    order = Order({"a": (100, 1.0)}, seed=0)
    orders = [order.shard(i, Resharding(2)) for i in range(2)]
    # Drawn were 0 2 4 6 8, of which 6 waits, and 1 3.
    resharding = reshard(orders, [5, 2], [[3], []], 3)
    assert (resharding.left["a"].tolist(), resharding.frontier["a"], resharding.start) == ([5, 6, 7], 9, 5)
    orders = [order.shard(i, resharding) for i in range(3)]
    assert [positions(o, 5, 3) for o in orders] == [[5, 9, 12], [6, 10, 13], [7, 11, 14]]
    # Leftovers that nobody drew remain, whoever they were dealt out to.
    resharding = reshard(orders, [5, 6, 5], [[], [], []], 1)
    assert positions(order.shard(0, resharding), 6, 4) == [5, 7, 9, 10]
    resharding = reshard([order.shard(0, resharding)], [9], [[6, 8]], 2)  # 5 and 9 wait
    assert [positions(order.shard(i, resharding), 9, 3) for i in range(2)] == [[5, 10, 12], [9, 11, 13]]


def test_a_rare_task_keeps_its_share_however_often_the_feeders_change():
    tasks = {"common": (1000, 200.0), "rare": (7, 1.0)}
    order, counts = Order(tasks, 0), Counter()
    resharding, start = Resharding(2), 0
    for restart in range(200):
        stop = start + 11
        orders = [order.shard(i, resharding) for i in range(resharding.data_shards)]
        counts.update(o[index][0] for o in orders for index in range(start, stop))
        resharding = reshard(orders, [stop] * resharding.data_shards, [()] * resharding.data_shards, 2 + restart % 2)
        start = resharding.start
    assert counts["rare"] == pytest.approx(counts.total() / 201, abs=3)


def test_the_state_stays_small_when_one_of_many_feeders_is_far_behind():
    order = Order({"a": (10**6, 2.0), "b": (10**6, 1.0)}, 0)
    orders = [order.shard(i, Resharding(64)) for i in range(64)]
    following = [30_000 + 37 * i * i % 1009 for i in range(64)]
    resharding = reshard(orders, following, [()] * 64, 48)
    assert sum(map(len, resharding.left.values())) > 10_000
    text = json.dumps(resharding.to_json())
    assert len(text) < 10_000
    again = Resharding.from_json(json.loads(text))
    assert (again.data_shards, again.start, again.frontier) == (48, max(following), resharding.frontier)
    for name, positions in resharding.left.items():
        np.testing.assert_array_equal(again.left[name], positions)


def test_states_that_are_missing_are_named():
    states = [json.loads(state) for state in Run(4).states()]
    fresh = train_batches(DATA, TOKENIZER, {}, seed=5)
    with pytest.raises(UserError, match="no state of the data iterator of data shard 1, 3 of 4: it is incomplete"):
        fresh.set_state([states[0], states[2]])


def test_examples_are_named_only_where_that_is_asked_for():
    iterator = train_batches(DATA.replace(log_examples=False), TOKENIZER, {}, seed=5)
    next(iterator)
    assert iterator.last_examples == ()


def test_the_state_of_an_older_checkpoint_has_other_names_of_its_keys():
    mine = Run(2)
    mine.take([3, 3])
    old = {today: before for before, today in BATCHES.items()}
    states = [
        re.sub("data_shards|data_shard|resharding", lambda found: old[found[0]], state) for state in mine.states()
    ]
    assert '"feeder": 0' in states[0] and '"feeders": 2' in states[0]
    for shards in (2, 3):
        assert Run(shards, states).states() == Run(shards, mine.states()).states()
