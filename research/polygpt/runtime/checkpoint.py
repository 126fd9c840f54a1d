"""Checkpoints: written in the background, sealed with a manifest, verified, rotated and restored.

A checkpoint is a folder named by its step, `checkpoints/1000`, with the parameters, their moving average, the optimizer
state, counters, and JSON data: the states of the data iterator and the loop, and the configuration. Orbax writes it
under a temporary name and renames it when complete. Then its manifest is written, and only then are older checkpoints
removed. A checkpoint without a manifest is incomplete and never read.

With several processes, all of them read and write arrays; only process 0 seals, renames and deletes checkpoints and
chooses which one to read. Checkpoints are independent of devices and processes: arrays are restored with any sharding.
"""

import contextlib
import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, Literal

import jax

from polygpt.errors import Unreadable
from polygpt.runtime import manifest
from polygpt.runtime.manifest import Damaged, Incomplete, Record, records
from polygpt.runtime.processes import barrier, broadcast, first_fault
from polygpt.runtime.storage import storage_fault
from polygpt.spec import Spec

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointSpec(Spec):
    """When checkpoints are written and which are kept. The best one by the run's metric is always kept."""

    every: int = 500
    """Steps between checkpoints."""
    every_minutes: float | None = 5.0
    """Maximum minutes between checkpoints, however slow the steps; null for steps only."""
    keep: int = 2
    """Number of latest checkpoints to keep."""
    keep_every: int | None = None
    """Keep checkpoints at multiples of this step forever; null for none."""

    def validate(self):
        self.require(self.every >= 1, "every", "at least 1")
        self.require(self.every_minutes is None or self.every_minutes > 0, "every_minutes", "null or above 0")
        self.require(self.keep >= 1, "keep", "at least 1")
        self.require(self.keep_every is None or self.keep_every >= 1, "keep_every", "null or at least 1")


def best(found: Sequence[Record], better: Literal["lower", "higher"]) -> Record | None:
    """The evaluated, finite checkpoint with the best metric; the earliest in a tie."""
    ranked = [record for record in found if record.finite and record.metric is not None]
    sign = 1 if better == "lower" else -1
    return min(ranked, key=lambda record: (sign * record.metric, record.step), default=None)


def choose(found: Sequence[Record], use: str, better: Literal["lower", "higher"]) -> Record:
    """The best of these checkpoints if `use` is "best" and one was evaluated, otherwise the latest."""
    return (best(found, better) if use == "best" else None) or found[-1]


def kept(found: Sequence[Record], spec: CheckpointSpec, better: Literal["lower", "higher"]) -> set[int]:
    """The steps that rotation keeps: the latest, every n-th, the best, and always the last finite one.

    Also the last finite one that was due by `every`: rewinds go back to it, regardless of later checkpoints written on
    signals or by time.
    """
    steps = {record.step for record in found[-spec.keep :]}
    if spec.keep_every:
        steps |= {record.step for record in found if record.step % spec.keep_every == 0}
    finite = [record for record in found if record.finite]
    due = [record for record in finite if record.step % spec.every == 0]
    return steps | {record.step for record in (finite[-1:] + due[-1:] + [best(found, better)]) if record}


