"""Names of JAX and Orbax that are not public, each with the reason why no public one will do.

Nothing else in the library imports `jax._src` or `orbax.checkpoint._src`; a test enforces it. Looked for in JAX 0.10.2
and 0.12.0 and in Orbax 0.12.8.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from jax._src import clusters, distributed


def coordination_service() -> Any:
    """The coordination service as this process sees it: `client`, `process_id`, `num_processes`, `coordinator_address`.

    `jax.distributed` starts the service and offers no client of it, so neither keys and values nor barriers with a
    bound. `jax.experimental.multihost_utils` synchronises by collectives of the devices, which hang where a process is
    missing and cannot say which.
    """
    return distributed.global_state


def pod_cluster() -> str | None:
    """The name of the TPU pod's cluster that this process is one of several in; None without.

    `jax.distributed.initialize` detects clusters and cannot be asked beforehand whether it would find one: a process
    that is alone must not start a service.
    """
    pods = [env for env in clusters.ClusterEnv._cluster_types if env.name in ("gcetpu", "gketpu")]
    found = next((env for env in pods if env.is_env_present()), None)
    return found.name if found and found.get_process_count() > 1 else None


@contextlib.contextmanager
def register_timeout(seconds: int) -> Iterator[None]:
    """Bounds the service's own wait for processes, whose message lists the missing ones.

    `jax.distributed.initialize` passes its `initialization_timeout` to the clients alone.
    """
    module, make = distributed._jax, distributed._jax.get_distributed_runtime_service
    module.get_distributed_runtime_service = functools.partial(make, cluster_register_timeout=seconds)
    try:
        yield
    finally:
        module.get_distributed_runtime_service = make


def set_orbax_barrier(meet: Callable[[str], None]) -> None:
    """From now on, Orbax's processes wait for each other by `meet`, which is called with a barrier's name.

    `AsyncOptions.barrier_sync_fn` takes a function for the barriers of the background thread alone; the others are
    `sync_global_processes`, of devices and without a bound. `orbax.checkpoint.multihost` exports both names, but Orbax
    itself looks them up in the private module.
    """
    from orbax.checkpoint._src.multihost import multihost  # here: Orbax takes a second to import

    multihost.sync_global_processes = lambda name, **_: meet(name)
    multihost.get_barrier_sync_fn = lambda **_: lambda *, key, timeout_ms: meet(key)
