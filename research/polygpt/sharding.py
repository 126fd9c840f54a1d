"""Sharding: a table that maps logical axis names of arrays to mesh axes.

Modules name the axes of their arrays, such as `("width", "hidden")`, and are independent of devices. An experiment's
`MeshSpec` sets the size of each mesh axis and which logical axes are split over which. The compiler partitions programs
traced under a layout accordingly; without a layout, the same program runs on one device.

The table follows GSPMD (2105.04663) and the "logical axes" of T5X and Flax.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from polygpt.errors import SpecError, UserError
from polygpt.spec import Spec, counted, nearest

AXES = ("stage", "data", "fsdp", "expert", "sequence", "tensor")
"""The mesh axes. Axes with the least communication come first: neighbours along the last have the fastest links."""

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert", "stage"),
    "positions": ("sequence",),
    "features": (),
    "vocabulary": ("tensor",),
    "width": ("fsdp",),
    "hidden": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "experts": ("expert",),
    "layers": ("stage",),
    "stages": ("stage",),
}
"""The default table. Parameter axes: vocabulary, width (of the model), hidden (of feed-forward layers), heads and
kv_heads (number of heads times head width), experts, layers (stacked). Activation axes: batch, positions, features (the
model width), and hidden, heads, kv_heads, vocabulary, experts, stages (of the pipeline)."""

RESIDUAL = ("batch", "positions", "features")
"""The axes of the residual stream."""
LOGITS = ("batch", "positions", "vocabulary")
"""The axes of logits: if the vocabulary is split, no device ever holds all of them."""

ARRAY_AXES = (
    ("vocabulary", "width"),
    ("layers", "width", "hidden"),
    ("layers", "width", "heads"),
    ("layers", "width", "kv_heads"),
    ("layers", "experts", "width", "hidden"),
    ("batch", "positions", "vocabulary"),
    ("positions", "experts"),  # each device computes its experts only for its own positions
    ("batch", "positions", "features"),
    ("batch", "positions", "hidden"),
    ("batch", "heads", "positions"),
    ("batch", "kv_heads", "positions"),
    ("stages", "positions", "features"),
    ("stages", "positions", "hidden"),
    ("stages", "heads", "positions"),
    ("stages", "kv_heads", "positions"),
)
"""Logical axes that occur in one array: no mesh axis may split two of them."""


@dataclasses.dataclass(frozen=True)
class MeshSpec(Spec):
    """The number of devices along each mesh axis, and what is split over which axis."""

    data: int = -1
    """Data parallelism: devices split the rows and replicate parameters. One axis may be -1: all remaining devices."""
    fsdp: int = 1
    """Fully sharded data parallelism: devices split the rows, and parameters and optimizer state as well: ZeRO stage 3
    (1910.02054, section 5)."""
    tensor: int = 1
    """Tensor parallelism: devices split heads, hidden widths and vocabulary (Megatron-LM, 1909.08053, section 3)."""
    sequence: int = 1
    """Sequence parallelism: devices split the positions of each row."""
    expert: int = 1
    """Expert parallelism: devices split the rows, and the experts of routed layers (GShard, 2006.16668, section 3)."""
    stage: int = 1
    """Pipeline parallelism: devices split the decoder's blocks into stages (GPipe, 1811.06965)."""
    context: Literal["gather", "ring"] = "gather"
    """Attention across sequence-parallel devices: all-gather keys and values, which is faster, or pass them around a
    ring, which needs less memory (Ring Attention, 2310.01889)."""
    order: Literal["auto", "contiguous", "zigzag"] = "auto"
    """Which positions of a row a sequence-parallel device holds in the decoder's blocks: successive ones, or in zigzag
    order chunks i and 2 n - 1 - i of 2 n, so that all devices have the same share of causal attention (2407.21783,
    section 3.3.2). auto: zigzag for rows of at least 512 positions in which a block sees all earlier ones, unless a
    block needs the order of the row; not on TPUs, whose compiler fails at some such steps."""
    reduce_dtype: Literal["compute", "float32"] = "compute"
    """How devices sum the gradients of linear layers: in the compute dtype of the model, or in float32, which sends
    twice as many bytes as bfloat16 but rounds once, after the sum over all devices."""
    microbatches: int | None = None
    """Number of pipeline microbatches per batch; null for the number of stages. More microbatches shrink the bubble."""
    repeats: int = 1
    """How often a microbatch passes through all stages, each time through different blocks: the circular schedule
    (Narayanan et al., 2104.04473, section 2.2). More repeats shrink the bubble but add communication."""
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(RULES))
    """The table: for each logical axis, the mesh axes that split it."""

    def validate(self):
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            self.require(size >= 1 or size == -1, axis, "at least 1, or -1 for all remaining devices")
        if (free := [axis for axis, size in sizes.items() if size == -1])[1:]:
            raise SpecError(f"MeshSpec.{free[0]} and MeshSpec.{free[1]} are both -1: only one axis may be -1")
        self.require(self.microbatches is None or self.microbatches >= 1, "microbatches", "null or at least 1")
        self.require(self.repeats >= 1, "repeats", "at least 1")
        for name in self.rules:
            if name not in RULES:
                raise SpecError(f"MeshSpec.rules has no axis {name!r}: {nearest(name, RULES)}")
        for name in RULES:
            if name not in self.rules:
                raise SpecError(f"MeshSpec.rules lacks {name!r}: use [] for an axis that is not split")
        self._validate_collisions()

    def _validate_collisions(self):
        for name, axes in self.rules.items():
            for axis in axes:
                if axis not in AXES:
                    raise SpecError(f"MeshSpec.rules[{name!r}] names {axis!r}: {nearest(axis, AXES)}")
            if len(set(axes)) < len(axes):
                raise SpecError(f"MeshSpec.rules[{name!r}] names an axis twice: {', '.join(axes)}")
        for array in ARRAY_AXES:
            for i, one in enumerate(array):
                for other in array[:i]:
                    if both := set(self.rules[one]) & set(self.rules[other]):
                        raise SpecError(
                            f"MeshSpec.rules splits {other!r} and {one!r} both over {both.pop()!r}, but there are "
                            f"arrays with the axes [{', '.join(array)}]: choose another mesh axis for one of them"
                        )

    def sizes(self, devices: int) -> dict[str, int]:
        """The number of devices along each axis. Raises UserError if `devices` cannot be divided accordingly."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        fixed = math.prod(size for size in sizes.values() if size > 0)
        free = [axis for axis, size in sizes.items() if size == -1]
        if devices % fixed or (not free and devices != fixed):
            raise UserError(self._uneven(fixed, devices, bool(free)))
        return sizes | dict.fromkeys(free, devices // fixed)

    def _uneven(self, fixed: int, devices: int, free: bool) -> str:
        """The message if the axes ask for `fixed` devices but `devices` are available."""
        large = {axis: getattr(self, axis) for axis in AXES if getattr(self, axis) > 1}
        wanted = ", ".join(f"{axis} {size}" for axis, size in large.items()) or "data 1"
        there = "there is 1" if devices == 1 else f"there are {devices}"
        asked = f"train.mesh asks for {counted(fixed, 'device')} ({wanted}), but {there}"
        if fixed > devices:
            more = f"polygpt launch local -n 1 --devices {fixed} -- train FILE ... simulates them on a CPU"
            return f"{asked}: make an axis smaller, or use more devices ({more})"
        for axis, size in large.items() if free else ():
            room, left = divmod(devices, fixed // size)  # devices that the other axes leave for this one
            if not left:
                beside = ", ".join(f"{name} {other}" for name, other in large.items() if name != axis)
                what = f"the {devices} devices" + (f" with {beside}" if beside else "")
                *others, last = [str(n) for n in range(1, room + 1) if room % n == 0]
                choices = f"{', '.join(others)} or {last}" if others else last
                return f"train.mesh.{axis} {size} does not divide {what}: choose {choices}"
        return f"{asked}: " + ("change an axis" if devices % fixed else "set one axis to -1 to use all devices")


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """A mesh and its table, under which a program for many devices is traced.

    Attributes:
        mesh: the devices along `AXES`.
        spec: the specification.
        zigzag: whether the positions of the arrays being traced are in zigzag order (`attention/zigzag.py`).
    """

    mesh: Mesh
    spec: MeshSpec = MeshSpec()
    zigzag: bool = False

    def names(self, logical: str) -> tuple[str, ...]:
        """The mesh axes with more than one device that split this logical axis."""
        return tuple(axis for axis in self.spec.rules[logical] if self.mesh.shape[axis] > 1)

    def size(self, logical: str) -> int:
        """The number of shards of this logical axis."""
        return math.prod(self.mesh.shape[axis] for axis in self.names(logical))

    def partition_spec(self, logical: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """The partitioning of an array with these logical axes; None for an axis that is not split.

        If the devices do not divide the size of an axis, it is split over as many leading mesh axes as possible.
        """
        entries = []
        for name, size in zip(logical, shape, strict=True):
            names = () if name is None else self.names(name)
            while names and size % math.prod(self.mesh.shape[axis] for axis in names):
                names = names[:-1]
            entries.append(names if len(names) > 1 else names[0] if names else None)
        return PartitionSpec(*entries)

    def local_shape(self, logical: Sequence[str | None], shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each device's part of an array with these logical axes."""
        entries = map(mesh_axes, self.partition_spec(logical, shape))
        parts = (math.prod(self.mesh.shape[axis] for axis in entry) for entry in entries)
        return tuple(size // count for size, count in zip(shape, parts, strict=True))

    def sharding(self, logical: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """The sharding of an array with these logical axes."""
        return NamedSharding(self.mesh, self.partition_spec(logical, shape))

    def replicated(self) -> NamedSharding:
        """The sharding with a copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def summary(self) -> str:
        """The axes with more than one device, such as "data 2, tensor 4"."""
        return ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1) or "data 1"


def make_layout(spec: MeshSpec, devices: Sequence[jax.Device]) -> MeshLayout:
    """The mesh of these devices, with network neighbours adjacent.

    TPU slices and hosts are connected by slower links, so the outermost axis that they divide runs across them.

    Raises:
        UserError: if the number of devices does not fit the axes.
    """
    sizes = spec.sizes(len(devices))
    shape = tuple(sizes[axis] for axis in AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu" or len(devices) == 1:
        grid = np.asarray(devices).reshape(shape)
    elif slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        across = next((i for i, size in enumerate(shape) if size % slices == 0), None)
        if across is None:
            raise UserError(f"train.mesh: no axis is a multiple of the {slices} slices: make data or stage one")
        outer = tuple(slices if i == across else 1 for i in range(len(shape)))
        inner = tuple(size // slices if i == across else size for i, size in enumerate(shape))
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return MeshLayout(Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES)), spec)


def row_multiple(rules: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int], microbatches: int) -> int:
    """The batch size must be a multiple of this, given the sizes of the mesh axes and the pipeline's microbatches.

    In the pipeline, the devices of all stages hold parts of the same microbatch.
    """

    def parts(axes: Iterable[str]) -> int:
        return math.prod(sizes[axis] for axis in axes)

    return math.lcm(parts(rules["batch"]), microbatches * parts(set(rules["batch"]) - set(rules["stages"])))


_active: ContextVar[MeshLayout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def use_layout(layout: MeshLayout | None) -> Iterator[None]:
    """Traces under this layout; None, as inside `shard_map`, traces for a single device."""
    token = _active.set(layout)
    try:
        yield
    finally:
        _active.reset(token)


def active() -> MeshLayout | None:
    """The layout of the current trace, or None."""
    return _active.get()


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrains the sharding of `x` by its logical axes under the active layout; does nothing without a layout."""
    layout = active()
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout.sharding(logical, x.shape))


def is_split(logical: str) -> bool:
    """Whether the active layout splits this logical axis."""
    layout = active()
    return layout is not None and layout.size(logical) > 1


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else entry or ()


def tree_shardings(layout: MeshLayout, shapes: Any, axes: Any) -> Any:
    """The sharding of every leaf; `shapes` contains arrays or their shapes, `axes` a tuple of logical axes for each."""
    return jax.tree.map(lambda leaf, names: layout.sharding(names, leaf.shape), shapes, axes)