class Checkpoints:
    """The checkpoints of a running run.

    All listed checkpoints are sealed. After `restore`, none is newer than the restored state, so the last finite one
    was verified or written by this process, and rotation can rely on it.

    Args:
        folder: absolute path; created if missing.
        spec: when to write and which to keep.
        better: whether lower or higher metrics are better.
    """

    def __init__(self, folder: Path, spec: CheckpointSpec, better: Literal["lower", "higher"]):
        self.folder, self.spec, self.better = folder, spec, better
        self._primary = jax.process_index() == 0
        self._damaged: dict[int, str] = {}
        self._records: dict[int, Record] = {}
        if self._primary:
            self._survey()
        seen = [dataclasses.astuple(record) for record in self._records.values()], list(self._damaged.items())
        seen, damaged = json.loads(broadcast("checkpoints", json.dumps(seen)))
        self._records, self._damaged = {step: Record(step, *rest) for step, *rest in seen}, dict(damaged)
        from polygpt.runtime import stored  # local import: Orbax takes a second to import

        self._stored, self._writer = stored, stored.writer()
        self._thread = futures.ThreadPoolExecutor(1, "checkpoints")
        self._pending: futures.Future | None = None
        self._failure: Exception | None = None  # why the latest save failed

    def save(self, state: Any, *, metric: float | None, finite: bool, data: dict[str, Any]) -> None:
        """Writes a checkpoint in the background. Blocks only for the previous save and the copy from the device.

        If the disk is full or the folder is not writable, logs a warning and keeps earlier checkpoints; the next `save`
        tries again, and `wait` raises the error of the latest save. Raises immediately if there is no earlier
        checkpoint, or if there are several processes.

        Args:
            state: the state; may be donated as soon as this returns.
            metric: the run's metric at this step, if it was evaluated.
            finite: whether all parameters are finite.
            data: JSON data.
        """
        self._join()
        self._failure = None
        step = int(state.step)
        if step in self._records:
            return
        record = Record(step, None if metric is None or not math.isfinite(metric) else float(metric), bool(finite))
        place = self.folder / str(step)
        try:
            if self._primary and place.exists():
                _set_aside(place, "replaced by a new one")
            self._writer.save(place, args=self._stored.parts(state, data))
        except Exception as error:
            self._fail(step, error)
            self._join()
        else:
            self._pending = self._thread.submit(self._commit, record)

    def restore(
        self, target: Any, initial: Callable[[], Any] | None = None, before: int | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """Restores the latest usable state with its JSON data; None if there is no checkpoint.

        Reads every byte twice: once to verify it, shared between all processes, and once to restore it. Skipped
        checkpoints are logged, and set aside once an older one has been restored.

        Args:
            target: shapes, dtypes and shardings of the state, or a function that returns them for the step of a
                checkpoint; shardings may differ from those at saving.
            initial: returns the state before the first step, for counters that an older checkpoint lacks; default:
                zeros.
            before: use only checkpoints before this step, to rewind a running run; later ones are set aside.

        Raises:
            Unreadable: if there are complete checkpoints, but none is usable.
        """
        self._join()
        barrier("checkpoints to be read")  # process 0 may still be sealing the latest one
        faults = {}
        for step in sorted(self._records.keys() | self._damaged.keys(), reverse=True):
            if before is not None and step >= before:
                continue
            record = self._records.get(step)
            if record and not record.finite:
                log.warning("skipping checkpoint %s/%d: it has non-finite values", self.folder, step)
                continue
            fault = manifest.verified_by_all(self.folder / str(step)) if record else self._damaged[step]
            found, fault = (None, fault) if fault else self._read(step, target, initial)
            if found:
                self._set_aside_after(step)
                return found
            faults[step] = fault
            log.warning("skipping checkpoint %s/%d: %s", self.folder, step, fault)
        if faults:
            raise Unreadable(f"no checkpoint can be read ({listed(faults)}): remove {self.folder} to start over")
        self._set_aside_after(-1)
        return None

    def metric(self, step: int) -> float | None:
        """The run's metric at a checkpoint; None if it was not evaluated there."""
        return self._records[step].metric if step in self._records else None

    def measured(self, step: int, metric: float) -> None:
        """Adds the run's metric to a checkpoint that was saved without it, if it still exists."""
        self._join()
        record = self._records.get(step)
        if record is None or not math.isfinite(metric):
            return
        self._records[step] = record = dataclasses.replace(record, metric=float(metric))
        if self._primary:
            try:
                manifest.update_record(self.folder / str(step), record)
            except (OSError, Damaged) as error:
                log.warning("cannot add the metric to checkpoint %s/%d: %s", self.folder, step, first_line(error))

    def finite_steps(self) -> list[int]:
        """The steps of the finite checkpoints on disk."""
        return [record.step for record in records(self.folder) if record.finite]

    def latest(self) -> int:
        """Step of the latest complete checkpoint, after the save in progress; 0 without one. Raises no error of it."""
        if self._pending is not None:
            futures.wait([self._pending])
        return max(self._records, default=0)

    def check(self) -> None:
        """Raises the error of a finished save if the run cannot continue without it. Does not block."""
        if self._pending is not None and self._pending.done():
            self._join()

    def wait(self) -> None:
        """Blocks until everything is written. Raises the error of the latest save."""
        self._join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Waits, then stops the background threads."""
        try:
            self._join()
        finally:
            self._thread.shutdown()
            self._writer.close()

    def _survey(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in [*self.folder.glob("*.orbax-checkpoint-tmp*"), *self.folder.glob("removed-*")]:
            _remove(leftover)
        for step, found in manifest.survey(self.folder):
            if isinstance(found, Incomplete):
                _set_aside(self.folder / str(step), str(found))
            elif isinstance(found, Damaged):
                self._damaged[step] = str(found)
            else:
                self._records[step] = found

    def _commit(self, record: Record) -> None:
        """Seals the checkpoint that Orbax wrote, then applies rotation. Runs in the background."""
        try:
            self._writer.wait_until_finished()
            if self._primary:
                manifest.seal(self.folder / str(record.step), record, jax.process_count())
        except Exception as error:
            self._fail(record.step, error)
            return
        self._records[record.step] = record
        keep = kept([self._records[step] for step in sorted(self._records)], self.spec, self.better)
        for step in self._records.keys() - keep:
            del self._records[step]
            if self._primary:
                _remove(self.folder / str(step))
        if self._primary:
            for aside in self.folder.glob("unusable-*"):
                if int(aside.name.rpartition("-")[2]) <= record.step:  # the run has got past it
                    _remove(aside)

    def _fail(self, step: int, error: Exception) -> None:
        self._failure = error
        said = storage_fault(error, self.folder)
        log.warning("checkpoint %s/%d was not written: %s", self.folder, step, said or first_line(error))
        if self._primary:
            with contextlib.suppress(OSError):  # the folder may not be readable
                for place in [self.folder / str(step), *self.folder.glob(f"{step}.orbax-checkpoint-tmp*")]:
                    _remove(place)

    def _join(self) -> None:
        """Waits for the save in progress. Raises its error unless the run can continue without this checkpoint."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
        failure = self._failure
        if failure is None:
            return
        alone = jax.process_count() == 1
        if not (alone and storage_fault(failure, self.folder) and any(r.finite for r in self._records.values())):
            self._failure = None
            raise failure

    def _read(self, step: int, target: Any, initial) -> tuple[tuple[Any, dict[str, Any]] | None, str]:
        """State and data, or a description of what is wrong."""
        try:
            wanted = target(step) if callable(target) else target
            found, fault = self._stored.read(self._writer, self.folder / str(step), wanted, initial), ""
        except Exception as error:  # Orbax raises various errors for damaged files; an older checkpoint may be intact
            found, fault = None, first_line(error)
        fault = first_fault(f"read {step}", fault)
        return (None, fault) if fault else (found, "")

    def _set_aside_after(self, step: int) -> None:
        """The run resumes at `step`: sets aside later checkpoints, which belong to an abandoned continuation."""
        for later in [later for later in self._records.keys() | self._damaged.keys() if later > step]:
            self._records.pop(later, None)
            self._damaged.pop(later, None)
            if self._primary:
                _set_aside(self.folder / str(later), f"the run resumes at step {max(step, 0)}")


def listed(faults: Mapping[int, str]) -> str:
    """Faults grouped with their steps: "6, 4: params/d/a is missing; 2: ..."."""
    steps: dict[str, list[str]] = {}
    for step, fault in faults.items():
        steps.setdefault(fault, []).append(str(step))
    return "; ".join(f"{', '.join(some)}: {fault}" for fault, some in steps.items())


def first_line(error: BaseException) -> str:
    """An error as one line of limited length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _set_aside(place: Path, why: str) -> None:
    """Renames a checkpoint so that it is neither overwritten nor restored, but not lost."""
    aside = place.with_name(f"unusable-{place.name}")
    _remove(aside)
    place.rename(aside)
    log.warning("checkpoint %s was renamed to %s: %s", place, aside.name, why)


def _remove(place: Path) -> None:
    """Removes atomically for readers: renames first, so that an interrupted removal leaves another name."""
    try:
        if place.exists():
            doomed = (
                place if place.name.startswith("removed-") else place.rename(place.with_name(f"removed-{place.name}"))
            )
            shutil.rmtree(doomed)
    except OSError as error:
        log.warning("%s cannot be removed: %s", place, first_line(error))
