"""What a process tells the others of its own failure."""

import os
import socket
import time

import jax
import pytest

from polygpt.errors import UserError
from polygpt.runtime import liveness as module
from polygpt.runtime import processes
from polygpt.runtime.liveness import FAULT, Liveness, listen_to_launcher


class Service:
    """Stands in for the client of the coordination service."""

    def __init__(self):
        self.texts = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        self.texts[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.texts.items() if key.startswith(prefix)]

    def blocking_key_value_get(self, key, milliseconds):
        while key not in self.texts:
            time.sleep(0.01)
        return self.texts[key]


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (ConnectionError("Connection refused by the data server"), False),
        (jax.errors.JaxRuntimeError("Gloo: Connection closed by peer"), True),
    ],
)
def test_only_an_error_of_a_collective_waits_to_hear_whose_it_is(error, waits):
    service = Service()
    liveness = Liveness(service, "host:1", 0, ["process 0"], bound=1.0)
    begun = time.monotonic()
    said = liveness.announce_failure(error)
    assert (time.monotonic() - begun > 1.0) == waits == bool(said)  # LINGER is a tenth
    why = said or f"{type(error).__name__}: {error}"
    assert service.texts["polygpt/verdict/0"] == f"process 0 failed: {why}: stopping"
    liveness.close()


def test_the_text_of_a_collective_is_for_the_log_and_no_wait_is_longer_than_the_launcher_grants(capfd, monkeypatch):
    monkeypatch.setenv(processes.GRACE, "1")
    liveness = Liveness(Service(), "host:1", 0, ["process 0"], 100.0, processes._patience())
    begun = time.monotonic()
    said = liveness.announce_failure(jax.errors.JaxRuntimeError("Gloo: Connection\nclosed by peer, pair.cc:12"))
    assert "pair.cc" not in said and 0.7 < time.monotonic() - begun < 10
    log, told = capfd.readouterr().err.splitlines()
    assert log == "INFO a collective failed: JaxRuntimeError: Gloo: Connection closed by peer, pair.cc:12"
    assert told == "polygpt: a collective failed: waiting up to 1 s to learn which process ended"
    monkeypatch.delenv(processes.GRACE)
    assert processes._patience() is None


def test_a_fault_of_the_user_is_told_without_host_and_class():
    service = Service()
    liveness = Liveness(service, "host:1", 1, ["process 0 (host a, pid 1)", "process 1 (host a, pid 2)"], bound=4.0)
    assert liveness.announce_failure(UserError("data.batch_size is 3")) is None
    assert service.texts["polygpt/verdict/0"] == f"{FAULT}process 1: data.batch_size is 3"
    liveness.close()


class Left(Exception):
    """Stands in for the end of the process."""


@pytest.fixture
def liveness(monkeypatch):
    def leave(code):
        raise Left(code)

    monkeypatch.setattr(module, "exit_now", leave)
    monkeypatch.setattr(module, "LINGER", 0.2)
    made = Liveness(Service(), "host:1", 0, ["process 0", "process 1 (host a, pid 2)"], bound=100.0)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("code", "how", "ends", "leaves"),
    [
        (-9, "was killed by SIGKILL", "stopping; the same command resumes", 1),
        (3, "exited with code 3", "stopping", 1),
        (2, "exited with code 2", "stopping", 2),
    ],
)
def test_a_reported_death_ends_this_process_and_names_the_dead(liveness, capfd, code, how, ends, leaves):
    with pytest.raises(Left) as left:
        liveness.peer_died(1, code, how)
    assert left.value.args == (leaves,)
    assert capfd.readouterr().err == f"polygpt: process 1 (host a, pid 2) {how}: {ends}\n"


def test_a_reported_failure_gives_way_to_an_end_of_its_own(liveness, capfd):
    liveness.closing.set()  # as when this process has left its own verdict, or is done
    liveness.peer_died(1, 3, "exited with code 3")
    assert capfd.readouterr().err == ""


def test_reports_of_the_launcher_are_read_from_its_pipe(monkeypatch):
    theirs, ours = os.pipe()
    monkeypatch.setenv(module.REPORTS, str(theirs))
    died, came = [], module.threading.Event()
    listen_to_launcher(lambda *report: (died.append(report), came.set()))
    assert module.REPORTS not in os.environ and not os.get_inheritable(theirs)
    os.write(ours, b"1 -9 was killed by SIGKILL\n")
    assert came.wait(10) and died == [(1, -9, "was killed by SIGKILL")]
    os.close(ours)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_service_can_be_reached_while_it_listens(host):
    alive = Liveness.__new__(Liveness)  # without its threads
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as service:
        try:
            service.bind((host.strip("[]"), 0))
        except OSError:
            pytest.skip(f"no address {host} here")
        service.listen()
        alive.address = f"{host}:{service.getsockname()[1]}"
        assert alive._reachable()
    assert not alive._reachable()
