"""The manifest of a checkpoint lists its files with checksums. Written last: a checkpoint without one is incomplete.

`manifest.json` lists every file with its size and CRC-32, and has a CRC-32 of itself. A CRC-32 detects every single
flipped bit, every burst of up to 32 bits, and all but one in four billion other changes, at gigabytes per second on one
core. It protects against accidental damage, not tampering.
"""

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from polygpt.files import write_atomically
from polygpt.runtime.processes import first_fault

NAME = "manifest.json"
THREADS = 4
BLOCK = 1 << 22


class Damaged(Exception):
    """What is wrong with a checkpoint, in one line."""


class Incomplete(Damaged):
    """There is no manifest: the checkpoint was not completed."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Metadata of a checkpoint.

    Attributes:
        step: batches consumed.
        metric: the run's metric; None if not evaluated.
        finite: whether all parameters are finite.
    """

    step: int
    metric: float | None
    finite: bool


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    Attributes:
        record: metadata that rotation uses.
        processes: number of processes that wrote it.
        files: size and CRC-32 of each file, by path in the folder.
    """

    record: Record
    processes: int
    files: dict[str, tuple[int, int]]


def seal(place: Path, record: Record, processes: int) -> None:
    """Writes the manifest of an otherwise complete folder. When it returns, everything is on disk."""
    paths = sorted(path for path in place.rglob("*") if path.is_file())
    with ThreadPoolExecutor(THREADS) as pool:
        sums = pool.map(functools.partial(_size_and_checksum, to_disk=True), paths)
        files = {path.relative_to(place).as_posix(): found for path, found in zip(paths, sums, strict=True)}
    for folder in {path.parent for path in paths}:
        _to_disk(folder)
    _write(place, Manifest(record, processes, files))
    _to_disk(place.parent)


def update_record(place: Path, record: Record) -> None:
    """Rewrites the manifest with another record and the same files. Raises Damaged like `read`."""
    _write(place, dataclasses.replace(read(place), record=record))


def _write(place: Path, manifest: Manifest) -> None:
    body = {**dataclasses.asdict(manifest.record), "processes": manifest.processes, "files": manifest.files}
    write_atomically(place / NAME, json.dumps({"checksum": _of(body), **body}, indent=1) + "\n")
    _to_disk(place / NAME)
    _to_disk(place)


def read(place: Path) -> Manifest:
    """Reads the manifest of a checkpoint. Raises Incomplete if it is missing, Damaged if it has changed."""
    try:
        body = json.loads((place / NAME).read_bytes())
        if body.pop("checksum") != _of(body) or str(body["step"]) != place.name:
            raise Damaged(f"{NAME} is not as it was written")
        record = Record(**{field.name: body[field.name] for field in dataclasses.fields(Record)})
        return Manifest(record, body["processes"], {name: tuple(pair) for name, pair in body["files"].items()})
    except FileNotFoundError:
        raise Incomplete(f"incomplete, without {NAME}") from None
    except OSError as error:
        raise Damaged(f"{NAME} cannot be read: {os.strerror(error.errno)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{NAME} is not as it was written") from None


def verify(place: Path, items: Collection[str] | None = None, share: tuple[int, int] = (0, 1)) -> None:
    """Compares a checkpoint with its manifest, reading every byte once.

    Args:
        place: folder of the checkpoint.
        items: parts to read ("params", "ema"); for others only sizes are compared. None: all.
        share: (i, n): reads every n-th file starting at i, so that n processes together read all.

    Raises:
        Damaged: names the first files that are missing, truncated or changed.
    """
    files = sorted(read(place).files.items())[share[0] :: share[1]]
    with ThreadPoolExecutor(THREADS) as pool:
        faults = [fault for fault in pool.map(lambda file: _fault(place, *file, items), files) if fault]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise Damaged(", ".join(faults[:3]) + more)


def verified_by_all(place: Path, items: Collection[str] | None = None) -> str:
    """Runs `verify`, shared between all processes; returns what is wrong, "" if nothing."""
    try:
        verify(place, items, (jax.process_index(), jax.process_count()))
        fault = ""
    except Damaged as damage:
        fault = str(damage)
    return first_fault(f"verified {place.name}", fault)


def survey(folder: Path) -> Iterator[tuple[int, Record | Damaged]]:
    """Yields each step in a checkpoint folder, in order, with its record or the fault of its manifest."""
    for place in sorted(
        (place for place in folder.glob("*") if place.name.isdigit()), key=lambda place: int(place.name)
    ):
        try:
            yield int(place.name), read(place).record
        except Damaged as damage:
            yield int(place.name), damage


def records(folder: Path) -> list[Record]:
    """The checkpoints in a folder that have a manifest, oldest first."""
    return [found for _, found in survey(folder) if isinstance(found, Record)]


def _fault(place: Path, name: str, expected: tuple[int, int], items: Collection[str] | None) -> str | None:
    size, checksum = expected
    try:
        found = (place / name).stat().st_size
        if found != size:
            return f"{name} has {found:,} bytes of {size:,}"
        if (items is None or name.split("/")[0] in items) and _size_and_checksum(place / name)[1] != checksum:
            return f"{name} is not as it was written"
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {os.strerror(error.errno)}"
    return None


def _size_and_checksum(path: Path, to_disk: bool = False) -> tuple[int, int]:
    size, checksum, buffer = 0, 0, memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size, checksum = size + count, zlib.crc32(buffer[:count], checksum)
        if to_disk:  # quotas and remote disks may report a full disk only now
            os.fsync(file.fileno())
    return size, checksum


def _of(body: dict) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
