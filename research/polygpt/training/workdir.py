"""The run folder: its experiment, its environment, and errors about folders that cannot be used."""

import contextlib
import functools
import importlib.metadata
import json
import logging
import platform
import re
import subprocess
import sys
import types
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import jax

from polygpt import spec
from polygpt.errors import UserError
from polygpt.files import write_atomically
from polygpt.migration import SCHEMA, migrate
from polygpt.runtime import processes
from polygpt.runtime.lock import hold
from polygpt.runtime.manifest import records
from polygpt.snapshot import Snapshot, keep
from polygpt.training.experiment import Experiment

log = logging.getLogger(__name__)

CODE = "code"
"""Folder with the run's copies of user code: see `snapshot.py`."""
Code = Literal["run", "current"]
"""Whether user classes are loaded from the run's copies or from the current files."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
"""Packages whose versions are recorded."""


CHANGEABLE_ON_RESUME = ("train.patience", "optim.schedule_steps", "optim.rewarm")
"""Settings that control how a run continues; they may change on resume."""
EQUIVALENT_SETTINGS = (
    "train.parallel",  # devices: results agree up to rounding
    "train.mesh",
    "train.processes",
    "train.checkpoint",  # files on disk
    "train.use",
    "train.prefetch",  # buffering, logging
    "train.log_every",
    "data.workers",
    "data.cache",
    "data.log_examples",
    "train.watchdog",
    "model.decoder.remat",  # recomputation
    "model.encoder.remat",
    "model.logits_block",
    "model.adapters.*.tower.remat",
)
"""Settings (and everything below them) that may change on resume, because they do not change results."""


def drop_equivalent_settings(data: dict[str, Any]) -> None:
    """Removes the settings in EQUIVALENT_SETTINGS from an experiment's JSON data."""
    for name in EQUIVALENT_SETTINGS:
        *outer, last = name.split(".")
        trees = [data]
        for part in outer:
            inner = [tree.get(key) for tree in trees for key in (tree if part == "*" else (part,))]
            trees = [tree for tree in inner if isinstance(tree, dict)]
        for tree in trees:
            tree.pop(last, None)


def _by_the_first(action: Callable[..., None]) -> Callable[..., None]:
    """Runs the action in process 0 only; if it fails, all processes raise the same error."""

    @functools.wraps(action)
    def done_by_the_first(*arguments) -> None:
        fault = ""
        if jax.process_index() == 0:
            try:
                action(*arguments)
            except UserError as error:
                fault = str(error)
        if fault := processes.broadcast(action.__name__, fault):
            raise UserError(fault)

    return done_by_the_first


def local(workdir: str | Path) -> Path:
    """The run folder as an absolute path. Raises UserError for a bucket URL, which would become a local folder."""
    if scheme := re.match(r"([a-z][a-z0-9+.-]+):/", str(workdir)):
        raise UserError(
            f"--workdir {workdir}: a run folder needs locks, appends and renames, which {scheme[1]} does not "
            "offer: mount the bucket and name the mounted folder"
        )
    return Path(workdir).absolute()


@_by_the_first
def require_same(workdir: Path, experiment: Experiment) -> None:
    """Raises UserError if the folder has checkpoints of a different experiment.

    `train.steps` may grow, settings in CHANGEABLE_ON_RESUME may change on resume, those in EQUIVALENT_SETTINGS at any
    time, and phases that have not begun too.
    """
    path = workdir / "config.json"
    if not path.exists() or not (trained := records(workdir / "checkpoints")):
        return
    config = json.loads(json.dumps(spec.to_json(experiment)))
    former = migrate(_read(path), str(path))
    for one in (former, config):
        _drop_later_phases(one, trained[-1].step)
    for name, old, new in spec.differences(former, config):
        if name == "train.steps" and isinstance(old, int) and new > old or name in CHANGEABLE_ON_RESUME:
            continue
        if any(fnmatchcase(name, same) or fnmatchcase(name, f"{same}.*") for same in EQUIVALENT_SETTINGS):
            continue
        raise UserError(
            f"{workdir} is a run with a different configuration: {name} is {_short(old)} there, {_short(new)} here: "
            "choose another workdir (--workdir)"
        )


