"""Checkpoints: written in the background by Orbax, rotated, restored. Nothing else in the package knows Orbax.

A checkpoint is a folder named by its step, `checkpoints/1000`. It holds the parameters, their moving average, the
optimizer's state, the counts, and JSON data: the data iterator's state, the loop's, the configuration. Orbax writes it
under another name, notes in `_CHECKPOINT_METADATA` when it is whole, and renames it. A folder without that note is half
a checkpoint and is never read.
"""

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import orbax.checkpoint as ocp

from polygpt.errors import UserError
from polygpt.spec import Spec
from polygpt.training.state import State

log = logging.getLogger(__name__)
# Orbax logs the traceback of an error that it raises too: whoever catches it says it in one line.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))


@dataclasses.dataclass(frozen=True)
class CheckpointSpec(Spec):
    """When checkpoints are written and which of them are kept. The best by the run's metric is kept always."""

    every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """How many of the latest are kept."""
    keep_every: int | None = None
    """Checkpoints of steps that are multiples of this are kept for good; null for none."""

    def validate(self):
        self.require(self.every >= 1, "every", "at least 1")
        self.require(self.keep >= 1, "keep", "at least 1")
        self.require(self.keep_every is None or self.keep_every >= 1, "keep_every", "null or at least 1")


@dataclasses.dataclass(frozen=True)
class Record:
    """What rotation knows of a checkpoint: the run's metric there (None: not evaluated), and whether all is finite."""

    step: int
    metric: float | None
    finite: bool


def records(folder: Path) -> list[Record]:
    """The whole checkpoints in a folder, oldest first."""
    found = (_record(place) for place in folder.glob("*") if place.name.isdigit())
    return sorted((record for record in found if record), key=lambda record: record.step)


def _record(place: Path) -> Record | None:
    try:
        note = json.loads((place / "_CHECKPOINT_METADATA").read_text())
    except (OSError, ValueError):
        return None
    if not note.get("commit_timestamp_nsecs"):
        return None
    custom = note.get("custom_metadata") or {}
    return Record(int(place.name), custom.get("metric"), custom.get("finite", True))


def best(found: Sequence[Record], better: Literal["lower", "higher"]) -> Record | None:
    """The evaluated and finite checkpoint with the best metric, the earliest of equals."""
    ranked = [record for record in found if record.finite and record.metric is not None]
    sign = 1 if better == "lower" else -1
    return min(ranked, key=lambda record: (sign * record.metric, record.step), default=None)


def kept(found: Sequence[Record], spec: CheckpointSpec, better: Literal["lower", "higher"]) -> set[int]:
    """The steps that rotation keeps: the latest, every n-th, the best, and the last finite one come what may."""
    steps = {record.step for record in found[-spec.keep :]}
    if spec.keep_every:
        steps |= {record.step for record in found if record.step % spec.keep_every == 0}
    finite = [record for record in found if record.finite]
    return steps | {record.step for record in (finite[-1:] + [best(found, better)]) if record}


class Checkpoints:
    """The checkpoints of a run under way.

    Args:
        folder: absolute; made if it does not exist.
        spec: when and which.
        better: whether a lower or a higher metric is better.
    """

    def __init__(self, folder: Path, spec: CheckpointSpec, better: Literal["lower", "higher"]):
        self.folder, self.spec, self.better = folder, spec, better
        folder.mkdir(parents=True, exist_ok=True)
        for place in folder.glob("*"):
            if place.name.isdigit() and _record(place) is None:
                _set_aside(place, "it is half-written")
        self._records = {record.step: record for record in records(folder)}
        self._damaged: set[int] = set()
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Rotation(self), cleanup_tmp_directories=True, enable_async_checkpointing=True
            ),
        )

    def save(self, state: State, *, metric: float | None, finite: bool, data: dict[str, Any]) -> None:
        """Writes a checkpoint in the background. Only the copy from the device is waited for, and the save before this.

        Args:
            state: the state; it may be donated as soon as this returns.
            metric: the run's metric at this step, if it was evaluated.
            finite: whether all parameters are finite.
            data: JSON data.
        """
        step = int(state.step)
        if step in self._records:
            if self._records[step].finite and step not in self._damaged:
                return
            self.wait()
            _set_aside(self.folder / str(step), "a new one takes its place")
            self._damaged.discard(step)
            self._manager.reload()
        metric = None if metric is None or not math.isfinite(metric) else metric
        self._records[step] = Record(step, metric, finite)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()},
                data=ocp.args.JsonSave(data),
            ),
            custom_metadata={"metric": metric, "finite": finite},
            force=True,
        )

    def restore(self, target: State) -> tuple[State, dict[str, Any]] | None:
        """The latest usable state with its JSON data, or None if there is no checkpoint.

        Args:
            target: shapes, dtypes and shardings of the state.

        Raises:
            UserError: if there are whole and finite checkpoints and none of them can be read.
        """
        faults = []
        for record in sorted(self._records.values(), key=lambda record: -record.step):
            if not record.finite:
                log.warning("%s/%d holds values that are not finite: left out", self.folder, record.step)
                continue
            try:
                return self._read(record.step, target)
            except Exception as error:  # whatever Orbax raises for a damaged file: an older checkpoint may be whole
                self._damaged.add(record.step)
                faults.append(f"{record.step}: {first_line(error)}")
                log.warning("cannot read the checkpoint %s/%s", self.folder, faults[-1])
        if faults:
            raise UserError(f"{self.folder}: no checkpoint can be read ({faults[0]}): remove the folder to start anew")
        return None

    def finite_steps(self) -> list[int]:
        """The steps of the finite checkpoints on disk."""
        return [record.step for record in records(self.folder) if record.finite]

    def wait(self) -> None:
        """Until all is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the background threads."""
        self._manager.close()

    def _read(self, step: int, target: State) -> tuple[State, dict[str, Any]]:
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(target).items()}
        found = self._manager.restore(step, args=ocp.args.Composite(**items, data=ocp.args.JsonRestore()))
        counts = found["counts"]
        state = State(
            step=counts["step"],
            params=found["params"],
            opt_state=found["optimizer"],
            ema=found["ema"] if target.ema is not None else None,
            skipped=counts["skipped"],
            skipped_in_row=counts["skipped_in_row"],
        )
        return state, found["data"]


def read_parameters(folder: Path, step: int, target: Any, averaged: bool) -> Any:
    """The parameters of a checkpoint, or their moving average, alone. `target` holds shapes, dtypes and shardings."""
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(folder / str(step) / ("ema" if averaged else "params"), target)


def first_line(error: BaseException) -> str:
    """An error on one line that is not endless."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _items(state: State) -> dict[str, Any]:
    counts = {"step": state.step, "skipped": state.skipped, "skipped_in_row": state.skipped_in_row}
    items = {"params": state.params, "optimizer": state.opt_state, "counts": counts}
    return items if state.ema is None else items | {"ema": state.ema}


def _set_aside(place: Path, why: str) -> None:
    """Out of the way of saving and restoring, but not lost."""
    aside = place.with_name(f"unusable-{place.name}")
    shutil.rmtree(aside, ignore_errors=True)
    place.rename(aside)
    log.warning("checkpoint %s is now %s: %s", place, aside.name, why)


class _Rotation(ocp.checkpoint_managers.PreservationPolicy):
    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        known = self.checkpoints._records
        found = [known.get(info.step, Record(info.step, None, True)) for info in checkpoints]
        keep = kept(found, self.checkpoints.spec, self.checkpoints.better)
        return [record.step in keep for record in found]
