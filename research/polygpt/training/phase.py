"""Phases of a run: from some step on, fields of the experiment have other values."""

import bisect
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from polygpt.errors import SpecError
from polygpt.overrides import replaced
from polygpt.parameters import Traits, changed_shape
from polygpt.spec import Spec, differences, to_json


@dataclasses.dataclass(frozen=True)
class Phase(Spec):
    """From a step on, other values of some fields of `data`, `model`, `optim` and `objectives`.

    All parameters keep their names and shapes. Parameters, moments and moving average carry over, and so does the order
    of examples. Schedules count from the beginning of the run. A parameter that was frozen and no longer is begins with
    fresh moments.
    """

    start: int
    """Number of steps before the phase."""
    changes: Mapping[str, Any]
    """New values by dotted name, such as {"data.layout.seq_len": 512}, until a later phase changes them again."""

    def validate(self):
        self.require(self.start >= 1, "start", "at least 1")
        self.require(bool(self.changes), "changes", "at least one field")


FIXED = {
    r"(?!(data|model|optim|objectives)(\.|$))": "phases may change fields of data, model, optim and objectives only",
    r"data\.tasks(\.[^.]+(\.source\b.*)?)?$": "all phases have the same tasks and sources: change the weight of a task",
    r"data\.log_examples$": "set it for the whole run",
    r"optim\.optimizer\.class$": "no other optimizer can use the moments: keep the optimizer",
    r"optim\.ema$": "an average cannot begin or end within a run: set it for the whole run",
}
"""Names of fields that no phase changes, as regular expressions, with a remedy."""


def expanded(experiment: Any) -> tuple[Any, ...]:
    """The experiment of each part of a run, without phases: before the first phase, in the first phase, and so on.

    Raises:
        SpecError: a phase changes a field that does not exist or that no phase may change, or a value is not allowed.
    """
    train = experiment.train
    if not train.phases:
        return (experiment,)
    found = [experiment.replace(train=train.replace(phases=()))]
    for number, phase in enumerate(train.phases):
        before, where = found[-1], name_of(number, phase)
        try:
            after = replaced(before, phase.changes)
        except SpecError as error:
            raise SpecError(f"{where}: {str(error).removeprefix('--')}") from None
        for name, old, new in differences(to_json(before), to_json(after)):
            for pattern, remedy in FIXED.items():
                if re.match(pattern, name) and not (name == "optim.ema" and None not in (old, new)):
                    raise SpecError(f"{where} changes {name.removesuffix('.class')}: {remedy}")
        _require_held_out(where, before, after)
        found.append(after)
    return tuple(found)


def number_at(starts: Sequence[int], step: int) -> int:
    """The phase of a step, counted from 1, given the number of steps before each phase. Step 0 is in the first."""
    return max(bisect.bisect_left(starts, step) - 1, 0)


def steps_of(experiment: Any) -> list[int]:
    """Number of steps of each part of a run, in the order of `expanded`; 0 for those that it does not reach."""
    train = experiment.train
    bounds = [min(start, train.steps) for start in (0, *(phase.start for phase in train.phases), train.steps)]
    return [end - begin for begin, end in itertools.pairwise(bounds)]


def at(experiment: Any, step: int) -> Any:
    """The experiment of the phase of a step, without phases."""
    return expanded(experiment)[number_at((0, *(phase.start for phase in experiment.train.phases)), step)]


def name_of(number: int, phase: Phase) -> str:
    """A phase, for messages."""
    return f"train.phases.{number} (after step {phase.start})"


def _require_held_out(where: str, before: Any, after: Any) -> None:
    """Rejects evaluations during training whose rows get longer or shorter: their losses could not be compared."""
    lengths = [experiment.data.layout.seq_len for experiment in (before, after)]
    if before.train.evaluate_every is None or lengths[0] == lengths[1]:
        return
    if task := next((name for name, task in before.evaluation.tasks.items() if task.seq_len is None), None):
        raise SpecError(
            f"{where} changes data.layout.seq_len, and with it what the held-out task {task!r} measures: set "
            f"evaluation.tasks.{task}.seq_len, such as to {max(lengths)}"
        )


def require_same_parameters(where: str, before: Mapping[str, Traits], after: Mapping[str, Traits]) -> None:
    """Raises SpecError that names the first parameter, if any, whose shape the phase `where` changes."""
    if changed := changed_shape(before, after):
        name, was, now = changed
        raise SpecError(
            f"{where}: the parameter {name} is {was} before and {now} after: phases keep the names and shapes of all "
            "parameters; to grow a model, start another run from this one (init: polygpt.init.grow:Grow)"
        )
