"""What a process tells the others of its own failure."""

import time

import jax
import pytest

from polygpt.errors import UserError
from polygpt.runtime import processes
from polygpt.runtime.liveness import FAULT, Liveness


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
    said = liveness.fail(error)
    assert (time.monotonic() - begun > 1.0) == waits == bool(said)  # FAREWELL is a tenth
    why = said or f"{type(error).__name__}: {error}"
    assert service.texts["polygpt/verdict/0"] == f"process 0 failed: {why}: stopping"
    liveness.close()


def test_the_text_of_a_collective_is_for_the_log_and_no_wait_is_longer_than_the_launcher_grants(capfd, monkeypatch):
    monkeypatch.setenv(processes.GRACE, "1")
    liveness = Liveness(Service(), "host:1", 0, ["process 0"], 100.0, processes._patience())
    begun = time.monotonic()
    said = liveness.fail(jax.errors.JaxRuntimeError("Gloo: Connection\nclosed by peer, pair.cc:12"))
    assert "pair.cc" not in said and 0.7 < time.monotonic() - begun < 10
    log, told = capfd.readouterr().err.splitlines()
    assert log == "INFO a collective failed: JaxRuntimeError: Gloo: Connection closed by peer, pair.cc:12"
    assert told == "polygpt: a collective failed: waiting up to 1 s to learn which process ended"
    monkeypatch.delenv(processes.GRACE)
    assert processes._patience() is None


def test_a_fault_of_the_user_is_told_without_host_and_class():
    service = Service()
    liveness = Liveness(service, "host:1", 1, ["process 0 (host a, pid 1)", "process 1 (host a, pid 2)"], bound=4.0)
    assert liveness.fail(UserError("data.rows is 3")) is None
    assert service.texts["polygpt/verdict/0"] == f"{FAULT}process 1: data.rows is 3"
    liveness.close()
