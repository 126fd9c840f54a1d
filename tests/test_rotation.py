"""Which slow tests run where time is short: each group within three commits, the same ones for one commit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rotation

ROOT = Path(__file__).parent
GROUPS = [group for groups in rotation.TURNS for group in groups]


def git(folder, *words):
    made_by = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", folder, *made_by, *words], check=True, capture_output=True, text=True).stdout


def test_every_group_has_its_turn_within_any_three_commits_and_waits_no_longer_than_it_says():
    assert len(set(GROUPS)) == len(GROUPS)
    for number in range(7):
        waits = {group: rotation.wait(group, number) for group in GROUPS}
        for group, commits in waits.items():
            due = [n for n in (number, number + 1, number + 2) if rotation.wait(group, n) == 0]
            assert due == [number + commits]


def test_a_group_without_slow_tests_is_sorted_among_the_others():
    assert [rotation.wait("adapters", number) for number in (0, 1, 5, 10**40)] == [0] * 4


def test_every_file_with_slow_tests_belongs_to_one_group():
    files = [path for path in ROOT.rglob("test_*.py") if re.search(r"mark\.slow\b", path.read_text())]
    assert {rotation.group_of(path) for path in files} == set(GROUPS)


def test_the_commit_counts_and_without_a_history_its_hash(tmp_path):
    assert rotation.commit_number(tmp_path) == 0, "no repository"
    whole = tmp_path / "whole"
    git(tmp_path, "init", "-q", whole)
    for n in (1, 2, 3):
        git(whole, "commit", "-q", "--allow-empty", "-m", str(n))
        assert rotation.commit_number(whole) == n
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{whole}", "shallow")
    assert rotation.commit_number(tmp_path / "shallow") == int(git(whole, "rev-parse", "HEAD"), 16)


@pytest.mark.parametrize("workers", [(), ("-p", "xdist", "-n", "1")], ids=["alone", "a worker"])
def test_without_time_only_the_groups_due_run_and_the_others_are_listed(tmp_path, workers):
    places = {"in_lab": "lab", "in_ablation": "ablation", "in_optim": "optim", "in_parallel": "parallel", "in_none": ""}
    for name, group in places.items():
        (tmp_path / "tests" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / group / f"test_{name}.py").write_text("def test_a(): pass\ndef test_b(): pass\n")
    (tmp_path / "tests" / "rotation.py").write_text((ROOT / "rotation.py").read_text())
    (tmp_path / "tests" / "conftest.py").write_text("from rotation import *")

    def run(commit, minutes):
        words = ["-m", "pytest", *workers, "-rA", "--rootdir", tmp_path, "--minutes", minutes, "--commit", commit]
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run(
            [sys.executable, *map(str, words), "tests"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, set(re.findall(r"PASSED tests/.*test_(\S+)\.py", done.stdout))

    output, passed = run(5, 0)
    waits = {name: rotation.wait(group or "tests", 5) for name, group in places.items()}
    assert passed == {name for name, commits in waits.items() if not commits} and set(waits.values()) == {0, 1, 2}
    assert f"it is the turn of {rotation.TURNS[5 % 3][0]}" in output and f"{rotation.LEFT_OUT}: " in output
    for name, commits in waits.items():
        group = places[name] or "tests"
        assert (f"{group} (2 tests)" in output) == (f"{group}, whose turn it is in {commits} commits" in output)
        assert (f"{group} (2 tests)" in output) == bool(commits)
    output, passed = run(4, 5)
    assert passed == set(places) and rotation.LEFT_OUT not in output
