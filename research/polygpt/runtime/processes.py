"""Runs across several processes: start-up, barriers, exchange of strings, and a common end.

Everything here uses JAX's coordination service, which process 0 hosts. A process learns its rank from `polygpt launch`
(three POLYGPT_ variables), SLURM (`srun` with several tasks) or TPU pod metadata. Without these it runs alone, and
every function here does nothing.
"""

import atexit
import collections
import contextlib
import dataclasses
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from polygpt.errors import UserError
from polygpt.runtime import private
from polygpt.runtime.liveness import INVALID_INPUT, Liveness, exit_now, listen_to_launcher
from polygpt.runtime.waiting import Deadline, log_to_stderr, report_waiting
from polygpt.spec import Spec

COORDINATOR, PROCESSES, PROCESS = "POLYGPT_COORDINATOR", "POLYGPT_PROCESSES", "POLYGPT_PROCESS"
"""Variables set by `polygpt launch`: host:port of process 0, number of processes, rank of this process."""
GRACE = "POLYGPT_GRACE"
"""Set by `polygpt launch local`: seconds that the other processes have to exit after one died."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ProcessesSpec(Spec):
    """How long processes wait for each other, in seconds."""

    initialization_timeout: int = 1800
    """Limit for all processes to start. A cold pod may need many minutes to pull images."""
    barrier_timeout: int = 600
    """Limit at a barrier, between the first and the last process. Checkpoints have barriers: increase it if storage is
    slow."""
    heartbeat_timeout: int = 100
    """When a process dies, all others exit within this time. A process without heartbeats for 60 % of it counts as
    dead."""
    shutdown_timeout: int = 3600
    """How long a finished process waits for the others; process 0 may still be writing a report."""

    def validate(self):
        for name in ("initialization_timeout", "barrier_timeout", "shutdown_timeout"):
            self.require(getattr(self, name) >= 1, name, "at least 1 second")
        self.require(self.heartbeat_timeout >= 4, "heartbeat_timeout", "at least 4 seconds")


@dataclasses.dataclass
class _Group:
    """The processes of this run."""

    spec: ProcessesSpec
    rank: int
    count: int
    names: list[str]  # by rank, for messages
    uses: collections.Counter  # per barrier name: the service accepts each identifier once
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # of `uses`: also used by save threads
    last: str | None = None
    under_way: dict[str, str] = dataclasses.field(default_factory=dict)  # barriers with a waiting thread, by name
    liveness: Liveness | None = None
    failed: BaseException | None = None

    @property
    def client(self):
        return private.coordination_service().client


_group: _Group | None = None


def initialize(spec: ProcessesSpec = ProcessesSpec()) -> None:
    """Joins the other processes of this run, if any. Call it before anything queries JAX devices.

    Raises:
        UserError: the POLYGPT_ variables are invalid, or JAX is already initialized.
    """
    global _group
    if _group is not None:
        _group.spec = spec
        return
    if private.coordination_service().client is None:
        where = _place()
        if where is None:
            return
        listen_to_launcher(_died)
        _start(spec, **where)
    state = private.coordination_service()
    if state.num_processes == 1:
        return
    names = [f"process {rank}" for rank in range(state.num_processes)]
    group = _group = _Group(spec, state.process_id, state.num_processes, names, collections.Counter())
    bound = spec.heartbeat_timeout
    group.liveness = Liveness(group.client, state.coordinator_address, group.rank, names, bound, _patience())
    atexit.register(_finish)  # registered after JAX's own handler, so runs before JAX closes the service
    names[:] = gather("start", f"process {group.rank} (host {socket.gethostname()}, pid {os.getpid()})")
    seconds = spec.initialization_timeout
    why = f"start-up: not all devices are known after {seconds} s"
    why += " (train.processes.initialization_timeout): look at the logs of the others"
    # GPU and TPU libraries have their own timeouts, if any.
    with report_waiting("start-up: still waiting for the devices of other processes", deadline=Deadline(seconds, why)):
        log.info("start-up: %d devices, %d local", jax.device_count(), jax.local_device_count())


@contextlib.contextmanager
def together(spec: ProcessesSpec = ProcessesSpec()) -> Iterator[None]:
    """Calls `initialize`. While entered, an error in one process ends all, and each names the process with the error.

    A failed collective means that another process ended; it waits to learn which.
    """
    try:
        initialize(spec)
        yield
    except BaseException as error:
        well = isinstance(error, SystemExit) and error.code in (0, None)
        if _group is not None and _group.failed is None and not well:
            _group.failed = error
            if said := _group.liveness.announce_failure(error):
                raise RuntimeError(said) from error
        raise


def barrier(name: str) -> None:
    """Waits until every process gets here. Names may be reused; all processes must use them in the same order.

    Raises:
        UserError: after `barrier_timeout`, naming the processes that did not arrive.
    """
    if _group is not None:
        _meet(_group, name)


def run_first_step(step: Callable, *given: Any) -> Any:
    """Runs the first step, which has the first collectives between all devices, and waits for its result.

    After `initialization_timeout` the process exits with code 2: a hanging process still sends heartbeats, and NCCL
    waits forever.
    """
    if _group is None:
        return step(*given)
    seconds, begun = _group.spec.initialization_timeout, time.monotonic()
    why = f"start-up: the first step, with the first collectives, is not done after {seconds} s"
    why += " (train.processes.initialization_timeout): look at the logs of the others"
    with report_waiting("start-up: still waiting for the first step", deadline=Deadline(seconds, why)):
        done = jax.block_until_ready(step(*given))
    log.info("start-up: the first collectives are done after %.2f s", time.monotonic() - begun)
    return done


def gather(name: str, text: str) -> list[str]:
    """Every process's text, by rank. Raises UserError like `barrier`."""
    if _group is None:
        return [text]
    group, use = _group, _group.uses[name]
    group.client.key_value_set(f"polygpt/gather/{name}/{use}/{group.rank}", text)
    _meet(group, name)
    texts = {_rank(key): text for key, text in group.client.key_value_dir_get(f"polygpt/gather/{name}/{use}/")}
    if use:  # every process has got here, so all have read the texts of the previous use
        group.client.key_value_delete(f"polygpt/gather/{name}/{use - 1}/{group.rank}")
    return [texts[rank] for rank in range(group.count)]