def _drop_later_phases(config: Any, step: int) -> None:
    """Removes the phases that begin after a step, or at it, from an experiment's JSON data."""
    train = config.get("train") if isinstance(config, dict) else None
    phases = train.get("phases") if isinstance(train, dict) else None
    if isinstance(phases, list):
        train["phases"] = [one for one in phases if not isinstance(one, dict) or one.get("start", 0) < step]


def with_code(workdir: Path, experiment: Experiment, code: Code) -> Experiment:
    """The experiment for training in this folder. A resumed run keeps its code unless `code` is "current".

    Raises:
        SpecError: if the experiment does not fit the run's copies of its classes.
    """
    trained = jax.process_index() == 0 and bool(records(workdir / "checkpoints"))
    if not processes.broadcast("code", "kept" * trained) or code == "current":
        return experiment
    kept = Snapshot(workdir / CODE)
    if not kept.needed:
        return experiment
    _warn_edited(workdir, tuple(kept.edited()))
    return spec.from_json(json.loads(json.dumps(spec.to_json(experiment))), load=kept.load_module)


@_by_the_first
def claim(workdir: Path, experiment: Experiment, stack: contextlib.ExitStack) -> None:
    """Claims the folder for this experiment: writes config.json, environment.json and copies of user code.

    Copies of different code that trained existing checkpoints are set aside. The folder stays locked until the stack is
    closed. Raises UserError if another run holds the lock.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    stack.enter_context(hold(workdir))
    trained = records(workdir / "checkpoints")
    keep(experiment, workdir / CODE, workdir / f"{CODE}-until-{trained[-1].step}" if trained else None)
    config = {"schema": SCHEMA, **spec.to_json(experiment)}
    for name, data in {"config.json": config, "environment.json": environment()}.items():
        write_atomically(workdir / name, json.dumps(data, indent=2) + "\n")


def load_experiment(workdir: Path, code: Code = "run") -> Experiment:
    """The experiment of a run folder.

    Args:
        workdir: the folder.
        code: "run" loads user classes as they were in training, from the run's copies if the files have changed
            (logged); "current" loads them from the files as they are now.

    Raises:
        UserError: if it is not a run folder.
        SpecError: if its configuration does not match this version of polygpt or of the user code.
    """
    local(workdir)
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is not a run folder: it has no config.json")
    if code == "run":
        _warn_edited(workdir, tuple(Snapshot(workdir / CODE).edited()))
    data = migrate(_read(path), str(path))
    experiment = spec.from_json(data, str(path), loader(workdir, code))
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} does not describe an experiment")
    return experiment


def loader(workdir: Path, code: Code) -> Callable[[str], types.ModuleType]:
    """Loads the modules of user classes of a run folder by name, see `load_experiment`."""
    kept = Snapshot(workdir / CODE)
    return kept.load_current if code == "current" else kept.load_module


@functools.cache
def _warn_edited(workdir: Path, files: tuple[str, ...]) -> None:
    """Warns once."""
    if files and jax.process_index() == 0:
        changed = f"{' and '.join(files)} {'has' if len(files) == 1 else 'have'} changed"
        said = "%s since %s was trained: using the run's own copy (--code current uses the new version)"
        log.warning(said, changed, workdir)


def environment() -> dict[str, Any]:
    """Versions, devices, and the revision of the source if it is in a Git repository."""
    devices = jax.devices()
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}" if len(devices) > 1 else devices[0].device_kind,
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "revision": _revision(),
        "command": sys.argv,
    }


def _revision() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): remove the folder or choose another --workdir") from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
