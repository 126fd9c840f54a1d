"""Messages about where a run starts or resumes, whether it is finished, and jumps of the learning rate."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polygpt.files import write_atomically
from polygpt.init.start import Start
from polygpt.optim.optim import Optim
from polygpt.runtime import goodput
from polygpt.runtime.checkpoint import CheckpointSpec
from polygpt.runtime.manifest import records
from polygpt.spec import counted
from polygpt.training.experiment import Experiment
from polygpt.training.loggers import last_step
from polygpt.training.program import Program
from polygpt.training.scored import require_scored


def require_start(programs: Sequence[Program], workdir: Path) -> None:
    """Raises UserError if a run without checkpoints, of a program in each phase, cannot start from the source that its
    experiment names, or if its data lack what its objectives score."""
    if not records(workdir / "checkpoints"):
        _ = programs[0].start
        require_scored(*(program.experiment for program in programs))


def started(workdir: Path, start: Start) -> list[str]:
    """What a new run starts from, which is also written to init.txt; [] if all parameters are random.

    What merged parameters were merged from is written to init.json.
    """
    if not start.table:
        return []
    write_atomically(workdir / "init.txt", start.table + "\n")
    write_atomically(workdir / "init.json", json.dumps({"merged_from": start.merged_from}, indent=1) + "\n")
    return [start.table]


def merged_from(workdir: Path) -> dict[str, int]:
    """What initial parameters of a run were merged from, by name, see `models.adapter_file.merged_from`."""
    try:
        return dict(json.loads((workdir / "init.json").read_text(encoding="utf-8"))["merged_from"])
    except (OSError, ValueError, KeyError, TypeError):  # of an older version: only their own checksums count
        return {}


def lost_steps(workdir: Path, done: int, spec: CheckpointSpec) -> list[str]:
    """A message if the previous process got further than the last checkpoint.

    Args:
        workdir: the run folder, with goodput.jsonl and metrics.jsonl.
        done: step of the checkpoint; 0 without one.
        spec: when checkpoints are written.
    """
    reached = max((line["step"] for line in goodput.read(workdir / "goodput.jsonl")[-1:]), default=0)
    reached = max(reached, last_step(workdir / "metrics.jsonl"))
    if reached <= done:
        return []
    saved = f"the last checkpoint is at step {done}" if done else "there was no checkpoint yet"
    interval = f"train.checkpoint.every {spec.every}"
    if spec.every_minutes is not None:
        interval += f", every_minutes {spec.every_minutes:g}"
    steps = f"{counted(reached - done, 'step')} ({done + 1} to {reached})"
    return [f"{steps} lost and will be repeated: {saved} ({interval})"]


def diverged(step: int, metrics: Mapping[str, Any], limit: int, kept: Sequence[int]) -> str:
    """The message if `limit` steps in a row were not finite; `kept` are the steps of the finite checkpoints."""
    names = {"loss": "the loss", "gradient_norm": "the gradient", "update_norm": "the update"}
    faults = [said for name, said in names.items() if not np.all(np.isfinite(metrics[name]))]
    saved = f"the checkpoint of step {max(kept)} is intact" if kept else "there is no checkpoint yet"
    remedy = "lower the learning rate or look at the data"
    if step == limit:  # from the first step on, before a learning rate could do harm
        remedy = "no step was finite, so look at the model (polygpt attention check) and at the data"
    return (
        f"step {step}: {', '.join(faults) or 'loss, gradient or update'} not finite, {limit} times in a row; {saved}: "
        f"{remedy} (train.max_nonfinite sets this limit)"
    )


def unsaved_steps(saved: int, done: int) -> list[str]:
    """A message if a process ends with unsaved steps."""
    if done <= saved:
        return []
    kept = f"resumes at step {saved}" if saved else "starts over"
    return [f"{counted(done - saved, 'step')} ({saved + 1} to {done}) not saved: the same command {kept}"]


def resume_messages(
    experiment: Experiment, workdir: Path, done: int, finished: bool, config: Mapping[str, Any]
) -> list[str]:
    """Messages about a resumed run.

    Args:
        experiment: the experiment as it is now.
        workdir: the run folder.
        done: step of the checkpoint, at least 1.
        finished: whether training is complete.
        config: JSON data of the experiment at the time of the checkpoint.
    """
    train, optim = experiment.train, experiment.optim
    planned, given = config["train"]["steps"], config["optim"]
    before = optim.replace(schedule_steps=given.get("schedule_steps"), rewarm=given.get("rewarm")).learning_rate(
        planned
    )

    def jump(optim: Optim, steps: int) -> tuple[float, float] | None:
        """The learning rate at the last step, before and now; None if they are equal."""
        was, now = (float(rate(done - 1)) for rate in (before, optim.learning_rate(steps)))
        return (was, now) if abs(now - was) > 0.01 * abs(was) else None

    def remedy(steps: int) -> str:
        """Options that avoid the jump."""
        spans = [span for span in (planned, given.get("schedule_steps")) if span]
        rises = max(1, (steps - done) // 10)
        kept = [span for span in spans if not jump(optim.replace(schedule_steps=span, rewarm=None), steps)]
        risen = [span for span in kept if not jump(optim.replace(schedule_steps=span, rewarm=rises), steps)]
        said = [f"--optim.schedule_steps {span} keeps the learning rate" for span in kept[:1]]
        for span in risen[:1]:
            said.append(
                f"--optim.schedule_steps {span} --optim.rewarm {rises} warms up to the new schedule in {rises} steps"
            )
        return "; ".join(said) or "no option avoids a jump"

    if finished and done < train.steps:
        return [f"{workdir} stopped early at step {done} by train.patience: --train.patience null continues it"]
    if finished:
        more = f"--train.steps {2 * done}"
        if jump(optim.replace(schedule_steps=None, rewarm=None), 2 * done):
            more += f" ({remedy(2 * done)})"
        return [
            f"{workdir} finished at step {done}: polygpt evaluate {workdir}, polygpt report {workdir}, "
            f"or train longer: {more}"
        ]
    lines = [f"resuming at step {done} in {workdir}"]
    if rates := jump(optim, train.steps):
        values = {
            "train.steps": (planned, train.steps),
            "optim.schedule_steps": (given.get("schedule_steps"), optim.schedule_steps),
            "optim.rewarm": (given.get("rewarm"), optim.rewarm),
        }
        changed = [
            f"{name} was {'null' if was is None else was} and is now {'null' if now is None else now}"
            for name, (was, now) in values.items()
            if was != now
        ]
        lines.append(
            f"{', '.join(changed)}, so the learning rate at step {done} jumps from {rates[0]:.3g} to {rates[1]:.3g}: "
            f"{remedy(train.steps)}"
        )
    return lines