def first_fault(name: str, fault: str) -> str:
    """The first non-empty fault by rank ("" means none), in all processes. Raises UserError like `barrier`."""
    return next(filter(None, gather(name, fault)), "")


def broadcast(name: str, text: str) -> str:
    """Process 0's text, in all processes. Raises UserError like `barrier`."""
    if _group is None:
        return text
    group, use = _group, _group.uses[name]
    if group.rank == 0:
        group.client.key_value_set(f"polygpt/broadcast/{name}/{use}", text)
    _meet(group, name)
    agreed = group.client.blocking_key_value_get(f"polygpt/broadcast/{name}/{use}", group.spec.barrier_timeout * 1000)
    if group.rank == 0 and use:
        group.client.key_value_delete(f"polygpt/broadcast/{name}/{use - 1}")
    return agreed


def publish(name: str, text: str) -> None:
    """Publishes a text to all processes without waiting. The first text under a name wins; later ones are dropped."""
    if _group is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # ALREADY_EXISTS; others notice if the service is gone
            _group.client.key_value_set(f"polygpt/published/{name}", text)


def published(name: str) -> str | None:
    """The text published under this name, or None. Visible to every process once `publish` has returned."""
    if _group is None:
        return None
    try:
        return _group.client.key_value_try_get(f"polygpt/published/{name}")
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def barrier_timeout() -> int:
    """Timeout of barriers in this run, in seconds; the default for a single process."""
    return (ProcessesSpec() if _group is None else _group.spec).barrier_timeout


def last_barrier() -> str | None:
    """Describes the last barrier and whether this process still waits there; None before the first."""
    return None if _group is None else "; ".join(_group.under_way.copy().values()) or _group.last


def _place() -> dict | None:
    """Arguments of jax.distributed.initialize for this process; None if it runs alone."""
    given = [os.environ.get(name) for name in (COORDINATOR, PROCESSES, PROCESS)]
    if any(given):
        coordinator, count, rank = given
        numbers = bool(count and rank) and count.isdecimal() and rank.isdecimal()
        if not (coordinator and ":" in coordinator and numbers and int(rank) < int(count)):
            raise UserError(
                f"{COORDINATOR}, {PROCESSES} and {PROCESS} are {', '.join(map(repr, given))}: they must be "
                "host:port, a number of processes and a smaller number from 0; polygpt launch sets them"
            )
        place = {"coordinator_address": coordinator, "num_processes": int(count), "process_id": int(rank)}
        # Inside a SLURM step, JAX would query SLURM for missing arguments and use only one GPU of the node.
        return place | {"cluster_detection_method": "deactivate"} if int(count) > 1 else None
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # SLURM_NTASKS is also set in the shell of a batch script
        return {"cluster_detection_method": "slurm"}
    pod = private.pod_cluster()
    return {"cluster_detection_method": pod} if pod else None


