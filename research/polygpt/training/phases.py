"""The programs of a run in phases (`phase.py`), and the way from one to the next."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from polygpt.data.loader import require_data
from polygpt.data.scores import open_scores
from polygpt.errors import UserError
from polygpt.spec import differences, to_json
from polygpt.training.carry import carry
from polygpt.training.experiment import Experiment
from polygpt.training.phase import name_of, number_at
from polygpt.training.program import Program, assemble
from polygpt.training.state import State


class Phases:
    """The program of each phase of a run; only one without `train.phases`. All use the same devices.

    Args:
        experiment: the experiment to train.
        vocabulary: V.
        seeds: see `assemble`.

    Raises:
        UserError: as for `assemble`, or a phase cannot follow on the one before: names the phase.
    """

    def __init__(self, experiment: Experiment, vocabulary: int, seeds: Sequence[int] = ()):
        self._phases = experiment.train.phases
        self.starts = (0, *(phase.start for phase in self._phases))
        self.programs = [assemble(experiment, vocabulary, seeds=seeds)]
        for number, phase in enumerate(self._phases):
            try:
                self.programs.append(self._following(experiment, vocabulary, seeds, number + 1))
            except UserError as error:
                where, said = name_of(number, phase), str(error)
                raise UserError(said if said.startswith("train.phases.") else f"{where}: {said}") from None

    def program(self, step: int) -> Program:
        """The program of a step, counted from 1; for step 0, the first."""
        return self.programs[number_at(self.starts, step)]

    def target(self, step: int) -> Any:
        """Shapes, dtypes and shardings of the state in the checkpoint of a step. It is that of the step's phase, also
        right before another phase."""
        program = self.program(step)
        return program.parallel.abstract(program.bare)

    def carried(self, state: State, done: int) -> State:
        """The state after `done` steps, in the form of the next step's phase."""
        before, after = self.program(done), self.program(done + 1)
        return state if before is after else _compiled(before, after, state)

    def message(self, phase: int) -> str:
        """What a phase changes: in one line, and a table of the parameter groups if they differ."""
        before, after = (self.programs[i].experiment for i in (phase - 1, phase))
        found = list(differences(to_json(before), to_json(after)))
        changes = [f"{name} {_short(old)} -> {_short(new)}" for name, old, new in found if "optim.groups" not in name]
        changes += ["optim.groups"] if len(changes) < len(found) else []
        line = f"after step {self.starts[phase]}: {', '.join(changes) or 'no change'}"
        if before.optim.groups == after.optim.groups:
            return line
        model = self.programs[phase].model
        return f"{line}\n{after.optim.table(model.traits, model.growth)}"

    def summary(self) -> str:
        """The first program and what the others change."""
        return "\n".join([self.programs[0].summary(), *map(self.message, range(1, len(self.programs)))])

    def _following(self, experiment: Experiment, vocabulary: int, seeds: Sequence[int], phase: int) -> Program:
        before = self.programs[-1]
        program = assemble(experiment, vocabulary, seeds=seeds, phase=phase, like=self.programs[0])
        data = program.experiment.data
        require_data(data, program.experiment.model.adapters, program.parallel.data_shards)
        if data.scores:
            open_scores(data, program.experiment.tokenizer.build(), {})
        state = jax.eval_shape(before.initial)
        jax.eval_shape(lambda state: carry(before, program, state), state)
        return program


def _compiled(before: Program, after: Program, state: State) -> State:
    """`carry` on the devices; the state given is invalid afterwards."""
    runs, references = after.parallel, state.references
    state = runs.as_global_arrays(dataclasses.replace(state, references={}))
    places = runs.shardings(after.bare)
    carried = jax.jit(lambda state: carry(before, after, state), out_shardings=places, donate_argnums=0)(state)
    return dataclasses.replace(carried, references=references)


def _short(value: Any) -> str:
    if isinstance(value, dict) and "class" in value:
        value = value["class"].rpartition(":")[2]
    text = str("null" if value is None else value)
    return text if len(text) <= 40 else text[:37] + "..."
