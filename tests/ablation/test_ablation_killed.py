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
TUNED = 'tuned=grid("optim.schedule.peak", 0.01, 0.02),\n'
MEASURED = r"\| [^|]+ \| \d+ \|$|[\d.]+ (s|min|h) of wall time"
"""Times, which differ from run to run: the end of a row of costs, and the whole."""


def start(file, *options):
    command = [sys.executable, "-m", "polygpt.cli.main", "ablate", str(file), *options]
    return subprocess.Popen(command, cwd=file.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


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
    begun = time.monotonic()
    finish(start(whole))
    took = time.monotonic() - begun
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}; unkilled it took {took:.0f} s")
    moments, killed = random.Random(seed), []
    while len(killed) < 4:
        process = start(cut)
        try:
            process.communicate(timeout=moments.uniform(0.3, 0.9) * took)
            break  # it was faster, and is done
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            path = cut.with_name(results.RESULTS)
            killed.append(len(results.read(path)) if path.exists() else 0)
    print(f"killed with {killed} runs done")
    finish(start(cut))
    assert killed and sorted(killed) == killed, "nothing that was done is lost"
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
