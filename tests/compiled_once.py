"""Programs that are assembled and compiled once per test process, however many runs train by them or are opened."""

import contextlib
import functools

import pytest

from polygpt.ablation import stacked, together
from polygpt.models.functional import bind
from polygpt.training import automatic, parallel, program, run, state, step, trainer

MODULES = (automatic, parallel, program, state, step)
MOST = 16
"""Programs that are kept."""


class Programs:
    """`assemble` that gives the same program for an equal experiment.

    A program is kept apart for what tests have replaced in `MODULES` meanwhile.
    """

    def __init__(self):
        self.kept = []

    def __call__(self, *given):
        replaced = [value for module in MODULES for value in vars(module).values()]
        for before, modules, found in self.kept:
            if before == given and len(modules) == len(replaced) and all(map(lambda a, b: a is b, modules, replaced)):
                return found
        found = program.assemble(*given)
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
OVER_SEEDS = functools.lru_cache(MOST)(stacked.over_seeds)


@contextlib.contextmanager
def used():
    """From here on runs of this process train by programs that are kept, and are opened with models that are."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (trainer, together):
            patch.setattr(module, "assemble", PROGRAMS)
        patch.setattr(stacked, "over_seeds", OVER_SEEDS)
        patch.setattr(run, "bind", MODELS)
        yield
