"""Checks of the installation, each with a remedy: versions, devices and their speed, folders and extras.

Third-party packages are imported only in the checks that need them, because a missing package is a finding.
"""

import dataclasses
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from polygpt.cache_folder import cache_folder

LITTLE, NOTHING = 5e9, 1e8
"""Bytes of free disk space below which a run may run out of space for checkpoints, or cannot start."""
EXTRAS = {
    "gpu": "JAX for NVIDIA GPUs",
    "tpu": "JAX for TPUs, and polygpt plan on any machine",
    "slurm": "polygpt launch slurm, and the SLURM engine of ablations",
    "ray": "the Ray engine of ablations",
    "tune": "polygpt tune",
    "tokamax": "more fused attention kernels on GPUs",
    "test": "the test suite",
    "parity": "tests against PyTorch and transformers",
}
"""What each extra is for."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A finding.

    Attributes:
        name: what was checked.
        status: "ok"; "note": something optional is missing or could be better; "broken": training needs it.
        found: description of the finding.
        remedy: how to fix it; "" if there is nothing to do.
    """

    name: str
    status: Literal["ok", "note", "broken"]
    found: str
    remedy: str = ""


def examine(seconds: float = 2.0, runs: str | Path = "runs") -> Iterator[tuple[Check, dict[str, Any]]]:
    """Yields each check with its machine-readable values.

    Args:
        seconds: total time for multiplying matrices.
        runs: parent folder of run folders, whose disk is checked.
    """
    yield _python()
    yield _packages()
    devices, figures = _devices()
    yield devices, figures
    if devices.status != "broken":
        yield from _speed(seconds)
    yield _media()
    yield _writable(cache_folder())
    yield _disk(Path(runs))
    for extra, about in EXTRAS.items():
        yield _extra(extra, about)


def _python() -> tuple[Check, dict]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    version = platform.python_version()
    found = f"{version}, {platform.system()} {platform.machine()}, {cores} CPU cores, {memory / 1e9:.0f} GB of memory"
    return Check("Python", "ok", found), {"python": version, "cores": cores, "memory_bytes": memory}


