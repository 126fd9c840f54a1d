"""Several processes as one run: start-up, barriers, texts from all to all, and an end that all share.

JAX starts the processes and its coordination service, which process 0 hosts, carries everything here. A process has its
place from `polygpt launch` (the three POLYGPT_ variables), from SLURM (`srun` with several tasks) or from the metadata
of a TPU pod; a process that has none is alone, and for it every function here does nothing.
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
from polygpt.runtime.liveness import AT_FAULT, Liveness, hear_launcher, leave
from polygpt.runtime.waiting import Bound, log_to_stderr, saying
from polygpt.spec import Spec

COORDINATOR, PROCESSES, PROCESS = "POLYGPT_COORDINATOR", "POLYGPT_PROCESSES", "POLYGPT_PROCESS"
"""Variables that `polygpt launch` sets: host:port of process 0, how many there are, and which one this is."""
GRACE = "POLYGPT_GRACE"
"""Set by `polygpt launch local`: seconds that it gives the others to end when a process has died."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ProcessesSpec(Spec):
    """How long the processes of a run wait for each other, in seconds."""

    initialization_timeout: int = 1800
    """For all processes to start. A cold pod may need many minutes to pull its images."""
    barrier_timeout: int = 600
    """At a barrier, from the first process to the last. Checkpoints have barriers: where the first process takes longer
    to finish one than this, on slow storage, allow more."""
    heartbeat_timeout: int = 100
    """When a process dies, all others have ended by then. One that is silent for six tenths of it, frozen or cut off,
    counts as dead."""
    shutdown_timeout: int = 3600
    """For a process that is done to wait for the others, the first of which may have a report to write."""

    def validate(self):
        for name in ("initialization_timeout", "barrier_timeout", "shutdown_timeout"):
            self.require(getattr(self, name) >= 1, name, "at least 1 second")
        self.require(self.heartbeat_timeout >= 4, "heartbeat_timeout", "at least 4 seconds")


@dataclasses.dataclass
class _Group:
    """The processes of this run, as one of them sees them."""

    spec: ProcessesSpec
    rank: int
    count: int
    names: list[str]  # by rank, for messages
    uses: collections.Counter  # of each barrier's name: the service takes an identifier once
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # of `uses`: checkpoints meet in threads
    last: str | None = None
    under_way: dict[str, str] = dataclasses.field(default_factory=dict)  # barriers that some thread waits at, by name
    liveness: Liveness | None = None
    failed: BaseException | None = None

    @property
    def client(self):
        return private.service().client


_group: _Group | None = None


def initialize(spec: ProcessesSpec = ProcessesSpec()) -> None:
    """Joins the other processes of this run, if there are any; call it before anything asks JAX for its devices.

    Raises:
        UserError: if the POLYGPT_ variables are at fault, or JAX has its devices already.
    """
    global _group
    if _group is not None:
        _group.spec = spec
        return
    if private.service().client is None:
        where = _place()
        if where is None:
            return
        hear_launcher(_died)
        _start(spec, **where)
    state = private.service()
    if state.num_processes == 1:
        return
    names = [f"process {rank}" for rank in range(state.num_processes)]
    group = _group = _Group(spec, state.process_id, state.num_processes, names, collections.Counter())
    bound = spec.heartbeat_timeout
    group.liveness = Liveness(group.client, state.coordinator_address, group.rank, names, bound, _patience())
    atexit.register(_finish)  # after JAX registered its own, and so before JAX closes the service
    names[:] = gather("start", f"process {group.rank} (host {socket.gethostname()}, pid {os.getpid()})")
    seconds = spec.initialization_timeout
    why = f"start-up: the devices of all processes are not known after {seconds} s"
    why += " (train.processes.initialization_timeout): look at the logs of the others"
    # How long GPUs and TPUs wait for each other is in their libraries, which give up on their own at best.
    with saying("start-up: still waiting for the devices of other processes", bound=Bound(seconds, why)):
        log.info("start-up: %d devices, %d of them here", jax.device_count(), jax.local_device_count())


@contextlib.contextmanager
def together(spec: ProcessesSpec = ProcessesSpec()) -> Iterator[None]:
    """`initialize`, and while entered an error in one process ends them all, each saying whose error it was.

    An error of a collective is the consequence of another process's end: it waits for that one's name.
    """
    try:
        initialize(spec)
        yield
    except BaseException as error:
        well = isinstance(error, SystemExit) and error.code in (0, None)
        if _group is not None and _group.failed is None and not well:
            _group.failed = error
            if said := _group.liveness.fail(error):
                raise RuntimeError(said) from error
        raise


def barrier(name: str) -> None:
    """Waits until every process is here. A name may be used again; all processes use the names in the same order.

    Raises:
        UserError: after `barrier_timeout`, naming the processes that did not arrive.
    """
    if _group is not None:
        _meet(_group, name)


def first_exchange(step: Callable, *given: Any) -> Any:
    """What the first step gives, in which the devices of all processes exchange for the first time; waits for it.

    Beyond `initialization_timeout` the process ends, code 2: a process that hangs still beats, and NCCL waits for it.
    """
    if _group is None:
        return step(*given)
    seconds, begun = _group.spec.initialization_timeout, time.monotonic()
    why = f"start-up: the first step, the devices' first exchange, is not done after {seconds} s"
    why += " (train.processes.initialization_timeout): look at the logs of the others"
    with saying("start-up: still waiting for the first step", bound=Bound(seconds, why)):
        done = jax.block_until_ready(step(*given))
    log.info("start-up: the devices' first exchange is done after %.2f s", time.monotonic() - begun)
    return done


