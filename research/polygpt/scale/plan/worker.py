"""Makes a plan in a separate process, which can be stopped and run concurrently.

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

LATE = "not compiled within"
"""How the failure of a compilation begins that took longer than it was given."""


def plan_apart(experiment: Experiment, on: Target, limit: float) -> dict:
    """The plan of an experiment, as JSON data, made in another process.

    Returns:
        `Plan.to_json()`; or {"failed": why} where the compiler refused for another reason than memory, or took longer
        than `limit` seconds: near the limit of memory it may search very long for what to recompute.

    Raises:
        UserError: the experiment cannot be divided so.
    """
    request = json.dumps({"experiment": spec.to_json(experiment), "on": on.name, "slices": on.slices})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "polygpt.scale.plan.worker"]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True, env=environment) as process:
        with _stopped_after(process, limit) as late:
            out, errors = process.communicate(request)
    if late.is_set():
        return {"failed": f"{LATE} {limit:.0f} s"}
    if process.returncode == 2:
        raise UserError(errors.strip().splitlines()[-1])
    if process.returncode:
        return {"failed": _last_words(errors) or f"ended with {process.returncode}"}
    return json.loads(out)


def _last_words(errors: str) -> str:
    """Why a process ended: the line of a check of the compiler's that failed, if there is one, or the last."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    fatal = [line for line in lines if re.match(r"F\d{4} |.*(Check failed|Fatal Python error)", line)]
    return (fatal or lines or [""])[-1][:300]


@contextlib.contextmanager
def _stopped_after(process: subprocess.Popen, limit: float) -> Iterator[threading.Event]:
    late = threading.Event()

    def stop():
        late.set()
        process.kill()

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        yield late
    except BaseException:
        process.kill()
        raise
    finally:
        timer.cancel()


def main() -> int:
    """Reads a request, writes a plan; returns 2 if the experiment is invalid."""
    from polygpt.scale.plan.plan import plan

    request = json.load(sys.stdin)
    stdout, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not the plan
    try:
        made = plan(spec.from_json(request["experiment"]), target(request["on"], request["slices"]))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    json.dump(plain(made.to_json()), stdout, allow_nan=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