def _died(rank: int, code: int, how: str) -> None:
    """Called when the launcher reports a failed process: during start-up only the launcher can know."""
    if _group is not None and _group.liveness is not None:
        _group.liveness.peer_died(rank, code, how)
    else:
        print(f"polygpt: start-up: process {rank} {how}: stopping", file=sys.stderr, flush=True)
        exit_now(INVALID_INPUT if code == INVALID_INPUT else 1)


def _start(spec: ProcessesSpec, **where) -> None:
    seconds, begun = spec.initialization_timeout, time.monotonic()
    log_to_stderr()
    # JAX's SIGTERM handler would replace the run's, which saves and exits.
    jax.config.update("jax_enable_preemption_service", False)
    for whose in ("local", "global"):  # for the exchange of device information
        jax.config.update(f"jax_cpu_get_{whose}_topology_timeout_minutes", math.ceil(seconds / 60))
    log.info("start-up: waiting for the other processes, %d s at most: %s", seconds, where)
    try:
        with private.register_timeout(seconds), report_waiting("start-up: still waiting for other processes"):
            jax.distributed.initialize(
                **where,
                initialization_timeout=seconds + 30,  # the service, which knows who is missing, times out first
                heartbeat_timeout_seconds=2 * spec.heartbeat_timeout,  # our own heartbeats time out first
                shutdown_timeout_seconds=spec.shutdown_timeout,
            )
    except RuntimeError as error:
        raise UserError(f"could not join the processes ({str(error).splitlines()[0]}): {where}") from error
    log.info("start-up: all processes joined after %.1f s", time.monotonic() - begun)


def _meet(group: _Group, name: str, bound: str = "barrier_timeout") -> None:
    """A barrier with the timeout in `bound`. Each process sets a key before it waits, so missing ones are known."""
    seconds = getattr(group.spec, bound)
    with group.lock:
        use = group.uses[name]
        group.uses[name] += 1
    place = f"polygpt/barrier/{name}/{use}"

    def missing() -> str:
        arrived = {_rank(key) for key, _ in group.client.key_value_dir_get(f"{place}/")}
        return ", ".join(group.names[rank] for rank in range(group.count) if rank not in arrived) or "no process"

    begun = time.monotonic()
    group.under_way[name] = f"waits at barrier {name!r}, use {use + 1}, since {time.strftime('%H:%M:%S')}"
    log.info("barrier %r: waiting", name)
    group.client.key_value_set(f"{place}/{group.rank}", "")
    try:
        with report_waiting(f"barrier {name!r}: still waiting for", missing):
            group.client.wait_at_barrier(place, seconds * 1000)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise UserError(
            f"barrier {name!r}: {missing()} did not arrive within {time.monotonic() - begun:.0f} s "
            f"(train.processes.{bound}): look at its log"
        ) from error
    group.client.key_value_delete(f"{place}/{group.rank}")
    del group.under_way[name]
    group.last = f"passed barrier {name!r}, use {use + 1}, at {time.strftime('%H:%M:%S')}"
    log.info("barrier %r: passed after %.2f s", name, time.monotonic() - begun)


def _patience() -> float | None:
    """Seconds that the launcher grants for learning which process ended and for a clean exit; None without a
    launcher."""
    given = os.environ.get(GRACE, "")
    return 0.7 * float(given) if given.replace(".", "", 1).isdecimal() else None


def _rank(key: str) -> int:
    return int(key.rpartition("/")[2])


def _finish() -> None:
    """At exit: waits for the other processes, or after an error exits without them."""
    group = _group
    if group.failed is not None or getattr(sys, "last_value", None) is not None:
        exit_now(2 if isinstance(group.failed, UserError) else 1)
    try:
        _meet(group, "end", "shutdown_timeout")
    except Exception as error:
        print(f"polygpt: {error}", file=sys.stderr)
        exit_now(1)
    group.liveness.close()
