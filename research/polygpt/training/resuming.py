"""What a person is told when a run is resumed: from where, that it is finished, that its learning rate jumps."""

from pathlib import Path

from polygpt.runtime import goodput
from polygpt.training.experiment import Experiment


def lost(record: Path, done: int, every: int) -> list[str]:
    """A line for a person if the process before had come further than what was saved.

    Args:
        record: the run's goodput.jsonl.
        done: steps that the checkpoint has taken; 0 without one.
        every: steps between checkpoints.
    """
    reached = max((line["step"] for line in goodput.read(record)[-1:]), default=0)
    if reached <= done:
        return []
    saved = f"the last checkpoint is of step {done}" if done else "there was no checkpoint yet"
    return [f"steps {done + 1} to {reached} were lost and are taken again: {saved} (train.checkpoint.every {every})"]


def about(experiment: Experiment, workdir: Path, done: int, finished: bool, planned: int) -> list[str]:
    """Lines for a person.

    Args:
        experiment: as it is trained now.
        workdir: the run folder.
        done: steps that the checkpoint has taken, at least one.
        finished: whether there is nothing left to train.
        planned: `train.steps` when the checkpoint was written.
    """
    train, schedule = experiment.train, experiment.optim.schedule
    if finished and done < train.steps:
        return [f"{workdir} stopped early at step {done}, by train.patience: --train.patience null goes on"]
    if finished:
        uses = f"polygpt evaluate {workdir}, polygpt report {workdir}, or more steps: --train.steps {2 * done}"
        return [f"{workdir} is finished, at step {done}: {uses}"]
    lines = [f"goes on from step {done} in {workdir}"]
    before, now = (float(schedule.build(steps)(done - 1)) for steps in (planned, train.steps))
    if abs(now - before) > 0.01 * abs(before):
        lines.append(
            f"train.steps was {planned} and is {train.steps}: {type(schedule).__name__} is stretched over all of them, "
            f"so the learning rate at step {done} goes from {before:.3g} to {now:.3g}"
        )
    return lines
