"""Programs that are assembled and compiled once per test process, however many runs train by them or are opened."""

import contextlib

import pytest

from polygpt.ablation import memory
from polygpt.models.functional import bind
from polygpt.training import automatic, parallel, phases, program, run, seeds, state, step

MODULES = (automatic, parallel, program, seeds, state, step)
MOST = 16
"""Programs that are kept."""


class Programs:
    """`assemble` that gives the same program for an equal experiment.

    A program is kept apart for what tests have replaced in `MODULES` meanwhile.
    """

    def __init__(self):
        self.kept = []

    def __call__(self, *args, seeds=(), phase=0, like=None):
        given = (*args, seeds, phase)
        replaced = [value for module in MODULES for value in vars(module).values()]
        for before, modules, found in self.kept:
            if before == given and len(modules) == len(replaced) and all(map(lambda a, b: a is b, modules, replaced)):
                return found
        found = program.assemble(*args, seeds=seeds, phase=phase, like=like)
        object.__setattr__(found, "initial", found.initial)  # one function, so that jax traces it once
        self.kept = [*self.kept[1 - MOST :], (given, replaced, found)]
        return found


class Models:
    """`bind` that gives the same model for an equal specification: what jax compiled for it is found again."""

    def __init__(self):
        self.kept = []

    def __call__(self, *given):
        for before, found in self.kept:
            if before == given:
                return found
        found = bind(*given)
        self.kept = [*self.kept[1 - MOST :], (given, found)]
        return found


PROGRAMS = Programs()
MODELS = Models()


@contextlib.contextmanager
def used():
    """From here on runs of this process train by programs that are kept, and are opened with models that are."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (phases, memory):
            patch.setattr(module, "assemble", PROGRAMS)
        patch.setattr(run, "bind", MODELS)
        yield
