"""What several processes say while they run: lines for the log alone, and warnings as all other lines for a person."""

import logging
import re
import subprocess
import sys
import time

import pytest

from polygpt.runtime import waiting
from polygpt.runtime.waiting import log_to_stderr
from polygpt.scale.launch.local import LOG_ONLY


@pytest.fixture
def logger():
    logger = logging.getLogger("polygpt.runtime")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers = []
    yield logger
    logger.handlers, logger.level, logger.propagate = before[0], before[1], before[2]


def test_a_warning_has_the_voice_of_the_command_line_and_what_is_for_the_log_its_time(logger, capsys):
    log_to_stderr()
    log_to_stderr()  # nothing is said twice
    logging.getLogger("polygpt.runtime.processes").info("barrier %r: waiting", "start")
    logging.getLogger("polygpt.runtime.checkpoint").warning("skipping\ncheckpoint %s", 7)
    aside, warning = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"INFO \d\d:\d\d:\d\d barrier 'start': waiting", aside)
    assert aside.encode().startswith(LOG_ONLY)
    assert warning == "polygpt: skipping checkpoint 7"


def test_what_cannot_be_given_up_ends_with_the_process_at_its_bound():
    waits = """
import time
from polygpt.runtime.waiting import Deadline, report_waiting
with report_waiting("quick", deadline=Deadline(60.0, "never said")):
    pass
with report_waiting("start-up: still waiting", deadline=Deadline(0.3, "not here after 0.3 s (train.processes.x)")):
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", waits], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "polygpt: not here after 0.3 s (train.processes.x)\n")


def test_a_long_wait_is_reported_and_does_not_end_the_process_before_its_bound(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "SLOW", 0.02)
    exits = []
    monkeypatch.setattr(waiting, "exit_now", exits.append)
    begun = time.monotonic()
    with waiting.report_waiting("still waiting", lambda: "for process 1", waiting.Deadline(60.0, "never said")):
        while len(caplog.records) < 2 and not exits and time.monotonic() < begun + 30:
            time.sleep(0.01)
    assert not exits
    assert re.fullmatch(r"still waiting for process 1 after \d+ s", caplog.records[0].getMessage())
