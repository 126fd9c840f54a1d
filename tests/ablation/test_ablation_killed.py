"""`polygpt ablate` as a user runs it: killed at any moment and begun again; and what is done is not done again."""

import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from own_ablation import CLAIMS, write_ablation
from polygpt.ablation import results

GLU = Path(__file__).parents[2] / "experiments" / "ablations" / "glu"
TUNED = 'tuned=grid("optim.schedule.peak_lr", 0.01, 0.02),\n'
MEASURED = r"\| [^|]+ \| \d+ \|$|[\d.]+ (s|min|h) of total wall time"
"""Times, which differ from run to run: the end of a row of costs, and the whole."""


def start(file, *options):
    command = [sys.executable, "-m", "polygpt.cli.main", "ablate", str(file), *options]
    return subprocess.Popen(command, cwd=file.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def done(path):
    return len(results.read(path))


def written(file):
    text = (file.parent / "README.md").read_text()
    return re.sub(MEASURED, "", text, flags=re.MULTILINE)


def figures(file):
    """What runs found, without how long they took. The data lie in another folder, by which keys differ."""
    lines = results.read(file.with_name(results.RESULTS))
    return sorted(repr([line[name] for name in ("variant", "seed", "stage", "metrics", "curve")]) for line in lines)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_table_of_one_that_was_not(tmp_path):
    whole, cut = (write_ablation(tmp_path / name / "own", TUNED + CLAIMS) for name in ("whole", "cut"))
    finish(start(whole))
    seed = random.SystemRandom().randrange(10**6)
    moments, path, killed = random.Random(seed), cut.with_name(results.RESULTS), [0]
    for _ in range(3):
        process = start(cut)
        while process.poll() is None and done(path) == killed[-1]:  # each time it comes some way
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 2))
        process.kill()
        process.communicate()
        killed.append(done(path))
    print(f"seed {seed}: killed with {killed[1:]} of {done(whole.with_name(results.RESULTS))} runs done")
    finish(start(cut))
    assert sorted(killed) == killed and killed[1] < done(path), "nothing that was done is lost"
    assert figures(cut) == figures(whole)
    assert written(cut) == written(whole)


@pytest.mark.slow
def test_what_is_committed_of_glu_is_not_run_again_and_prints_the_same(tmp_path):
    file = tmp_path / "glu" / "experiment.py"
    shutil.copytree(GLU, file.parent, ignore=shutil.ignore_patterns(".work", "__pycache__"))
    others = [path for path in file.parent.iterdir() if path.name != "README.md"]  # where the command is another
    before = [path.read_bytes() for path in others]
    first, second = (finish(start(file, "--seeds", "5", "--json")) for _ in range(2))
    assert first == second and json.loads(first)["made"] == 0 and json.loads(first)["seeds"] == [0, 1, 2, 3, 4]
    assert [path.read_bytes() for path in others] == before
