"""A small experiment on a folder of pictures and recordings, and a run of it."""

import contextlib
import io
import os
from types import SimpleNamespace

import pytest
from own_experiment import write_experiment

from polygpt.cli.main import main


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The outcome of `polygpt train FILE --json`: code, out, err, and the places of the experiment and the run."""
    folder = tmp_path_factory.mktemp("own")
    file = write_experiment(folder)
    out, err = io.StringIO(), io.StringIO()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["train", str(file), "--json"])
    finally:
        os.chdir(before)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), file=file, run=folder / "runs" / "own")


@pytest.fixture
def polygpt(capsys):
    """Runs the command line in this process; gives (exit code, stdout, stderr)."""

    def call(*argv: object):
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
