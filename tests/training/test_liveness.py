"""What a process tells the others of its own failure."""

import time

import jax
import pytest

from polygpt.training.liveness import Liveness


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
    liveness.fail(error)
    assert (time.monotonic() - begun > 1.0) == waits  # FAREWELL is a tenth
    assert service.texts["polygpt/verdict/0"] == f"process 0 failed: {type(error).__name__}: {error}: stopping"
    liveness.close()
