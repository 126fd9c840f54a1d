"""One of several processes: python several_processes.py SCENARIO RANK COUNT PORT prints what happens to it.

The launcher gives a process its place by environment variables: it is then called with SCENARIO alone.
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

SCENARIO = sys.argv[1]
if len(sys.argv) > 2:
    os.environ |= {
        "POLYGPT_COORDINATOR": f"127.0.0.1:{sys.argv[4]}",
        "POLYGPT_PROCESSES": sys.argv[3],
        "POLYGPT_PROCESS": sys.argv[2],
    }
RANK, COUNT = int(os.environ["POLYGPT_PROCESS"]), int(os.environ["POLYGPT_PROCESSES"])
PORT = os.environ["POLYGPT_COORDINATOR"].rpartition(":")[2]
if SCENARIO == "killed at start-up" and RANK == 1:
    os.kill(os.getpid(), signal.SIGKILL)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from polygpt.errors import UserError  # noqa: E402
from polygpt.runtime import processes  # noqa: E402

if SCENARIO == "unsaved":  # the others start sooner without
    import orbax.checkpoint as ocp

    from polygpt.runtime import stored

SPEC = processes.ProcessesSpec(barrier_timeout=60, heartbeat_timeout=12, shutdown_timeout=60)


def sums():
    """Collectives, until one fails."""
    mesh = Mesh(jax.devices(), ("all",))
    ones = jax.jit(lambda: jnp.ones(COUNT), out_shardings=NamedSharding(mesh, PartitionSpec("all")))()
    add = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
    while True:
        assert float(add(ones)) == COUNT
        yield
        time.sleep(0.02)


def talk():
    print("gathered", processes.gather("names", f"{RANK}"), processes.gather("names", f"again {RANK}"))
    print("agreed", processes.broadcast("word", f"of {RANK}"), processes.broadcast("word", f"of {RANK}, again"))
    assert processes.published("stop") is None
    processes.barrier("asked")
    if RANK == 1:
        processes.publish("stop", "3")
    processes.barrier("a/b c")
    print("told", processes.published("stop"))
    print("last", processes.last_barrier())
    if RANK == COUNT - 1:
        time.sleep(1)  # the others wait at the end


def missing():
    if RANK == 1:
        time.sleep(30)
    processes.barrier("early")


def unsaved():
    if RANK == 1:
        time.sleep(30)
    place = Path(tempfile.gettempdir(), f"polygpt-unsaved-{PORT}")  # not made before all are here
    stored.writer().save(place, args=ocp.args.Composite(data=ocp.args.JsonSave({})))


def stuck():
    mesh = Mesh(jax.devices(), ("all",))
    ones = jax.jit(lambda: jnp.ones(COUNT), out_shardings=NamedSharding(mesh, PartitionSpec("all")))()
    add = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(ones).compile()
    processes.barrier("compiled")
    if RANK == 1:
        time.sleep(40)
    processes.run_first_step(add, ones)


def error():
    if RANK == 1:
        raise UserError("the disk is full")
    for _ in sums():
        pass


def killed(rank, number):
    for step, _ in enumerate(sums()):
        if step == 0:
            processes.barrier("under way")
        if step == 5 and RANK == rank:
            print("ends", flush=True)
            os.kill(os.getpid(), number)


SCENARIOS = {
    "talk": talk,
    "missing": missing,
    "unsaved": unsaved,
    "stuck": stuck,
    "error": error,
    "killed": lambda: killed(2, signal.SIGKILL),
    "second killed": lambda: killed(1, signal.SIGKILL),
    "first killed": lambda: killed(0, signal.SIGKILL),
    "frozen": lambda: killed(1, signal.SIGSTOP),
    "first frozen": lambda: killed(0, signal.SIGSTOP),
}

IMPATIENT = {"barrier_timeout": 3}
CHANGES = {
    "missing": IMPATIENT,
    "unsaved": IMPATIENT,
    "absent": {"initialization_timeout": 5},
    "stuck": {"initialization_timeout": 15},
    "second killed": {"heartbeat_timeout": 600},  # only the launcher can know in time
}
spec = SPEC.replace(**CHANGES.get(SCENARIO, {}))
with processes.together(spec):
    SCENARIOS[SCENARIO]()
