"""Fifty faults, seeded, the run started again after each: nothing is lost but the steps since the last commit.

Whatever happened, the figures of every step that the run then takes are those of a run that nothing happened to, to the
bit, and so is its last checkpoint. Two runs suffer side by side: one is killed in its saves, a process each time
(`kill`); all else happens to the other in one process (`chain`), whose checkpoints lie on a small file system of their
own (tmpfs in a mount namespace) where the system lets us make one. Where it does not, a full disk is a limit on file
sizes (RLIMIT_FSIZE), under which nothing can be written either.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from test_kill import last_checkpoint

from polygpt.runtime.manifest import Damaged, records, verify

SEED = 4
STEPS = 450
KILLS = 15
KINDS = {
    "bit_flip": 8,
    "truncation": 6,
    "deletion": 6,
    "full_disk": 3,
    "full_at_the_end": 2,
    "file_limit": 2,
    "terminated_twice": 4,
    "nan_batches": 4,
}
SCRIPT = Path(__file__).with_name("faults.py")
MOUNTED = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$@"']


def start(cache, *arguments, before=()):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    command = [*before, sys.executable, SCRIPT, *arguments]
    process = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=900)
    rows = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    return process.returncode, rows, process.stderr[-4000:]


def steps_on_disk(folder):
    return [record.step for record in records(folder / "checkpoints")]


def newest_good(folder):
    """The newest checkpoint that is as it was written; 0 if there is none."""
    for step in reversed(steps_on_disk(folder)):
        try:
            verify(folder / "checkpoints" / str(step))
            return step
        except Damaged:
            pass
    return 0


def killed(folder, cache, rng):
    """Rows of a run that is killed in save after save, then left alone."""
    reference = (folder.parent / "reference" / "metrics.jsonl").read_bytes()
    expected, rows = 0, []
    for i in range(KILLS + 1):
        faults, last = [], i == KILLS
        event, delay = (rng.randint(1, 180), 0) if i % 3 else (0, rng.uniform(0.001, 0.3))
        save = (
            10**6 if last else 3 if i == 0 else rng.randint(1, 2)
        )  # the first time there is something to fall back on
        code, said, error = start(cache, "kill", folder, STEPS, save, event, delay)
        if code != (0 if last else -signal.SIGKILL):
            faults.append(f"ended with {code}: {error}")
        if said[0]["from"] != expected:
            faults.append(f"went on from {said[0]['from']}, not {expected}")
        lines = (folder / "metrics.jsonl").read_bytes()
        if not reference.startswith(lines):
            faults.append("the figures are others")
        stood, expected = lines.count(b"\n"), newest_good(folder)
        if last:
            return [*rows, ending(folder, f"{said[0]['from']} to {stood}", faults)]
        if expected < max(said[1]["committed"]):
            faults.append(f"{max(said[1]['committed'])} was committed, and is lost")
        injected = f"{event} file operations" if event else f"{delay:.3f} s"
        left = Counter(place.name.strip("0123456789")[:8] for place in (folder / "checkpoints").iterdir())
        half = left[""] - len(steps_on_disk(folder))
        happened = f"left {left['.orbax-c']} unfinished, {half} without a manifest, {left['removed-']} half removed"
        rows.append({"kind": "SIGKILL", "injected": f"{injected} into save {save}", "happened": happened})
        rows[-1] |= {"lost": stood - expected, "faults": faults}


def ending(folder, happened, faults):
    return {"kind": "end", "injected": "", "happened": happened, "lost": 0, "faults": faults}


def chain(folder, cache, rng):
    """Rows of all other faults."""
    place = folder / "checkpoints"
    place.mkdir(parents=True)
    mounts = shutil.which("unshare") and subprocess.run([*MOUNTED, place, "true"], capture_output=True).returncode == 0
    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    if not mounts:
        kinds = ["file_limit" if kind.startswith("full_") else kind for kind in kinds]
    rng.shuffle(kinds)
    before = [*MOUNTED, place] if mounts else []
    code, rows, error = start(cache, "chain", folder, STEPS, rng.randrange(10**6), *kinds, before=before)
    assert code == 0, error
    return rows, "a tmpfs of 8 MB" if mounts else "RLIMIT_FSIZE (no file system can be mounted here)"


@pytest.mark.slow
def test_fifty_faults_lose_nothing_but_the_steps_since_the_last_commit(tmp_path):
    cache, rng = tmp_path / "compiled", random.Random(SEED)
    code, _, error = start(cache, "reference", tmp_path / "reference", STEPS)
    assert code == 0, error
    with ThreadPoolExecutor(2) as pool:
        others = pool.submit(chain, tmp_path / "chain", cache, random.Random(rng.random()))
        kills = pool.submit(killed, tmp_path / "killed", cache, random.Random(rng.random()))
        (rows, disk), kill_rows = others.result(), kills.result()

    table = Table("", "fault", "injected", "what happened", "steps lost", title=f"seed {SEED}; the full disk: {disk}")
    everything = [*kill_rows, *rows]
    for number, row in enumerate(everything, 1):
        happened = "; ".join([row["happened"], *row["faults"]])
        table.add_row(str(number), row["kind"].replace("_", " "), row["injected"], happened, str(row["lost"]))
    Console(width=200).print(table)

    for row in everything:
        assert not row["faults"], row
        assert row["lost"] <= 20, row
    assert sum(row["kind"] != "end" for row in everything) == 50
    assert len({row["kind"] for row in everything}) >= 7
    for name in ("chain", "killed"):
        assert (tmp_path / name / "metrics.jsonl").read_bytes() == (tmp_path / "reference/metrics.jsonl").read_bytes()
    assert last_checkpoint(tmp_path / "killed") == last_checkpoint(tmp_path / "reference")
