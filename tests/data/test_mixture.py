"""The mixture: the order of examples, shares of tasks and data shards."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygpt.data import mixture
from polygpt.data.mixture import TABLE, Order, Shuffled
from polygpt.data.resharding import Resharding


@given(st.dictionaries(st.text(), st.tuples(st.integers(1, 40), st.floats(0.05, 20)), min_size=1, max_size=4))
def test_an_epoch_has_every_example_once_in_another_order(tasks):
    order = Order(tasks, seed=3)
    drawn = {name: [] for name in tasks}
    for index in range(400):
        name, position, number = order[index]
        assert position == len(drawn[name])
        drawn[name].append(number)
    for name, (size, _) in tasks.items():
        numbers = drawn[name]
        epochs = [numbers[i : i + size] for i in range(0, len(numbers) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert size < 12 or len({tuple(epoch) for epoch in epochs}) == len(epochs)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.integers(1, 2000))
def test_tasks_are_mixed_evenly_by_weight(weights, count):
    order = Order({str(i): (10, weight) for i, weight in enumerate(weights)}, seed=0)
    drawn = Counter(order[index][0] for index in range(count))
    for i, weight in enumerate(weights):
        assert abs(drawn[str(i)] - count * weight / sum(weights)) <= len(weights)


@pytest.mark.parametrize("names", [("large", "tiny"), ("tiny", "large")])
def test_a_task_of_tiny_weight_is_drawn_seldom_and_not_never(names):
    order = Order({name: (10, {"large": 1.0, "tiny": 1e-12}[name]) for name in names}, seed=0)
    drawn = Counter(order[index][0] for index in range(100))
    assert drawn["large"] >= 99
    assert order.drawn_before(2**31)["tiny"] in (1, 2)


@pytest.mark.parametrize("size", [1, 5, 1000, TABLE + 7])
@pytest.mark.parametrize("data_shards", [2, 3])
def test_the_feeders_share_an_epoch(size, data_shards):
    tasks = {"a": (size, 1.0), "b": (3, 1.0)}
    whole = Order(tasks, seed=1)
    count = min(size, 2000)
    expected = {whole[index] for index in range(2 * count)}
    parts = [whole.shard(i, Resharding(data_shards)) for i in range(data_shards)]
    drawn = [parts[i % data_shards][i // data_shards] for i in range(2 * count)]
    a = [(position, number) for name, position, number in drawn if name == "a"]
    assert len(set(a)) == len(a)
    common = min(count, len(a)) - 2 * data_shards
    assert {pair for pair in a if pair[0] < common} == {(p, n) for name, p, n in expected if name == "a" and p < common}


@pytest.mark.parametrize("size", [TABLE + 1, TABLE + 9, 100_000])
def test_a_large_task_is_shuffled_without_a_table(size):
    shuffles = [Shuffled(size, 5, epoch) for epoch in range(2)]
    epochs = [[numbers[i] for i in range(size)] for numbers in shuffles]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), range(size))
        # As far from the identity as chance has it: correlations have a deviation of 1 / sqrt(size), about 0.004.
        assert abs(np.corrcoef(epoch, range(size))[0, 1]) < 0.02
        assert abs(np.corrcoef(epoch[1:], epoch[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(*epochs)[0, 1]) < 0.02


def test_each_of_many_tasks_is_shuffled_once_an_epoch(monkeypatch):
    made = []
    monkeypatch.setattr(mixture, "Shuffled", lambda *arguments: made.append(arguments) or Shuffled(*arguments))
    order = Order({str(i): (10, 1.0) for i in range(100)}, seed=0)
    for index in range(2000):
        order[index]
    assert len(made) == len(set(made)) == 200


def test_seeds_and_tasks_have_their_own_order():
    order, other = Order({"a": (50, 1.0), "b": (50, 1.0)}, 0), Order({"a": (50, 1.0), "c": (50, 3.0)}, 0)

    def numbers(order, task, count=50):
        return [n for name, p, n in (order[i] for i in range(5 * count)) if name == task and p < count]

    assert numbers(order, "a") == numbers(other, "a")  # whatever it is mixed with
    assert numbers(order, "a") != numbers(order, "b")
    assert numbers(order, "a") != numbers(Order({"a": (50, 1.0)}, 1), "a")
