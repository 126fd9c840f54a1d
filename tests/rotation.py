"""Slow tests where time is short: the groups whose turn it is always run, the others as long as time lasts.

A group is a folder of tests/. Its turn follows from the number of the commit in its history, so that each group runs on
one of any three commits in succession, and two runs of one commit choose alike. conftest.py takes over these hooks.
"""

import collections
import subprocess
import time
from pathlib import Path

import pytest

TURNS = (
    ("lab", "data", "generation", "models", "nn"),
    ("ablation", "attention", "blocks", "cli", "contracts", "init", "optim", "tests"),
    ("parallel", "runtime", "scale", "training"),
)
"""Groups that take about equally long together. "tests" holds the files outside of folders."""
BEGUN = time.monotonic()
LEFT_OUT = "left out for want of time"
ROOT = Path(__file__).parent


def commit_number(folder: Path) -> int:
    """How many commits lead to the one in `folder`; in a shallow clone, which does not know, a number from its hash."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if git("rev-parse", "--is-shallow-repository") == "true":
            return int(git("rev-parse", "HEAD"), 16)
        return int(git("rev-list", "--count", "HEAD"))
    except (OSError, subprocess.CalledProcessError):  # no git, or an exported tree
        return 0


def wait(group: str, number: int) -> int:
    """How many commits after the one of this number a group has its turn: 0, 1 or 2; 0 for one without slow tests."""
    turn = next((i for i, groups in enumerate(TURNS) if group in groups), number)
    return (turn - number) % len(TURNS)


def group_of(path: Path) -> str:
    """The name of the folder of tests/ in which a file lies."""
    return path.relative_to(ROOT.parent).parts[:-1][:2][-1]


def pytest_addoption(parser):
    parser.addoption("--minutes", type=float, help="after so many minutes run only the groups whose turn it is")
    parser.addoption("--commit", type=int, help="the number of the commit that decides whose turn it is (default: git)")


def pytest_configure(config):
    if config.getoption("--minutes") is not None and config.getoption("--commit") is None:
        config.option.commit = commit_number(ROOT)  # xdist hands it on to its workers


def pytest_report_header(config):
    if config.getoption("--minutes") is not None:
        number = config.getoption("--commit")
        return f"commit {number}: it is the turn of {', '.join(TURNS[number % len(TURNS)])}"


def pytest_collection_modifyitems(config, items):
    if config.getoption("--minutes") is not None:
        items.sort(key=lambda item: wait(group_of(item.path), config.getoption("--commit")))


def pytest_runtest_setup(item):
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - BEGUN > 60 * minutes:
        group = group_of(item.path)
        if commits := wait(group, item.config.getoption("--commit")):
            pytest.skip(f"{LEFT_OUT}: {group}, whose turn it is in {commits} commits at the latest")


def pytest_terminal_summary(terminalreporter):
    reports = [report for report in terminalreporter.stats.get("skipped", ()) if LEFT_OUT in str(report.longrepr)]
    groups = collections.Counter(group_of(ROOT.parent / report.nodeid.split("::")[0]) for report in reports)
    if groups:
        terminalreporter.write_line(f"{LEFT_OUT}: " + ", ".join(f"{name} ({n} tests)" for name, n in groups.items()))
