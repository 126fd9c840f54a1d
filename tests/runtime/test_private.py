"""Names of JAX and Orbax that are not public are used in one file."""

import re
from pathlib import Path

import pytest
from jax._src import distributed
from orbax.checkpoint._src.multihost import multihost

from polygpt.runtime import private

PRIVATE = re.compile(r"(import|from) +(jax|jaxlib|orbax)[\w.]*\._|\bjax\._src\b|orbax\.checkpoint\._")


def test_no_other_file_uses_them():
    root = Path(private.__file__).parents[1]
    found = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if PRIVATE.search(path.read_text())}
    assert found == {"runtime/private.py"}


def test_the_service_that_is_bounded_is_the_one_that_is_made_and_only_meanwhile(monkeypatch):
    made = []
    monkeypatch.setattr(distributed._jax, "get_distributed_runtime_service", lambda *a, **named: made.append(named))
    with pytest.raises(ZeroDivisionError), private.register_timeout(7):
        distributed._jax.get_distributed_runtime_service("address", 2)
        raise ZeroDivisionError
    distributed._jax.get_distributed_runtime_service("address", 2)
    assert made == [{"cluster_register_timeout": 7}, {}]


def test_both_kinds_of_orbaxs_barriers_are_met_at_ours(monkeypatch):
    for name in ("sync_global_processes", "get_barrier_sync_fn"):
        monkeypatch.setattr(multihost, name, getattr(multihost, name))  # so that it is put back
    met = []
    private.set_orbax_barrier(met.append)
    multihost.sync_global_processes("Checkpointer:save", timeout=3, processes={0})
    multihost.get_barrier_sync_fn(processes={0})(key="commit", timeout_ms=5)
    assert met == ["Checkpointer:save", "commit"]


def test_a_machine_that_is_no_pod_is_alone():
    assert private.pod_cluster() is None
