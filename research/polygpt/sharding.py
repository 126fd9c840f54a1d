"""Where arrays lie on many devices: one table from the names of their axes to the axes of the mesh.

Modules name the axes of what they make, `("width", "hidden")`, and know nothing of devices. An experiment's `MeshSpec`
says how many devices each mesh axis has and which names are split over which. A program that is traced `using` a layout
is split by the compiler accordingly; traced without one, it is the same program for one device.

The idea of the table: GSPMD (2105.04663), and the "logical axes" of T5X and Flax.
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
"""The axes of the mesh. Those that talk least come first: neighbours along the last have the fastest links."""

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
"""The default table. Of parameters: vocabulary, width (the model's), hidden (of feed-forward layers), heads and
kv_heads (heads times their width), experts, layers (stacked). Of activations: rows, positions, features (the model's
width), and hidden, heads, kv_heads, vocabulary, experts, stages (of the pipeline)."""

RESIDUAL = ("batch", "positions", "features")
"""The axes of the stream that every block adds to."""
LOGITS = ("batch", "positions", "vocabulary")
"""The axes of predictions: no device ever holds those of the whole vocabulary where it is split."""

TOGETHER = (
    ("vocabulary", "width"),
    ("layers", "width", "hidden"),
    ("layers", "width", "heads"),
    ("layers", "width", "kv_heads"),
    ("layers", "experts", "width", "hidden"),
    ("batch", "positions", "vocabulary"),
    ("positions", "experts"),  # those of one device are computed for its own positions alone
    ("batch", "positions", "features"),
    ("batch", "positions", "hidden"),
    ("batch", "heads", "positions"),
    ("batch", "kv_heads", "positions"),
    ("stages", "positions", "features"),
    ("stages", "positions", "hidden"),
    ("stages", "heads", "positions"),
    ("stages", "kv_heads", "positions"),
)
"""Names that meet in one array: no mesh axis can split two of them."""


@dataclasses.dataclass(frozen=True)
class MeshSpec(Spec):
    """How many devices lie along each axis of the mesh, and what is split over which."""

    data: int = -1
    """Devices that hold whole copies of everything and share the rows; -1, on one axis at most, is what is left."""
    fsdp: int = 1
    """Devices that share the rows and split parameters and optimizer too: ZeRO stage 3 (1910.02054, section 5)."""
    tensor: int = 1
    """Devices that split heads, hidden widths and the vocabulary (Megatron-LM, 1909.08053, section 3)."""
    sequence: int = 1
    """Devices that split the positions of each row."""
    expert: int = 1
    """Devices that share the rows and split the experts of routed layers (GShard, 2006.16668, section 3)."""
    stage: int = 1
    """Devices that split the decoder's blocks into the stages of a pipeline (GPipe, 1811.06965)."""
    context: Literal["gather", "ring"] = "gather"
    """How attention sees positions of other devices: keys and values are gathered, which is quick, or travel in a ring,
    which needs no room for all of them (Ring Attention, 2310.01889)."""
    microbatches: int | None = None
    """Parts into which the pipeline cuts a batch; null means as many as stages. More of them idle less."""
    repeats: int = 1
    """How often a microbatch goes through all stages, each time through other blocks: the circular schedule
    (Narayanan et al., 2104.04473, section 2.2). More idle less and talk more."""
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(RULES))
    """The table: by name of an array's axis, the mesh axes that split it."""

    def validate(self):
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            self.require(size >= 1 or size == -1, axis, "at least 1, or -1 for what is left")
        if (free := [axis for axis, size in sizes.items() if size == -1])[1:]:
            raise SpecError(f"MeshSpec.{free[0]} and MeshSpec.{free[1]} are both -1: one alone can take what is left")
        self.require(self.microbatches is None or self.microbatches >= 1, "microbatches", "null or at least 1")
        self.require(self.repeats >= 1, "repeats", "at least 1")
        for name in self.rules:
            if name not in RULES:
                raise SpecError(f"MeshSpec.rules has no axis {name!r}: {nearest(name, RULES)}")
        for name in RULES:
            if name not in self.rules:
                raise SpecError(f"MeshSpec.rules lacks {name!r}: an axis that is not split has []")
        self._validate_collisions()

    def _validate_collisions(self):
        for name, axes in self.rules.items():
            for axis in axes:
                if axis not in AXES:
                    raise SpecError(f"MeshSpec.rules[{name!r}] names {axis!r}: {nearest(axis, AXES)}")
            if len(set(axes)) < len(axes):
                raise SpecError(f"MeshSpec.rules[{name!r}] names an axis twice: {', '.join(axes)}")
        for array in TOGETHER:
            for i, one in enumerate(array):
                for other in array[:i]:
                    if both := set(self.rules[one]) & set(self.rules[other]):
                        raise SpecError(
                            f"MeshSpec.rules splits {other!r} and {one!r} both over {both.pop()!r}, and an array has "
                            f"the axes [{', '.join(array)}]: give one of the two another mesh axis"
                        )

    def sizes(self, devices: int) -> dict[str, int]:
        """Devices along each axis, of `devices` in all. Raises UserError where that does not come out even."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        fixed = math.prod(size for size in sizes.values() if size > 0)
        free = [axis for axis, size in sizes.items() if size == -1]
        if devices % fixed or (not free and devices != fixed):
            raise UserError(self._uneven(fixed, devices, bool(free)))
        return sizes | dict.fromkeys(free, devices // fixed)

    def _uneven(self, fixed: int, devices: int, free: bool) -> str:
        """What to change where the axes ask for `fixed` devices and there are others."""
        large = {axis: getattr(self, axis) for axis in AXES if getattr(self, axis) > 1}
        wanted = ", ".join(f"{axis} {size}" for axis, size in large.items()) or "data 1"
        there = "there is 1" if devices == 1 else f"there are {devices}"
        asked = f"train.mesh asks for {counted(fixed, 'device')} ({wanted}), and {there}"
        if fixed > devices:
            more = f"polygpt launch local -n 1 --devices {fixed} -- train FILE ... makes as many on a CPU"
            return f"{asked}: make an axis smaller, or take more devices ({more})"
        for axis, size in large.items() if free else ():
            room, left = divmod(devices, fixed // size)  # what the other axes leave for it
            if not left:
                beside = ", ".join(f"{name} {other}" for name, other in large.items() if name != axis)
                what = f"the {devices} devices" + (f" beside {beside}" if beside else "")
                *others, last = [str(n) for n in range(1, room + 1) if room % n == 0]
                choices = f"{', '.join(others)} or {last}" if others else last
                return f"train.mesh.{axis} {size} does not divide {what}: choose {choices}"
        return f"{asked}: " + ("change one axis" if devices % fixed else "let one axis be -1, which takes what is left")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with its table: what a program for many devices is traced under.

    Attributes:
        mesh: the devices along `AXES`.
        spec: what it was made from.
    """

    mesh: Mesh
    spec: MeshSpec = MeshSpec()

    def names(self, logical: str) -> tuple[str, ...]:
        """The mesh axes, of more than one device, that split an axis of this name."""
        return tuple(axis for axis in self.spec.rules[logical] if self.mesh.shape[axis] > 1)

    def size(self, logical: str) -> int:
        """The number of parts that an axis of this name is split into."""
        return math.prod(self.mesh.shape[axis] for axis in self.names(logical))

    def axes(self, logical: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """How an array is split whose axes have these names; None is an axis that lies whole.

        An axis whose size the devices do not divide is split over as many leading mesh axes as do.
        """
        entries = []
        for name, size in zip(logical, shape, strict=True):
            names = () if name is None else self.names(name)
            while names and size % math.prod(self.mesh.shape[axis] for axis in names):
                names = names[:-1]
            entries.append(names if len(names) > 1 else names[0] if names else None)
        return PartitionSpec(*entries)

    def place(self, logical: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """`axes`, with the mesh."""
        return NamedSharding(self.mesh, self.axes(logical, shape))

    def replicated(self) -> NamedSharding:
        """A copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def about(self) -> str:
        """ "data 2, tensor 4": the axes of more than one device."""
        return ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1) or "data 1"


def arrange(spec: MeshSpec, devices: Sequence[jax.Device]) -> Layout:
    """The mesh of these devices: neighbours on the network become neighbours in it.

    Slices of TPUs, and hosts, are joined by slower links: the outermost axis that they divide goes across them.

    Raises:
        UserError: the axes do not come out even with the number of devices.
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
    return Layout(Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES)), spec)


