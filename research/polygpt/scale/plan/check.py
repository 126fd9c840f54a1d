"""Committed plans against what the compiler says now."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from polygpt import overrides
from polygpt.errors import UserError
from polygpt.scale.plan.target import target
from polygpt.scale.plan.worker import plan_apart
from polygpt.spec import load_file

GROWTH = 0.05
"""Memory of a device, or bytes that it sends in a step, may grow by this share."""
LIMIT = 3600.0
"""Seconds for one plan."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """A plan as it was committed and as it is now.

    Attributes:
        path: its file.
        memory: bytes of a device, (then, now); infinite where it does not fit now.
        sent: bytes that a device sends in a step, (then, now).
        gone: fused kernels that were in the program then and are not now.
    """

    path: Path
    memory: tuple[float, float]
    sent: tuple[float, float]
    gone: tuple[str, ...] = ()

    @property
    def grew(self) -> bool:
        """Whether memory or what is sent grew by more than `GROWTH`."""
        return any(now > (1 + GROWTH) * then for then, now in (self.memory, self.sent))

    @property
    def worse(self) -> str:
        """What is worse, in words; "" if nothing."""
        return ", ".join(["grew"] * self.grew + [f"without {name}" for name in self.gone])


def plans_below(folder: Path) -> list[Path]:
    """The files of all plans in a folder and those below it; UserError if there are none."""
    found = sorted(path for path in folder.glob("**/*.json") if _is_plan(json.loads(path.read_text())))
    if not found:
        raise UserError(f"plan check: no plans below {folder}: write some with `polygpt plan FILE --on SLICE`")
    return found


def again(path: Path, limit: float = LIMIT) -> tuple[dict, dict]:
    """A plan as it was committed, and compiled again. Its experiment's file is found from the working directory.

    Raises:
        UserError: the experiment is not there, can no longer be divided so, or takes longer than `limit` seconds.
    """
    then = json.loads(path.read_text())
    experiment = overrides.override(load_file(then["file"]).experiment(), then["changes"])
    now = plan_apart(experiment, target(then["on"], then["slices"]), limit)
    if "failed" in now:
        raise UserError(f"{path}: {now['failed']}")
    print(f"{path}: compiled again in {now['compile_seconds']:.0f} s", file=sys.stderr, flush=True)
    return then, now


def check(path: Path) -> Compared:
    """Compiles a plan again and compares. Raises UserError as `again` does."""
    then, now = again(path)
    memory = now["memory"]["total"] if now["memory"] else float("inf")
    gone = tuple(sorted(set(then["kernels"]) - set(now["kernels"]))) if now["memory"] else ()
    sent = then["collective_bytes"], now["collective_bytes"]
    return Compared(path, (then["memory"]["total"], memory), sent, gone)


def _is_plan(data: Mapping) -> bool:
    return isinstance(data, dict) and {"experiment", "on", "file", "changes", "memory"} <= set(data)
