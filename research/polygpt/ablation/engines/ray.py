"""The engine for a Ray cluster: one remote call per task."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from polygpt.ablation.engines import worker
from polygpt.ablation.engines.base import EVERY, Callback, Engine, Failure, Task
from polygpt.ablation.engines.watching import Watch
from polygpt.errors import UserError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # avoids a deprecation warning in each worker
}
"""Environment set before Ray is imported; disables usage statistics."""


@dataclasses.dataclass(frozen=True)
class Ray(Engine):
    """Ray workers, one task each. Every node needs this package, and the user's files at the same paths.

    When a worker or its node dies, Ray reruns the task elsewhere. If all nodes share the ablation's folder, it resumes
    from the last save and reports progress; if not, it restarts, with the same results, and reports nothing until the
    task is finished.
    """

    address: str | None = None
    """Address of the cluster: "auto" for the one this machine belongs to, "ray://head:10001" from outside; null starts
    a temporary cluster on this machine."""
    cpus: float = 1.0
    """CPU cores per task, as counted by Ray."""
    gpus: float | None = None
    """GPUs per task; null: one if the cluster has any, otherwise none."""
    retries: int = 3
    """Number of retries of a task whose worker died."""

    def validate(self):
        self.require(self.cpus > 0, "cpus", "positive")
        self.require(self.gpus is None or self.gpus >= 0, "gpus", "null or at least 0")
        self.require(self.retries >= 0, "retries", "at least 0")

    def run(self, tasks: Sequence[Task], callback: Callback) -> Iterator[tuple[Task, list[dict[str, Any]] | Failure]]:
        with _connected(self.address) as ray:
            gpus = self.gpus if self.gpus is not None else float(ray.cluster_resources().get("GPU", 0) >= 1)
            self._require_room(ray, gpus)
            # Errors of a task are part of its answer; Ray retries only dead workers.
            remote = ray.remote(num_cpus=self.cpus, num_gpus=gpus, max_retries=self.retries)(worker.answer)
            calls = {remote.remote(task.to_json()): task for task in tasks}
            watch = Watch(callback)
            try:
                while calls:
                    for done in ray.wait(list(calls), num_returns=1, timeout=EVERY)[0]:
                        yield calls.pop(done), self._answer(ray, done)
                    watch(calls.values())
            finally:
                for call in calls:
                    with contextlib.suppress(Exception):  # it, or the cluster, has ended meanwhile
                        ray.cancel(call)

    def _answer(self, ray, done) -> list[dict[str, Any]] | Failure:
        try:
            return worker.read(ray.get(done))
        except ray.exceptions.RayError as error:
            tried = f", {self.retries + 1} times" if self.retries else ""
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            return Failure(f"its worker died{tried}: {type(error).__name__}: {first.strip()}", False, str(error))

    def _require_room(self, ray, gpus: float) -> None:
        """Raises UserError if no node has the requested resources: Ray would wait forever."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= self.cpus and node.get("GPU", 0) >= gpus for node in nodes):
            most = max((node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
            raise UserError(
                f"Ray: a task requests {self.cpus:g} CPUs and {gpus:g} GPUs, but no node has that many "
                f"(the largest: {most[0]:g} and {most[1]:g}): lower cpus or gpus"
            )


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to the cluster; reuses an existing connection and leaves it open."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise UserError("the engine Ray needs ray, which is not installed: pip install -e '.[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    local = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"Ray: cannot connect to {address or 'a cluster on this machine'}: {first}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
