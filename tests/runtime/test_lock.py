"""A run folder belongs to one run at a time, and to none whose process has ended."""

import errno
import os
import signal
import socket
import subprocess
import sys

import pytest
from tiny_experiment import experiment

from polygpt.errors import UserError
from polygpt.runtime import lock
from polygpt.runtime.lock import hold
from polygpt.training.loop import train

HOLDS = """
import pathlib, sys, time
from polygpt.runtime.lock import hold
with hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_told_whose_the_folder_is_until_that_one_is_killed(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError) as raised:
            train(experiment(), tmp_path, loggers=lambda *_: [])
        assert str(raised.value) == (
            f"{tmp_path} is in use by process {other.pid} (host {socket.gethostname()}): "
            "wait for it or choose another --workdir"
        )
        assert not (tmp_path / "config.json").exists()
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    with hold(tmp_path):
        assert (tmp_path / lock.NAME).read_text().startswith(f"process {os.getpid()} (host ")


def test_it_is_held_until_the_run_ends_and_no_longer(tmp_path):
    with hold(tmp_path), pytest.raises(UserError, match="in use by process"), hold(tmp_path):
        pass
    with hold(tmp_path):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_there_are_no_locks_runs_go_on(tmp_path, monkeypatch, code):
    def without(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", without)
    with hold(tmp_path):
        assert (tmp_path / lock.NAME).exists()
