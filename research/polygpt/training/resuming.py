"""What a person is told when a run is resumed: from where, that it is finished, that its learning rate jumps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polygpt.optim.optim import Optim
from polygpt.runtime import goodput
from polygpt.runtime.checkpoint import CheckpointSpec
from polygpt.spec import counted
from polygpt.training.experiment import Experiment
from polygpt.training.loggers import last_step


def lost(workdir: Path, done: int, spec: CheckpointSpec) -> list[str]:
    """A line for a person if the process before had come further than what was saved.

    Args:
        workdir: the run folder; its goodput.jsonl and metrics.jsonl tell how far that was.
        done: steps that the checkpoint has taken; 0 without one.
        spec: when checkpoints are written.
    """
    reached = max((line["step"] for line in goodput.read(workdir / "goodput.jsonl")[-1:]), default=0)
    reached = max(reached, last_step(workdir / "metrics.jsonl"))
    if reached <= done:
        return []
    saved = f"the last checkpoint is of step {done}" if done else "there was no checkpoint yet"
    rhythm = f"train.checkpoint.every {spec.every}"
    if spec.every_minutes is not None:
        rhythm += f", every_minutes {spec.every_minutes:g}"
    steps = f"{counted(reached - done, 'step')} ({done + 1} to {reached})"
    return [f"{steps} lost, to be taken again: {saved} ({rhythm})"]


def unsaved(saved: int, done: int) -> list[str]:
    """A line for a person when a process ends with steps that are not saved."""
    if done <= saved:
        return []
    kept = f"goes on from step {saved}" if saved else "begins anew"
    return [f"{counted(done - saved, 'step')} ({saved + 1} to {done}) not saved: the same command {kept}"]


def about(experiment: Experiment, workdir: Path, done: int, finished: bool, config: Mapping[str, Any]) -> list[str]:
    """Lines for a person.

    Args:
        experiment: as it is trained now.
        workdir: the run folder.
        done: steps that the checkpoint has taken, at least one.
        finished: whether there is nothing left to train.
        config: JSON data of the experiment as it was when the checkpoint was written.
    """
    train, optim = experiment.train, experiment.optim
    planned, given = config["train"]["steps"], config["optim"]
    before = optim.replace(schedule_steps=given.get("schedule_steps"), rewarm=given.get("rewarm")).learning_rate(
        planned
    )

    def jump(optim: Optim, steps: int) -> tuple[float, float] | None:
        """The rate of the last step, as it was and as it would be now; None where they are the same."""
        was, now = (float(rate(done - 1)) for rate in (before, optim.learning_rate(steps)))
        return (was, now) if abs(now - was) > 0.01 * abs(was) else None

    def remedy(steps: int) -> str:
        """The options without a jump."""
        spans = [span for span in (planned, given.get("schedule_steps")) if span]
        rises = max(1, (steps - done) // 10)
        kept = [span for span in spans if not jump(optim.replace(schedule_steps=span, rewarm=None), steps)]
        risen = [span for span in kept if not jump(optim.replace(schedule_steps=span, rewarm=rises), steps)]
        said = [f"--optim.schedule_steps {span} keeps the learning rate" for span in kept[:1]]
        for span in risen[:1]:
            said.append(
                f"--optim.schedule_steps {span} --optim.rewarm {rises} goes to the new schedule in {rises} steps"
            )
        return "; ".join(said)

    if finished and done < train.steps:
        return [f"{workdir} stopped early at step {done}, by train.patience: --train.patience null goes on"]
    if finished:
        more = f"--train.steps {2 * done}"
        if jump(optim.replace(schedule_steps=None, rewarm=None), 2 * done):
            more += f" ({remedy(2 * done)})"
        return [
            f"{workdir} is finished, at step {done}: polygpt evaluate {workdir}, polygpt report {workdir}, "
            f"or more steps: {more}"
        ]
    lines = [f"goes on from step {done} in {workdir}"]
    if rates := jump(optim, train.steps):
        cause = f"train.steps was {planned} and is {train.steps}: {type(optim.schedule).__name__} is stretched over it"
        if optim.schedule_steps is not None:
            cause = f"optim.schedule_steps was {given.get('schedule_steps')} and is {optim.schedule_steps}"
        lines.append(
            f"{cause}, so the learning rate at step {done} goes from {rates[0]:.3g} to {rates[1]:.3g}: "
            f"{remedy(train.steps)}"
        )
    return lines
