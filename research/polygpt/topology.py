"""Compiling for TPUs ahead of time, on a machine that has none.

libtpu contains the TPU compiler, so programs can be compiled for any slice on any machine. Compiled text and memory are
real, but the program cannot run. The caller must select TPU kernels
(`attention.kernels.dispatch.compiling_for("tpu")`).
"""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies

from polygpt.errors import UserError

SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SHAPES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
SHAPES = {"v4": SHAPES_3D, "v5e": SHAPES_2D, "v5p": SHAPES_3D, "v6e": SHAPES_2D, "tpu7x": SHAPES_3D}
"""Slice shapes in chips, by generation; 3D slices may also have any three multiples of 4."""
UNITS_PER_CHIP = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1, "tpu7x": 2}
"""What the number in a name such as v5p-128 counts: cores of a chip, or chips (Cloud TPU's page of each generation)."""
MEGACORE = {"v4": {"chip_config_name": "megacore"}}
"""Generations whose two cores per chip act as one device, where that is not libtpu's own default."""
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask the cloud's metadata server, which does not answer elsewhere
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process on this machine stops at a lock file
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # these two: what it would ask for, and complain of
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Environment variables that libtpu reads when loaded."""


def devices(name: str, slices: int = 1) -> list[jax.Device]:
    """The devices of a slice such as "v5e:4x8", for meshes and shardings; they cannot hold arrays.

    Args:
        name: one of the shapes that the generation is offered in, see `SHAPES`.
        slices: number of slices, connected by the data-centre network.

    Raises:
        UserError: there is no such slice, or libtpu is not installed.
    """
    require(name)
    generation, _, shape = name.partition(":")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu, which is not installed: pip install -e '.[tpu]'")
    options = dict(MEGACORE.get(generation, {}))
    if shape == "1x1":  # one chip; the default is four per host
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        options["num_slices"] = slices
    jax.devices()  # initialize a local TPU before the environment hides it from libtpu
    try:
        with _environment():
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"TPU slice {name!r}: {str(error).splitlines()[0]}; {_accepted(generation)}") from error
    return list(found.devices)


def require(name: str) -> None:
    """Raises UserError unless a slice with that name exists; does not use libtpu."""
    generation, _, shape = name.partition(":")
    shapes = SHAPES.get(generation)
    if said := explain_name(name):
        raise UserError(f"no TPU slice is called {name!r}: {said}; {_accepted(_numbered(name)[0])}")
    # libtpu reads an empty name as v2, and accepts shapes that are not offered.
    if shapes is None:
        examples = ", ".join(f"{generation}:{shapes[1]}" for generation, shapes in SHAPES.items())
        raise UserError(f"no TPU slice is called {name!r}: accepted are GENERATION:SHAPE, such as {examples}")
    if shape not in shapes and not (shapes is SHAPES_3D and _multiples_of_4(shape)):
        raise UserError(f"no TPU slice is called {name!r}: {_accepted(generation)}")


def explain_name(name: str) -> str | None:
    """What a name that ends with a number, as Google's tools call slices, is here; None for any other name.

    "v5p-128" is "v5p-128 counts cores, 2 per chip: 64 chips are v5p:4x4x4".
    """
    generation, number = _numbered(name)
    if generation not in SHAPES or not number.isdecimal():
        return None
    each = UNITS_PER_CHIP[generation]
    chips, counts = int(number) // each, f"{name} counts " + ("chips" if each == 1 else f"cores, {each} per chip")
    shapes = [shape for shape in SHAPES[generation] if math.prod(map(int, shape.split("x"))) == chips]
    if int(number) % each or not shapes:
        return f"{counts}: no slice has that many"
    return f"{counts}: " + (f"{chips} chips are " if each > 1 else "it is ") + f"{generation}:{shapes[-1]}"


def _numbered(name: str) -> tuple[str, str]:
    generation, _, number = name.partition("-")
    return {"v5litepod": "v5e"}.get(generation, generation), number


def compile_for(name: str, function: Callable, *arguments: Any) -> jax.stages.Compiled:
    """`function` compiled for one device of the slice called `name`: its `as_text()`, `memory_analysis()`.

    Args:
        name: as of `devices`.
        function: what `jax.jit` takes, or has taken.
        arguments: pytrees of arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes matter.

    Raises:
        UserError: as `devices`. What the TPU compiler refuses is a `jax.errors.JaxRuntimeError`; RESOURCE_EXHAUSTED,
            with the figures, where the device's memory does not suffice.
    """
    mesh = jax.sharding.Mesh(devices(name)[:1], ("device",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    with jax.set_mesh(mesh):  # Pallas asks it what kind of TPU this is
        return compiled(jax.jit(function, out_shardings=place).lower(*shapes))


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """`lowered.compile()` for `devices`, bypassing the persistent cache, which cannot read its own entries for them."""
    setting = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, setting)
    jax.config.update(setting, float("inf"))
    try:
        return lowered.compile()
    finally:
        jax.config.update(setting, before)


def _accepted(generation: str) -> str:
    shapes = SHAPES[generation]
    more = ", three multiples of 4" if shapes is SHAPES_3D else ""
    return f"accepted for {generation} are {', '.join(shapes)}{more}"


def _multiples_of_4(shape: str) -> bool:
    return re.fullmatch(r"\d+x\d+x\d+", shape) is not None and all(int(n) and int(n) % 4 == 0 for n in shape.split("x"))


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Sets `ENVIRONMENT` while libtpu is loaded; existing values take precedence and are preserved."""
    added = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for variable in added:
            del os.environ[variable]
