"""Trains an experiment in a run folder; the loop itself is in `trainer.py`."""

import contextlib
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from polygpt.errors import UserError
from polygpt.runtime import goodput, processes
from polygpt.runtime.compilation import enable_cache
from polygpt.runtime.goodput import Goodput
from polygpt.runtime.interruption import Interruption
from polygpt.runtime.memory import keep_freed_memory
from polygpt.runtime.storage import storage_faults
from polygpt.runtime.watchdog import Watchdog
from polygpt.training import resuming
from polygpt.training.experiment import Experiment
from polygpt.training.loggers import JsonLines, Logger, Terminal
from polygpt.training.trainer import Trainer, TrainResult
from polygpt.training.workdir import Code, local, require_same, with_code


def train(
    experiment: Experiment,
    workdir: str | Path,
    loggers: Callable[[Path, int, int], list[Logger]] | None = None,
    begun: float | None = None,
    code: Code = "run",
    seeds: Sequence[int] = (),
    on_message: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> TrainResult:
    """Trains, or resumes where the last call with this folder ended, stopped or was killed.

    Args:
        experiment: the experiment to train.
        workdir: the run folder; created if missing.
        loggers: maps (workdir, start step, steps) to loggers; default: terminal, JSON lines and TensorBoard. Only
            process 0 has loggers.
        begun: when the work for this call began, in seconds since the epoch, to account for startup time; default: now.
        code: for a resumed run, "run" keeps the user classes that it started with, "current" loads them from the files
            as they are now.
        seeds: trains the experiment with each of these seeds, all in one program on one device (see `seeds.py`), in
            place of its own. Needs `loggers` that take lists: losses and metrics are then one per seed. No checkpoint
            is the best, there is no patience and there are no rewinds.
        on_message: shows messages for the user.

    Raises:
        Diverged: too many consecutive non-finite steps (of all seeds), or too many loss spikes.
        UserError: the folder belongs to a different experiment, data or settings are invalid, or the disk is full.
    """
    workdir, settings = local(workdir), experiment.train
    enable_cache()
    keep_freed_memory()
    with processes.together(settings.processes), storage_faults(workdir), contextlib.ExitStack() as stack:
        new, refused = not workdir.exists(), False
        on_message = on_message if jax.process_index() == 0 else lambda text: None
        stack.callback(lambda: refused and shutil.rmtree(workdir, ignore_errors=True))  # after all files are closed
        interruption = stack.enter_context(Interruption())
        clock = Goodput(workdir / "goodput.jsonl" if jax.process_index() == 0 else None, begun)
        stack.callback(clock.close)
        watchdog = Watchdog(settings.watchdog, clock, workdir)
        if settings.watchdog is not None:
            stack.enter_context(watchdog)
        require_same(workdir, experiment)
        experiment = with_code(workdir, experiment, code)
        given = experiment, workdir, loggers or default_loggers, interruption, clock, watchdog, stack
        trainer = Trainer(*given, seeds, on_message)
        try:
            outcome = trainer.run()
        except UserError:
            refused = new and trainer.done == 0 and jax.process_index() == 0  # nothing to resume
            raise
        finally:
            for line in resuming.unsaved_steps(trainer.checkpoints.latest(), trainer.done):
                on_message(line)
    if seconds := goodput.summary(goodput.read(clock.path)):
        on_message(goodput.table(seconds))
    return outcome


def default_loggers(workdir: Path, step: int, steps: int) -> list[Logger]:
    """The loggers of the command line."""
    from polygpt.training.tensorboard import TensorBoard  # imports tensorboardX, which few other callers need

    return [Terminal(step, steps), JsonLines(workdir, step), TensorBoard(workdir, step)]
