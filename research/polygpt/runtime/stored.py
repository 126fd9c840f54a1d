"""How a state lies in a checkpoint, by Orbax: as items whose arrays any devices can read their shards from."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from polygpt.runtime import private, processes

# Orbax logs the traceback of an error that it raises too: whoever catches it says it in one line.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))

LARGE = {"params": "params", "opt_state": "optimizer", "ema": "ema"}
"""Fields of the state that are items of their own, and the names of these. All others are in the item "counts"."""


def writer() -> ocp.AsyncCheckpointer:
    """Writes in the background, `save(place, args=parts(...))`, and reads."""
    _meet_at_our_barriers()
    bound = ocp.options.AsyncOptions(timeout_secs=processes.barrier_timeout())
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=bound)


def parts(state: Any, data: dict[str, Any]) -> ocp.args.Composite:
    """What is to be written: the items of a state, and JSON data."""
    items = _items(state)
    counts = ocp.args.PyTreeSave(items.pop("counts"))
    return ocp.args.Composite(
        **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
        counts=counts,
        data=ocp.args.JsonSave(data),
    )


def read(
    reader: ocp.AsyncCheckpointer, place: Path, target: Any, initial: Callable[[], Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """A state and its JSON data.

    Args:
        reader: a `writer`.
        place: the folder of the checkpoint.
        target: shapes, dtypes and shardings.
        initial: gives the state before the first step, for counts that the checkpoint lacks; zero by default.
    """
    items = _items(target)
    wanted = items.pop("counts")
    there = ocp.PyTreeCheckpointHandler().metadata(epath.Path(place / "counts")).tree.keys()
    counts = {name: tree for name, tree in wanted.items() if name in there}
    found = reader.restore(
        place,
        args=ocp.args.Composite(
            **{name: ocp.args.StandardRestore(tree) for name, tree in items.items()},
            counts=ocp.args.PyTreeRestore(
                counts,
                restore_args=ocp.checkpoint_utils.construct_restore_args(counts),
                partial_restore=True,  # a count that is there and not in `State` any more is left where it is
            ),
            data=ocp.args.JsonRestore(),
        ),
    )
    large = {field: found[name] for field, name in LARGE.items() if name in items}
    lacking = _initial({name: tree for name, tree in wanted.items() if name not in there}, initial)
    return dataclasses.replace(target, **large, **found["counts"], **lacking), found["data"]


def read_parameters(folder: Path, step: int, target: Any, averaged: bool) -> Any:
    """The parameters of a checkpoint, or their moving average, alone. `target` holds shapes, dtypes and shardings."""
    _meet_at_our_barriers()
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(folder / str(step) / ("ema" if averaged else "params"), target)


def _meet_at_our_barriers() -> None:
    """Where processes read and write together, they wait for each other with names, in the log, and for so long."""

    def meet(key: str) -> None:
        # Whoever reads meets the others when it has, to hear whether all could.
        if not key.endswith("Checkpointer:restore"):
            processes.barrier(f"checkpoint: {key.strip('_')}")

    if processes.last_barrier() is not None:  # this process is one of a run's
        private.orbax_meets_at(meet)


def _items(state: Any) -> dict[str, Any]:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    there = {name: tree for name, tree in fields.items() if jax.tree.leaves(tree)}  # Orbax refuses what has none
    items = {LARGE[name]: tree for name, tree in there.items() if name in LARGE}
    return items | {"counts": {name: tree for name, tree in there.items() if name not in LARGE}}


def _initial(targets: dict[str, Any], initial: Callable[[], Any] | None) -> dict[str, Any]:
    """The fields of that name as they are before the first step; what else `initial` computes is compiled away."""

    def make():
        if initial is None:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), targets)
        state = initial()
        return {name: getattr(state, name) for name in targets}

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, targets))() if targets else {}
