"""Format of a state in a checkpoint (Orbax): items with arrays that can be restored with any sharding."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from polygpt.parameters import paths, tree_of
from polygpt.runtime import private, processes

# Orbax also logs the traceback of errors that it raises; callers report them in one line.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))

LARGE = {"params": "params", "opt_state": "optimizer", "ema": "ema"}
"""Fields of the state stored as separate items, with the items' names. All others are in the item "counts"."""


def writer() -> ocp.AsyncCheckpointer:
    """A checkpointer that writes in the background, `save(place, args=parts(...))`, and reads."""
    _meet_at_our_barriers()
    bound = ocp.options.AsyncOptions(timeout_secs=processes.barrier_timeout())
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=bound)


def parts(state: Any, data: dict[str, Any]) -> ocp.args.Composite:
    """What to write: the items of a state, and JSON data."""
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
    """Reads a state and its JSON data.

    Args:
        reader: from `writer()`.
        place: folder of the checkpoint.
        target: shapes, dtypes and shardings.
        initial: returns the state before the first step, for counters that the checkpoint lacks; default: zeros.
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
                partial_restore=True,  # ignore counters that `State` no longer has
            ),
            data=ocp.args.JsonRestore(),
        ),
    )
    large = {field: found[name] for field, name in LARGE.items() if name in items}
    lacking = _initial({name: tree for name, tree in wanted.items() if name not in there}, initial)
    return dataclasses.replace(target, **large, **found["counts"], **lacking), found["data"]


def read_parameters(folder: Path, step: int, target: Any, averaged: bool) -> Any:
    """Reads only the parameters of a checkpoint, or their moving average. `target` has shapes, dtypes and shardings."""
    _meet_at_our_barriers()
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(folder / str(step) / ("ema" if averaged else "params"), target)


def shapes(place: Path, item: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array of an item ("params", "ema") of the checkpoint at `place`, by name."""
    tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(place / item)).tree
    return {name: jax.ShapeDtypeStruct(found.shape, found.dtype) for name, found in paths(tree).items()}


def read_some(place: Path, item: str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads some arrays of an item by name; `wanted` has their dtypes and shardings."""
    _meet_at_our_barriers()
    tree = tree_of(wanted)
    restore = ocp.args.PyTreeRestore(
        tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return paths(reader.restore(place / item, args=restore))


def _meet_at_our_barriers() -> None:
    """Replaces Orbax's barriers with ours, which are named, logged and bounded."""

    def meet(key: str) -> None:
        # Readers meet after reading instead, to learn whether all succeeded.
        if not key.endswith("Checkpointer:restore"):
            processes.barrier(f"checkpoint: {key.strip('_')}")

    if processes.last_barrier() is not None:  # this process is one of several
        private.set_orbax_barrier(meet)


def _items(state: Any) -> dict[str, Any]:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    there = {name: tree for name, tree in fields.items() if jax.tree.leaves(tree)}  # Orbax rejects empty trees
    items = {LARGE[name]: tree for name, tree in there.items() if name in LARGE}
    return items | {"counts": {name: tree for name, tree in there.items() if name not in LARGE}}


def _initial(targets: dict[str, Any], initial: Callable[[], Any] | None) -> dict[str, Any]:
    """The initial values of the fields in `targets`; the compiler drops everything else that `initial` computes."""

    def make():
        if initial is None:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), targets)
        state = initial()
        return {name: getattr(state, name) for name in targets}

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, targets))() if targets else {}