def _packages() -> tuple[Check, dict]:
    """Whether all requirements in pyproject.toml are installed in allowed versions."""
    try:
        faults = [fault for line in _required("polygpt") if (fault := _fault_of(line))]
    except metadata.PackageNotFoundError:
        faults = ["polygpt"]
    except ModuleNotFoundError as error:  # of the requirement parser
        faults = [str(error.name)]
    names = ("polygpt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = {name: version for name in names if (version := _version(name))}
    figures = {"versions": versions, "missing": faults}
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    if not faults:
        return Check("packages", "ok", found), figures
    return Check("packages", "broken", f"missing or too old: {', '.join(faults)}", "pip install -e ."), figures


def _devices() -> tuple[Check, dict]:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # JAX is missing or broken, or JAX_PLATFORMS names a missing platform
        said = " ".join(str(error).split())
        remedy = "unset JAX_PLATFORMS" if os.environ.get("JAX_PLATFORMS") else "pip install -e ."
        return Check("devices", "broken", f"JAX finds none: {type(error).__name__}: {said}", remedy), {"devices": []}
    found = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    statistics = (devices[0].memory_stats() or {}) if devices[0].platform != "cpu" else {}
    if limit := statistics.get("bytes_limit"):
        found += f", {limit / 1e9:.0f} GB each"
    figures = {"devices": [device.device_kind for device in devices], "platform": devices[0].platform}
    idle = _unused_hardware() if devices[0].platform == "cpu" else None
    if idle:
        kind, extra = idle
        return Check("devices", "note", f"{found}; this machine has a {kind}", f"pip install -e '.[{extra}]'"), figures
    return Check("devices", "ok", found), figures


def _unused_hardware() -> tuple[str, str] | None:
    """An accelerator that JAX does not see: its kind and the extra that enables it."""
    if os.environ.get("JAX_PLATFORMS") or os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # hidden on purpose
        return None
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return "GPU", "gpu"
    if any(Path(f"/dev/{name}").exists() for name in ("accel0", "accel/accel0", "vfio/0")):
        return "TPU", "tpu"
    return None


def _speed(seconds: float) -> Iterator[tuple[Check, dict]]:
    """Measures matrix multiplication on the first device, by dtype."""
    import jax

    dtypes = ("float32", "bfloat16")
    width = 1024 if jax.devices()[0].platform == "cpu" else 8192
    for dtype in dtypes:
        rate, right = _rate(dtype, width, seconds / len(dtypes))
        figures = {f"gflops_{dtype}": rate}
        if right:
            said = f"{rate:,.0f} GFLOP/s, matmul of {width} x {width} matrices"
            yield Check(f"matmul {dtype}", "ok", said), figures
        else:
            remedy = "update the device's driver, or try another version of jax"
            yield Check(f"matmul {dtype}", "broken", "the device computes wrong results", remedy), figures


def _rate(dtype: str, width: int, seconds: float) -> tuple[float, bool]:
    """GFLOP/s of multiplying [width, width] matrices, and whether the result is right."""
    import jax
    import jax.numpy as jnp

    left = jnp.full((width, width), 0.5, dtype)
    right = jnp.eye(width, dtype=dtype)
    multiply = jax.jit(jnp.matmul)
    product = multiply(left, right).block_until_ready()  # compiles
    is_right = bool(jnp.all(product == left))  # 0.5 * 1 + 0 + ... is exact in every dtype
    times, begin = 0, time.perf_counter()
    while times == 0 or time.perf_counter() - begin < seconds:
        multiply(left, right).block_until_ready()
        times += 1
    return 2 * width**3 * times / (time.perf_counter() - begin) / 1e9, is_right


def _media() -> tuple[Check, dict]:
    """Whether the media decoders work; both wrap shared libraries."""
    try:
        import soundfile
        from PIL import features

        images = ["PNG", *(name for name, key in (("JPEG", "jpg"), ("WebP", "webp")) if features.check(key))]
        audio = [name for name in ("WAV", "FLAC", "OGG", "MP3") if name in soundfile.available_formats()]
    except (ImportError, OSError) as error:
        said = " ".join(str(error).split())
        return Check(
            "media", "broken", f"cannot decode media: {said}", "pip install --force-reinstall soundfile pillow"
        ), {}
    return Check("media", "ok", f"reads {', '.join([*images, *audio])}"), {"media": [*images, *audio]}


def _writable(folder: Path) -> tuple[Check, dict]:
    figures = {"cache": str(folder)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"polygpt")
    except OSError as error:
        remedy = "set POLYGPT_CACHE to a writable folder"
        return Check("cache folder", "broken", f"{folder}: {error.strerror}", remedy), figures
    return Check("cache folder", "ok", f"{folder}, {_free(folder) / 1e9:,.0f} GB free"), figures


def _disk(runs: Path) -> tuple[Check, dict]:
    folder = next(place for place in (runs.absolute(), *runs.absolute().parents) if place.is_dir())
    free = _free(folder)
    status = "broken" if free < NOTHING else "note" if free < LITTLE else "ok"
    remedy = "" if status == "ok" else "free some space, or train with --workdir on another disk"
    if not os.access(folder, os.W_OK):
        status, remedy = "broken", "change to a writable folder, or train with --workdir"
    return Check("run folders", status, f"{runs}, {free / 1e9:,.1f} GB free", remedy), {"free_bytes": free}


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _extra(extra: str, about: str) -> tuple[Check, dict]:
    try:
        lines = _required("polygpt", extra)
        installed = bool(lines) and not any(map(_fault_of, lines))
    except (metadata.PackageNotFoundError, ModuleNotFoundError):
        installed = False
    figures = {"extra": extra, "installed": installed}
    if installed:
        return Check(f"extra {extra}", "ok", f"installed: {about}"), figures
    return Check(f"extra {extra}", "note", f"not installed: {about}", f"pip install -e '.[{extra}]'"), figures


def _required(package: str, extra: str | None = None) -> list[Any]:
    """The requirements of an installed package or one of its extras that apply to this interpreter.

    Raises:
        PackageNotFoundError: the package is not installed.
    """
    from packaging.requirements import Requirement

    every = [Requirement(line) for line in metadata.requires(package) or ()]
    if extra is None:
        return [one for one in every if not one.marker or one.marker.evaluate({"extra": ""})]
    with_it = [one for one in every if one.marker and one.marker.evaluate({"extra": extra})]
    return [one for one in with_it if not one.marker.evaluate({"extra": ""})]


def _fault_of(requirement: Any) -> str | None:
    """The requirement as text if it (or one of its extras) is not met; None if it is."""
    version = _version(requirement.name)
    if version is None or not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name}{requirement.specifier}"
    for extra in requirement.extras:
        if any(map(_fault_of, _required(requirement.name, extra))):
            return f"{requirement.name}[{extra}]"
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
