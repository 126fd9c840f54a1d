"""Compares committed plans with a new compilation."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from polygpt import overrides
from polygpt.errors import UserError
from polygpt.scale.plan.target import target
from polygpt.scale.plan.worker import plan_in_subprocess
from polygpt.spec import load_file
from polygpt.training.phase import expanded

TOLERANCE = 0.05
"""Relative growth of memory per device, or of bytes sent per step, that is accepted."""
TIMEOUT = 3600.0
"""Time limit per plan, in seconds."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A committed plan and its recompilation.

    Attributes:
        path: the committed file.
        memory: bytes per device, (committed, now); infinite if the program does not fit now.
        sent: bytes that each device sends per step, (committed, now).
        missing_kernels: fused kernels of the committed program that the new program lacks.
    """

    path: Path
    memory: tuple[float, float]
    sent: tuple[float, float]
    missing_kernels: tuple[str, ...] = ()

    @property
    def regressions(self) -> str:
        """What got worse, such as "memory per device grew, kernel flex_forward is missing"; empty if nothing."""
        pairs = {"memory per device": self.memory, "bytes sent per step": self.sent}
        grown = [f"{name} grew" for name, (before, now) in pairs.items() if now > (1 + TOLERANCE) * before]
        return ", ".join(grown + [f"kernel {name} is missing" for name in self.missing_kernels])


def plans_below(folder: Path) -> list[Path]:
    """The files of all plans in a folder and its subfolders. Raises UserError if there are none."""
    found = sorted(path for path in folder.glob("**/*.json") if _is_plan(json.loads(path.read_text())))
    if not found:
        raise UserError(f"plan check: no plans below {folder}: write some with `polygpt plan FILE --on SLICE`")
    return found


def recompile(path: Path, timeout: float = TIMEOUT) -> tuple[dict, dict]:
    """A committed plan and the plan of the same configuration now.

    The path of the experiment's file is relative to the working directory.

    Raises:
        UserError: the experiment's file is missing, its mesh no longer divides it evenly, or compilation takes longer
            than `timeout` seconds.
    """
    committed = json.loads(path.read_text())
    experiment = overrides.override(load_file(committed["file"]).experiment(), committed["changes"])
    experiment = expanded(experiment)[committed.get("phase", 0)]
    now = plan_in_subprocess(experiment, target(committed["on"], committed["slices"]), timeout)
    if "failed" in now:
        raise UserError(f"{path}: {now['failed']}")
    print(f"{path}: recompiled in {now['compile_seconds']:.0f} s", file=sys.stderr, flush=True)
    return committed, now


def compare(path: Path) -> Comparison:
    """Recompiles a plan and compares it. Raises UserError as `recompile` does."""
    committed, now = recompile(path)
    memory = now["memory"]["total"] if now["memory"] else float("inf")
    missing = tuple(sorted(set(committed["kernels"]) - set(now["kernels"]))) if now["memory"] else ()
    sent = committed["collective_bytes"], now["collective_bytes"]
    return Comparison(path, (committed["memory"]["total"], memory), sent, missing)


def _is_plan(data: Mapping) -> bool:
    return isinstance(data, dict) and {"experiment", "on", "file", "changes", "memory"} <= set(data)
