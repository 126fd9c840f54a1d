"""Reading the logs of examples of all data shards of a run, and what they prove."""

import json
from collections import Counter
from pathlib import Path


def logged(workdir: Path) -> dict[int, list[tuple[str, int, int]]]:
    """By step, the (task, position, number) of all examples that it was trained on, whichever data shard read them."""
    steps: dict[int, list] = {}
    for path in sorted(workdir.glob("examples-*.jsonl")):
        for line in path.read_text().splitlines():
            line = json.loads(line)
            steps.setdefault(line["step"], []).extend(map(tuple, line["examples"]))
    return dict(sorted(steps.items()))


def assert_once_an_epoch(steps: dict[int, list[tuple[str, int, int]]], sizes: dict[str, int], epochs: int = 1) -> None:
    """No example came twice, and each of the first epochs had every example.

    Args:
        steps: what `logged` gives, of a run that went on for longer than those epochs.
        sizes: the number of examples of each task, of which none is left out.
        epochs: how many are complete.
    """
    assert list(steps) == list(range(1, len(steps) + 1)), "a step is missing"
    times = Counter(example[:2] for examples in steps.values() for example in examples)
    assert {example: n for example, n in times.items() if n > 1} == {}, "examples that came twice"
    for task, size in sizes.items():
        missing = [position for position in range(epochs * size) if (task, position) not in times]
        assert missing == [], f"positions of {task!r} that never came"
        for epoch in range(epochs):
            here = [n for some in steps.values() for name, p, n in some if name == task and p // size == epoch]
            assert sorted(here) == list(range(size))
