"""A question to another process, which has several CPU devices: their number is fixed per process.

The other side is a module that reads JSON from stdin and writes the last line of stdout as JSON: for each way of using
the devices `{"error": number}` or `{"raised": text}`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from polygpt.lab.blame import told
from polygpt.lab.measured import Measured
from polygpt.spec import class_name

SECONDS = 240
"""Time limit of the process."""


def reason_against(cls: type) -> str | None:
    """Why another process cannot import a class; None if it can."""
    name = class_name(cls)
    if "<locals>" in name or name.startswith("__main__:"):
        return "not run: a second process cannot import the class; write it to a file, outside of functions"
    return None


def answer(module: str, asked: Any, **environment: str) -> dict[str, dict] | str:
    """What the module answers, or what is wrong with its process."""
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options = {"capture_output": True, "text": True, "env": variables | environment, "timeout": SECONDS}
    try:
        done = subprocess.run([sys.executable, "-m", module], input=json.dumps(asked), **options)
    except subprocess.TimeoutExpired:
        return f"not done after {SECONDS} s: it hangs or is very slow"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"its process ended with {done.returncode}: {last}"
    return json.loads(done.stdout.splitlines()[-1])


def worst(found: dict[str, dict] | str, bound: float, prefix: str) -> Measured:
    """The largest error of all ways, which the note names after `prefix` if it exceeds the bound."""
    if isinstance(found, str):
        return Measured(float("inf"), bound, found)
    for way, result in found.items():
        if "raised" in result:
            return Measured(float("inf"), bound, f"{way}: {result['raised']}")
    way = max(found, key=lambda way: np.nan_to_num(found[way]["error"], nan=np.inf))
    error = found[way]["error"]
    return Measured(error, bound, "" if error <= bound else f"{prefix} {way}")


def reply(ways: Iterable[str], measure: Callable[[str], float], cls: type) -> None:
    """Measures every way in this process and writes what `answer` returns; an error is written in its place."""
    found = {}
    for name in ways:
        try:
            found[name] = {"error": measure(name)}
        except Exception as error:
            found[name] = {"raised": told(error, cls)}
    print(json.dumps(found))