def rows_unit(rules: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int], microbatches: int) -> int:
    """What the rows of a step have to be a multiple of: by mesh axis so many devices, microbatches of the pipeline.

    In the pipeline the devices of all stages hold parts of the same microbatch.
    """

    def parts(axes: Iterable[str]) -> int:
        return math.prod(sizes[axis] for axis in axes)

    return math.lcm(parts(rules["batch"]), microbatches * parts(set(rules["batch"]) - set(rules["stages"])))


_active: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def using(layout: Layout | None) -> Iterator[None]:
    """Lets what is traced meanwhile be split by this layout; None, as inside `shard_map`, lets it be for one device."""
    token = _active.set(layout)
    try:
        yield
    finally:
        _active.reset(token)


def active() -> Layout | None:
    """The layout that is being traced under."""
    return _active.get()


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """`x`, split by the active layout as the names of its axes say; unchanged where there is none."""
    layout = active()
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout.place(logical, x.shape))


def splits(logical: str) -> bool:
    """Whether the active layout splits axes of this name."""
    layout = active()
    return layout is not None and layout.size(logical) > 1


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else entry or ()


def tree(layout: Layout, shapes: Any, axes: Any) -> Any:
    """The place of every leaf: `shapes` has arrays or their shapes, `axes` a tuple of names for each."""
    return jax.tree.map(lambda leaf, names: layout.place(names, leaf.shape), shapes, axes)
