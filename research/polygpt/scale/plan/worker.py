"""Makes a plan in a subprocess, which can be killed and can run beside others.

python -m polygpt.scale.plan.worker < request.json > plan.json
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

from polygpt import spec
from polygpt.errors import UserError
from polygpt.files import plain
from polygpt.scale.plan.target import Target, target
from polygpt.training.experiment import Experiment

TIMED_OUT = "compilation exceeded"
"""Beginning of the failure message of a compilation that took too long."""


def plan_in_subprocess(experiment: Experiment, on: Target, limit: float) -> dict:
    """The plan of an experiment as JSON data, made in a subprocess.

    Returns:
        `Plan.to_json()`; or {"failed": reason} if the compiler failed for a reason other than memory, or took longer
        than `limit` seconds. When memory is nearly full, it may search very long for operations to recompute.

    Raises:
        UserError: the mesh does not divide the experiment evenly.
    """
    request = json.dumps({"experiment": spec.to_json(experiment), "on": on.name, "slices": on.slices})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "polygpt.scale.plan.worker"]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True, env=environment) as process:
        with _killed_after(process, limit) as timed_out:
            out, errors = process.communicate(request)
    if timed_out.is_set():
        return {"failed": f"{TIMED_OUT} {limit:.0f} s"}
    if process.returncode == 2:
        raise UserError(errors.strip().splitlines()[-1])
    if process.returncode:
        return {"failed": _failure_reason(errors) or f"exit code {process.returncode}"}
    return json.loads(out)


def _failure_reason(errors: str) -> str:
    """Why a process failed: the line with a failed check of the compiler if there is one, else the last line."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    fatal = [line for line in lines if re.match(r"F\d{4} |.*(Check failed|Fatal Python error)", line)]
    return (fatal or lines or [""])[-1][:300]


@contextlib.contextmanager
def _killed_after(process: subprocess.Popen, limit: float) -> Iterator[threading.Event]:
    timed_out = threading.Event()

    def stop():
        timed_out.set()
        process.kill()

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        yield timed_out
    except BaseException:
        process.kill()
        raise
    finally:
        timer.cancel()


def main() -> int:
    """Reads a request, writes a plan; returns 2 if the experiment is invalid."""
    from polygpt.scale.plan.plan import plan

    request = json.load(sys.stdin)
    stdout, sys.stdout = sys.stdout, sys.stderr  # stdout carries only the plan
    try:
        made = plan(spec.from_json(request["experiment"]), target(request["on"], request["slices"]))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    json.dump(plain(made.to_json()), stdout, allow_nan=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