def gather(name: str, text: str) -> list[str]:
    """Every process's text, by rank. Raises UserError as `barrier` does."""
    if _group is None:
        return [text]
    group, use = _group, _group.uses[name]
    group.client.key_value_set(f"polygpt/gather/{name}/{use}/{group.rank}", text)
    _meet(group, name)
    texts = {_rank(key): text for key, text in group.client.key_value_dir_get(f"polygpt/gather/{name}/{use}/")}
    if use:  # every process has read the texts of the use before: it has come to this one
        group.client.key_value_delete(f"polygpt/gather/{name}/{use - 1}/{group.rank}")
    return [texts[rank] for rank in range(group.count)]


def first_fault(name: str, fault: str) -> str:
    """The first process's fault that is one ("" is none), for all. Raises UserError as `barrier` does."""
    return next(filter(None, gather(name, fault)), "")


def agree(name: str, text: str) -> str:
    """The first process's text, for all. Raises UserError as `barrier` does."""
    if _group is None:
        return text
    group, use = _group, _group.uses[name]
    if group.rank == 0:
        group.client.key_value_set(f"polygpt/agree/{name}/{use}", text)
    _meet(group, name)
    agreed = group.client.blocking_key_value_get(f"polygpt/agree/{name}/{use}", group.spec.barrier_timeout * 1000)
    if group.rank == 0 and use:
        group.client.key_value_delete(f"polygpt/agree/{name}/{use - 1}")
    return agreed


def tell(name: str, text: str) -> None:
    """Leaves a text for all processes and waits for none. The first one under a name stands: later ones are dropped."""
    if _group is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # ALREADY_EXISTS; that the service is gone, others notice
            _group.client.key_value_set(f"polygpt/told/{name}", text)


def told(name: str) -> str | None:
    """What a process has left under this name, or None. Every process hears of it that asks after `tell` returned."""
    if _group is None:
        return None
    try:
        return _group.client.key_value_try_get(f"polygpt/told/{name}")
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def barrier_timeout() -> int:
    """Seconds that a barrier of this run waits at most; the default's for a process that is alone."""
    return (ProcessesSpec() if _group is None else _group.spec).barrier_timeout


def last_barrier() -> str | None:
    """The last barrier and whether this process still waits there, for a person; None before the first."""
    return None if _group is None else "; ".join(_group.under_way.copy().values()) or _group.last


def _place() -> dict | None:
    """What jax.distributed.initialize needs to know of this process; None if it is alone."""
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
        # Within a step of SLURM, JAX would ask it for what is left to say, and take one GPU of the node.
        return place | {"cluster_detection_method": "deactivate"} if int(count) > 1 else None
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # SLURM_NTASKS is there in a batch script's own shell too
        return {"cluster_detection_method": "slurm"}
    pod = private.pod()
    return {"cluster_detection_method": pod} if pod else None


def _died(rank: int, code: int, how: str) -> None:
    """The launcher reports a failed process: while the processes start, only the launcher can know."""
    if _group is not None and _group.liveness is not None:
        _group.liveness.died(rank, code, how)
    else:
        print(f"polygpt: start-up: process {rank} {how}: stopping", file=sys.stderr, flush=True)
        leave(AT_FAULT if code == AT_FAULT else 1)


def _start(spec: ProcessesSpec, **where) -> None:
    seconds, begun = spec.initialization_timeout, time.monotonic()
    log_to_stderr()
    # JAX's own answer to SIGTERM would take the place of the run's, which saves and ends.
    jax.config.update("jax_enable_preemption_service", False)
    for whose in ("local", "global"):  # for what the devices of all are
        jax.config.update(f"jax_cpu_get_{whose}_topology_timeout_minutes", math.ceil(seconds / 60))
    log.info("start-up: waiting for the other processes, %d s at most: %s", seconds, where)
    try:
        with private.register_timeout(seconds), saying("start-up: still waiting for other processes"):
            jax.distributed.initialize(
                **where,
                initialization_timeout=seconds + 30,  # the service, which knows who is missing, gives up first
                heartbeat_timeout_seconds=2 * spec.heartbeat_timeout,  # counted from a beat; ours come first
                shutdown_timeout_seconds=spec.shutdown_timeout,
            )
    except RuntimeError as error:
        raise UserError(f"the processes could not be joined ({str(error).splitlines()[0]}): {where}") from error
    log.info("start-up: all processes are here after %.1f s", time.monotonic() - begun)


def _meet(group: _Group, name: str, bound: str = "barrier_timeout") -> None:
    """A barrier, bounded by that setting. Each process leaves a key before it waits, by which the missing are known."""
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
    log.info("barrier %r: begins", name)
    group.client.key_value_set(f"{place}/{group.rank}", "")
    try:
        with saying(f"barrier {name!r}: still waiting for", missing):
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
    log.info("barrier %r: ends after %.2f s", name, time.monotonic() - begun)


def _patience() -> float | None:
    """Seconds that a launcher leaves for learning whose end it was, and for ending well after that; None without."""
    given = os.environ.get(GRACE, "")
    return 0.7 * float(given) if given.replace(".", "", 1).isdecimal() else None


def _rank(key: str) -> int:
    return int(key.rpartition("/")[2])


def _finish() -> None:
    """At the end of the process: waits for the others, or after an error leaves without them."""
    group = _group
    if group.failed is not None or getattr(sys, "last_value", None) is not None:
        leave(2 if isinstance(group.failed, UserError) else 1)
    try:
        _meet(group, "end", "shutdown_timeout")
    except Exception as error:
        print(f"polygpt: {error}", file=sys.stderr)
        leave(1)
    group.liveness.close()
