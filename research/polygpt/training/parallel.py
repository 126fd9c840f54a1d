"""The pure step on one device, or on rows split over many: three wrappers with the same results."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from polygpt.attention.kernels.dispatch import rows_over
from polygpt.errors import UserError
from polygpt.sequence import Batch
from polygpt.training.compilation import compiler_options

AXIS = "data"
"""The mesh axis over which rows are split."""

Mode = Literal["single", "pmap", "sharded"]


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A way to run the step; `build` makes one.

    Attributes:
        mode: its name.
        devices: how many devices share the rows.
        state_sharding: where every leaf of the state lies (on all of them, whole).
        compile: a function of `reduce` and `shard` that makes a step (`make_step`), to a compiled step. The state that
            the step is given is donated: it is gone afterwards.
        put: a NumPy batch of this process's rows to where the step wants it.
    """

    mode: Mode
    devices: int
    state_sharding: jax.sharding.Sharding
    compile: Callable[[Callable], Callable]
    put: Callable[[Batch], Batch]

    def create(self, function: Callable) -> Any:
        """The tree that `function()` gives, made where the state lies."""
        return jax.jit(function, out_shardings=self.state_sharding)()

    def abstract(self, function: Callable) -> Any:
        """Shapes, dtypes and places of what `create` would give."""
        place = functools.partial(jax.ShapeDtypeStruct, sharding=self.state_sharding)
        return jax.tree.map(lambda x: place(x.shape, x.dtype), jax.eval_shape(function))

    def check_rows(self, rows: int, accumulate: int) -> None:
        """Raises UserError unless `rows` can be split over the devices, and each share into microbatches."""
        if rows % (self.devices * accumulate):
            raise UserError(
                f"data.rows is {rows}: it must be a multiple of {self.devices * accumulate} "
                f"({self.devices} devices, {accumulate} microbatches)"
            )


def build(mode: Mode, devices: list | None = None) -> Parallel:
    """The wrapper of that name, over the given devices (all, or the first for `single`)."""
    devices = devices or jax.devices()
    mesh = Mesh(np.asarray(devices), (AXIS,))
    rows, whole = NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())
    if mode == "single":
        place = SingleDeviceSharding(devices[0])
        return Parallel(mode, 1, place, _compile_one, lambda batch: jax.device_put(batch, place))
    put = functools.partial(jax.tree.map, functools.partial(jax.make_array_from_process_local_data, rows))
    if mode == "sharded":
        compile = functools.partial(_compile_sharded, rows=rows, whole=whole)
        return Parallel(mode, len(devices), whole, compile, put)

    local = len(mesh.local_devices)

    def put_by_device(batch: Batch) -> Batch:
        return put(jax.tree.map(lambda x: x.reshape(local, -1, *x.shape[1:]), batch))

    return Parallel(mode, len(devices), whole, functools.partial(_compile_pmap, devices=devices), put_by_device)


def _compile_one(make_step: Callable) -> Callable:
    return jax.jit(make_step(), donate_argnums=0, compiler_options=compiler_options())


def _compile_sharded(make_step: Callable, rows, whole) -> Callable:
    # One program sees the whole batch; the compiler splits it and puts in the sums over devices, kernels excepted.
    step = make_step()

    def step_over_rows(state, batch):
        with rows_over(rows.mesh, AXIS):
            return step(state, batch)

    return jax.jit(
        step_over_rows,
        in_shardings=(whole, rows),
        out_shardings=whole,
        donate_argnums=0,
        compiler_options=compiler_options(),
    )


def _compile_pmap(make_step: Callable, devices) -> Callable:
    step = make_step(reduce=lambda tree: jax.lax.psum(tree, AXIS), shard=lambda: jax.lax.axis_index(AXIS))
    # The state goes in and comes out whole (axis None): pmap is jit with shard_map inside and keeps it on every device.
    return jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=(None, None), donate_argnums=0, devices=devices)
