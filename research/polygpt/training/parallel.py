"""Runs the pure step on one device, data-parallel by pmap, or on any mesh, with the same results."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from polygpt import sharding
from polygpt.errors import UserError
from polygpt.runtime.compilation import compiler_options
from polygpt.sequence import Batch
from polygpt.sharding import MeshLayout, MeshSpec, row_multiple
from polygpt.spec import counted

AXIS = "data"
"""The axis over which pmap splits the batch."""

Mode = Literal["single", "pmap", "sharded"]


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A way to run the step; made by `build`.

    Attributes:
        mode: its name.
        devices: the devices used.
        rows: number of shards of the batch axis.
        data_shards: number of process groups that read different rows; processes whose devices hold the same rows read
            the same data.
        data_shard: index of this process's group.
        layout: the mesh, if the mode is "sharded".
        axes: the names of the parameters' axes, `Model.axes()`.
    """

    mode: Mode
    devices: tuple[jax.Device, ...]
    rows: int
    data_shards: int
    data_shard: int
    layout: MeshLayout | None
    axes: Any

    def compile(self, make_step: Callable, initial: Callable) -> Callable:
        """The compiled step. It donates its input state, which is invalid afterwards.

        Args:
            make_step: builds a step from `reduce`, `shard` and `gather`, see `step.make_step`.
            initial: returns the state before the first step.
        """
        if self.mode == "pmap":
            step = make_step(
                reduce=lambda tree: jax.lax.psum(tree, AXIS),
                shard=lambda: jax.lax.axis_index(AXIS),
                gather=lambda tree: jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, tiled=True), tree),
            )
            # The state is replicated (axis None): pmap is jit of shard_map and keeps a copy on every device.
            axes = {"in_axes": (None, 0), "out_axes": (None, None)}
            return jax.pmap(step, AXIS, donate_argnums=0, devices=self.devices, **axes)
        step = make_step()
        options = {"donate_argnums": 0, "compiler_options": compiler_options(self.devices[0].platform)}
        if self.layout is None:
            return jax.jit(step, **options)

        def split_step(state, batch):
            with sharding.use_layout(self.layout):
                return step(state, batch)

        # One program sees the whole batch; the compiler partitions it and inserts the collectives.
        return jax.jit(split_step, out_shardings=(self.shardings(initial), self.layout.replicated()), **options)

    def create(self, initial: Callable, *given: Any) -> Any:
        """The state from `initial(*given)`, created with its final sharding."""
        return jax.jit(initial, out_shardings=self.shardings(initial))(*given)

    def abstract(self, initial: Callable) -> Any:
        """Shapes, dtypes and shardings of the result of `create`."""
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            jax.eval_shape(initial),
            self.shardings(initial),
        )

    def shardings(self, initial: Callable) -> Any:
        """The sharding of every leaf of the state."""
        shapes = jax.eval_shape(initial)
        if self.layout is None:
            whole = SingleDeviceSharding(self.devices[0]) if self.mode == "single" else self._over_rows(())
            return jax.tree.map(lambda _: whole, shapes)
        return state_shardings(shapes, self.axes, self.layout)

    def as_global_arrays(self, state: Any) -> Any:
        """The state as global arrays: a pmap that was not compiled ahead of time returns process-local copies."""
        if self.mode != "pmap" or jax.process_count() == 1:
            return state

        def joined(x):
            parts = [part.data for part in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape, self._over_rows(()), parts)

        return jax.tree.map(joined, state)

    def put(self, batch: Batch) -> Batch:
        """Moves a NumPy batch with this data shard's rows to the devices, sharded for the step."""
        if self.mode == "single":
            return jax.device_put(batch, self.devices[0])
        if self.mode == "pmap":
            # [devices, rows per device, ...], for this process's devices.
            local = self.rows // self.data_shards
            split = jax.tree.map(lambda x: x.reshape(local, -1, *x.shape[1:]), batch)
            return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._over_rows(AXIS), x), split)
        return jax.tree.map(self._put_rows, batch)

    def put_global_batch(self, batch: Batch) -> Batch:
        """Moves a batch with all rows, equal in every process, to the mesh, split as far as it divides."""
        layout = self.layout

        def put(x):
            place = layout.sharding(("batch", *[None] * (x.ndim - 1)), x.shape)
            return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

        return jax.tree.map(put, batch)

    def check(self, batch_size: int, seq_len: int, accumulate: int) -> None:
        """Raises UserError unless batch and positions can be split over the devices and microbatches."""
        parts = self.rows
        cut = f"split over {counted(parts, 'device')}, {counted(accumulate, 'microbatch', 'microbatches')}"
        if self.layout and (stages := self.layout.size("stages")) > 1:
            microbatches = self.layout.spec.microbatches or stages
            parts = row_multiple(self.layout.spec.rules, self.layout.mesh.shape, microbatches)
            cut = f"{cut}, {microbatches} of the pipeline"
        if batch_size % (parts * accumulate):
            raise UserError(f"data.batch_size is {batch_size}: it must be a multiple of {parts * accumulate} ({cut})")
        self.check_seq_len(seq_len, "data.layout.seq_len")

    def check_seq_len(self, seq_len: int, field: str) -> None:
        """Raises UserError, naming the field, unless sequences of this length can be split over the devices."""
        if self.layout and seq_len % (size := self.layout.size("positions")):
            raise UserError(f"{field} is {seq_len}: it must be a multiple of {size} (train.mesh.sequence)")

    def _over_rows(self, axis) -> NamedSharding:
        spec = PartitionSpec(axis) if axis else PartitionSpec()
        return NamedSharding(Mesh(np.asarray(self.devices), (AXIS,)), spec)

    def _put_rows(self, x: np.ndarray) -> jax.Array:
        shape = (x.shape[0] * self.data_shards, *x.shape[1:])
        place = self.layout.sharding(("batch", *[None] * (x.ndim - 1)), shape)
        if self.data_shards == 1:
            return jax.make_array_from_callback(shape, place, lambda index: x[index])
        size = shape[0] // self.rows
        mine = _blocks_by_process(self.layout)[jax.process_index()]

        def rows(index):
            start = mine.index((index[0].start or 0) // size) * size
            return x[start : start + size][(slice(None), *index[1:])]

        return jax.make_array_from_callback(shape, place, rows)


def build(mode: Mode, axes: Any, mesh: MeshSpec | None = None, devices: list | None = None) -> Parallel:
    """Builds the wrapper for a mode.

    Args:
        mode: "single", "pmap" or "sharded".
        axes: the names of the parameters' axes, `Model.axes()`.
        mesh: how devices are arranged, for "sharded".
        devices: default: all devices; "single" uses the first.

    Raises:
        UserError: the mesh does not divide the devices, or "single" is used with several processes.
    """
    devices = tuple(devices or jax.devices())
    processes = sorted({device.process_index for device in devices})
    if mode == "single":
        require_many(mode, len(processes))
        return Parallel(mode, devices[:1], 1, 1, 0, None, axes)
    if mode == "pmap":
        return Parallel(mode, devices, len(devices), len(processes), jax.process_index(), None, axes)
    layout = sharding.make_layout(mesh or MeshSpec(), devices)
    groups = sorted({blocks for blocks in _blocks_by_process(layout).values()})
    if sum(map(len, groups)) != layout.size("batch"):
        raise UserError(
            f"train.mesh ({layout.summary()}) gives processes partially overlapping rows: make data and fsdp "
            "multiples or divisors of the number of processes"
        )
    here = _blocks_by_process(layout).get(jax.process_index(), groups[0])  # planned devices belong to no process
    return Parallel(mode, devices, layout.size("batch"), len(groups), groups.index(here), layout, axes)


def require_many(mode: str, processes: int) -> None:
    """Raises UserError if this mode does not support that many processes."""
    if mode == "single" and processes > 1:
        raise UserError(f"train.parallel is 'single', but there are {processes} processes: choose 'sharded'")


def state_shardings(state: Any, axes: Any, layout: MeshLayout) -> Any:
    """The sharding of every leaf of a state: parameters by the names of their axes, optimizer state like its parameter.

    `axes` has the axes of all references too, by their names.

    An optimizer leaf belongs to the parameter whose path is a suffix of its own path. If it has the parameter's shape,
    it is split the same way; if it lacks one axis, like a factored moment (Adafactor, 1804.04235, section 3), it is
    split like the remaining axes.
    """
    named = {}
    for path, names in jax.tree_util.tree_flatten_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))[0]:
        named[_keys(path)] = names
    parameters = state.params | state.references
    shapes = {_keys(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(parameters)[0]}

    def place(path, leaf):
        keys = _keys(path)
        owner = next((keys[i:] for i in range(len(keys)) if keys[i:] in named), None)
        if owner is None:
            return layout.replicated()
        names, shape = named[owner], shapes[owner]
        if leaf.shape == shape or shape and leaf.shape[1:] == shape[1:]:  # all layers of a stack, or a range of them
            return layout.sharding(names, leaf.shape)
        shorter = {names[:i] + names[i + 1 :] for i in range(len(shape)) if shape[:i] + shape[i + 1 :] == leaf.shape}
        return layout.sharding(shorter.pop(), leaf.shape) if len(shorter) == 1 else layout.replicated()

    return jax.tree_util.tree_map_with_path(place, state)


def _keys(path) -> tuple[str, ...]:
    """The dict keys along a path: the full path of a parameter, or the suffix of a path in optimizer state."""
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _blocks_by_process(layout: MeshLayout) -> dict[int, tuple[int, ...]]:
    """Batch shards held by each process's devices."""
    parts = layout.size("batch")
    held: dict[int, set[int]] = {}
    for device, (index,) in layout.sharding(("batch",), (parts,)).devices_indices_map((parts,)).items():
        held.setdefault(device.process_index, set()).add(index.start or 0)
    return {process: tuple(sorted(blocks)) for process, blocks in held.items()}
