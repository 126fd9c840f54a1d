"""The pure step on one device, on rows split over many by pmap, or on any mesh: wrappers with the same results."""

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
from polygpt.sharding import Layout, MeshSpec, rows_unit
from polygpt.spec import counted

AXIS = "data"
"""The axis over which pmap splits rows."""

Mode = Literal["single", "pmap", "sharded"]


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A way to run the step; `build` makes one.

    Attributes:
        mode: its name.
        devices: those that take part.
        rows: how many parts the rows are split into.
        data_shards: how many groups of processes read rows of their own: processes whose devices hold the same rows
            read the same.
        data_shard: which of them this process belongs to.
        layout: the mesh, where the mode is "sharded".
        axes: the names of the parameters' axes, `Model.axes()`.
    """

    mode: Mode
    devices: tuple[jax.Device, ...]
    rows: int
    data_shards: int
    data_shard: int
    layout: Layout | None
    axes: Any

    def compile(self, make_step: Callable, initial: Callable) -> Callable:
        """A compiled step. The state that it is given is donated: it is gone afterwards.

        Args:
            make_step: a function of `reduce` and `shard` that makes a step.
            initial: gives the state before the first step.
        """
        if self.mode == "pmap":
            step = make_step(reduce=lambda tree: jax.lax.psum(tree, AXIS), shard=lambda: jax.lax.axis_index(AXIS))
            # The state goes in and comes out whole (axis None): pmap is jit with shard_map inside and keeps it on every
            # device.
            axes = {"in_axes": (None, 0), "out_axes": (None, None)}
            return jax.pmap(step, AXIS, donate_argnums=0, devices=self.devices, **axes)
        step = make_step()
        options = {"donate_argnums": 0, "compiler_options": compiler_options(self.devices[0].platform)}
        if self.layout is None:
            return jax.jit(step, **options)

        def split_step(state, batch):
            with sharding.using(self.layout):
                return step(state, batch)

        # One program sees the whole batch; the compiler splits it and puts in what the devices have to tell each other.
        return jax.jit(split_step, out_shardings=(self.places(initial), self.layout.replicated()), **options)

    def create(self, initial: Callable) -> Any:
        """The state that `initial()` gives, made where it lies."""
        return jax.jit(initial, out_shardings=self.places(initial))()

    def abstract(self, initial: Callable) -> Any:
        """Shapes, dtypes and places of what `create` would give."""
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            jax.eval_shape(initial),
            self.places(initial),
        )

    def places(self, initial: Callable) -> Any:
        """Where every leaf of the state lies."""
        shapes = jax.eval_shape(initial)
        if self.layout is None:
            whole = SingleDeviceSharding(self.devices[0]) if self.mode == "single" else self._over_rows(())
            return jax.tree.map(lambda _: whole, shapes)
        return places(shapes, self.axes, self.layout)

    def of_all(self, state: Any) -> Any:
        """A state that all processes know to be one: a pmap that was not compiled before gives each its own copies."""
        if self.mode != "pmap" or jax.process_count() == 1:
            return state

        def joined(x):
            parts = [part.data for part in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape, self._over_rows(()), parts)

        return jax.tree.map(joined, state)

    def put(self, batch: Batch) -> Batch:
        """A batch of this data shard's rows, of NumPy arrays, to where the step wants it."""
        if self.mode == "single":
            return jax.device_put(batch, self.devices[0])
        if self.mode == "pmap":
            # [devices, rows of each, ...]: those of this process's devices are here.
            local = self.rows // self.data_shards
            split = jax.tree.map(lambda x: x.reshape(local, -1, *x.shape[1:]), batch)
            return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._over_rows(AXIS), x), split)
        return jax.tree.map(self._put_rows, batch)

    def put_whole(self, batch: Batch) -> Batch:
        """A batch of all rows, the same in every process, split over the mesh as far as it divides."""
        layout = self.layout

        def put(x):
            place = layout.place(("batch", *[None] * (x.ndim - 1)), x.shape)
            return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

        return jax.tree.map(put, batch)

    def check(self, batch_size: int, seq_len: int, accumulate: int) -> None:
        """Raises UserError unless rows, and the positions of each, can be split over the devices and microbatches."""
        parts = self.rows
        cut = f"split over {counted(parts, 'device')}, {counted(accumulate, 'microbatch', 'microbatches')}"
        if self.layout and (stages := self.layout.size("stages")) > 1:
            microbatches = self.layout.spec.microbatches or stages
            parts = rows_unit(self.layout.spec.rules, self.layout.mesh.shape, microbatches)
            cut = f"{cut}, {microbatches} of the pipeline"
        if batch_size % (parts * accumulate):
            raise UserError(f"data.batch_size is {batch_size}: it must be a multiple of {parts * accumulate} ({cut})")
        self.check_seq_len(seq_len, "data.layout.seq_len")

    def check_seq_len(self, seq_len: int, field: str) -> None:
        """Raises UserError, naming the field, unless rows of so many positions can be split over the devices."""
        if self.layout and seq_len % (size := self.layout.size("positions")):
            raise UserError(f"{field} is {seq_len}: it must be a multiple of {size}, by train.mesh.sequence")

    def _over_rows(self, axis) -> NamedSharding:
        spec = PartitionSpec(axis) if axis else PartitionSpec()
        return NamedSharding(Mesh(np.asarray(self.devices), (AXIS,)), spec)

    def _put_rows(self, x: np.ndarray) -> jax.Array:
        shape = (x.shape[0] * self.data_shards, *x.shape[1:])
        place = self.layout.place(("batch", *[None] * (x.ndim - 1)), shape)
        if self.data_shards == 1:
            return jax.make_array_from_callback(shape, place, lambda index: x[index])
        size = shape[0] // self.rows
        mine = _blocks_by_process(self.layout)[jax.process_index()]

        def rows(index):
            start = mine.index((index[0].start or 0) // size) * size
            return x[start : start + size][(slice(None), *index[1:])]

        return jax.make_array_from_callback(shape, place, rows)


def build(mode: Mode, axes: Any, mesh: MeshSpec | None = None, devices: list | None = None) -> Parallel:
    """The wrapper of that name.

    Args:
        mode: "single", "pmap" or "sharded".
        axes: the names of the parameters' axes, `Model.axes()`.
        mesh: how devices are arranged where the mode is "sharded".
        devices: all there are, by default; "single" takes the first.

    Raises:
        UserError: the mesh does not come out even, or one device is asked for where there are several processes.
    """
    devices = tuple(devices or jax.devices())
    processes = sorted({device.process_index for device in devices})
    if mode == "single":
        require_many(mode, len(processes))
        return Parallel(mode, devices[:1], 1, 1, 0, None, axes)
    if mode == "pmap":
        return Parallel(mode, devices, len(devices), len(processes), jax.process_index(), None, axes)
    layout = sharding.arrange(mesh or MeshSpec(), devices)
    groups = sorted({blocks for blocks in _blocks_by_process(layout).values()})
    if sum(map(len, groups)) != layout.size("batch"):
        raise UserError(
            f"train.mesh ({layout.about()}) gives processes rows that overlap in part: let data and fsdp be multiples "
            "of the processes, or divide them"
        )
    here = _blocks_by_process(layout).get(jax.process_index(), groups[0])  # planned devices are of no process
    return Parallel(mode, devices, layout.size("batch"), len(groups), groups.index(here), layout, axes)


def require_many(mode: str, processes: int) -> None:
    """Raises UserError if so many processes cannot train in this mode."""
    if mode == "single" and processes > 1:
        raise UserError(f"train.parallel is 'single', and there are {processes} processes: choose 'sharded'")


def places(state: Any, axes: Any, layout: Layout) -> Any:
    """Where every leaf of a state lies: parameters by the names of their axes, and what mirrors one beside it.

    A leaf of the optimizer belongs to the parameter whose path its own ends with. Of the parameter's shape it is split
    like it; short of one axis, as a factored moment is (Adafactor, 1804.04235, section 3), like the axes that are left.
    """
    named = {}
    for path, names in jax.tree_util.tree_flatten_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))[0]:
        named[_keys(path)] = names
    shapes = {_keys(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]}

    def place(path, leaf):
        keys = _keys(path)
        owner = next((keys[i:] for i in range(len(keys)) if keys[i:] in named), None)
        if owner is None:
            return layout.replicated()
        names, shape = named[owner], shapes[owner]
        if leaf.shape == shape:
            return layout.place(names, shape)
        shorter = {names[:i] + names[i + 1 :] for i in range(len(shape)) if shape[:i] + shape[i + 1 :] == leaf.shape}
        return layout.place(shorter.pop(), leaf.shape) if len(shorter) == 1 else layout.replicated()

    return jax.tree_util.tree_map_with_path(place, state)


def _keys(path) -> tuple[str, ...]:
    """The keys of dicts along a path: of a parameter all of them, in an optimizer's state those at its end."""
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _blocks_by_process(layout: Layout) -> dict[int, tuple[int, ...]]:
    """By process, which parts of the rows its devices hold."""
    parts = layout.size("batch")
    held: dict[int, set[int]] = {}
    for device, (index,) in layout.place(("batch",), (parts,)).devices_indices_map((parts,)).items():
        held.setdefault(device.process_index, set()).add(index.start or 0)
    return {process: tuple(sorted(blocks)) for process, blocks in held.items()}
