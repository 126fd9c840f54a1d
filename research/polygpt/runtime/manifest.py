"""The manifest of a checkpoint: what is in its folder, to the byte. It is written last: what has none is half-written.

`manifest.json` names every file of the folder with its size and CRC-32, and bears a CRC-32 of itself. A CRC-32 finds
every flipped bit and every run of up to 32, and all else but one change in four billion, at gigabytes a second on one
core: damage by chance, not by intent.
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


class HalfWritten(Damaged):
    """There is no manifest: whoever wrote the checkpoint did not come to its end."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of a checkpoint without reading it.

    Attributes:
        step: batches consumed.
        metric: the run's metric there; None if it was not evaluated.
        finite: whether all parameters are finite.
    """

    step: int
    metric: float | None
    finite: bool


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What was written.

    Attributes:
        record: what rotation goes by.
        processes: how many processes wrote it.
        files: size and CRC-32 of each file, by its path in the folder.
    """

    record: Record
    processes: int
    files: dict[str, tuple[int, int]]


def seal(place: Path, record: Record, processes: int) -> None:
    """Writes the manifest of a folder in which all else is written. When this returns, all of it is on the disk."""
    paths = sorted(path for path in place.rglob("*") if path.is_file())
    with ThreadPoolExecutor(THREADS) as pool:
        sums = pool.map(functools.partial(_size_and_checksum, to_disk=True), paths)
        files = {path.relative_to(place).as_posix(): found for path, found in zip(paths, sums, strict=True)}
    for folder in {path.parent for path in paths}:
        _to_disk(folder)
    _write(place, Manifest(record, processes, files))
    _to_disk(place.parent)


def rerecord(place: Path, record: Record) -> None:
    """Writes the manifest anew with another record, the files as they were. Raises Damaged as `read`."""
    _write(place, dataclasses.replace(read(place), record=record))


def _write(place: Path, manifest: Manifest) -> None:
    body = {**dataclasses.asdict(manifest.record), "processes": manifest.processes, "files": manifest.files}
    write_atomically(place / NAME, json.dumps({"checksum": _of(body), **body}, indent=1) + "\n")
    _to_disk(place / NAME)
    _to_disk(place)


def read(place: Path) -> Manifest:
    """The manifest of a checkpoint. Raises HalfWritten if it has none, Damaged if it is not as it was written."""
    try:
        body = json.loads((place / NAME).read_bytes())
        if body.pop("checksum") != _of(body) or str(body["step"]) != place.name:
            raise Damaged(f"{NAME} is not as it was written")
        record = Record(**{field.name: body[field.name] for field in dataclasses.fields(Record)})
        return Manifest(record, body["processes"], {name: tuple(pair) for name, pair in body["files"].items()})
    except FileNotFoundError:
        raise HalfWritten(f"it is half-written, without {NAME}") from None
    except OSError as error:
        raise Damaged(f"{NAME} cannot be read: {os.strerror(error.errno)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{NAME} is not as it was written") from None


def verify(place: Path, items: Collection[str] | None = None, share: tuple[int, int] = (0, 1)) -> None:
    """Compares a checkpoint with its manifest, every byte once.

    Args:
        place: its folder.
        items: the parts ("params", "ema") that will be read; of the others the sizes alone are compared. None: all.
        share: (i, n): reads only every n-th file from the i-th on; n processes together see them all.

    Raises:
        Damaged: naming the first files that are missing, cut off or changed.
    """
    files = sorted(read(place).files.items())[share[0] :: share[1]]
    with ThreadPoolExecutor(THREADS) as pool:
        faults = [fault for fault in pool.map(lambda file: _fault(place, *file, items), files) if fault]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise Damaged(", ".join(faults[:3]) + more)


def verified_by_all(place: Path, items: Collection[str] | None = None) -> str:
    """What is wrong with a checkpoint, "" if nothing: `verify`, of whose work each process does a share."""
    try:
        verify(place, items, (jax.process_index(), jax.process_count()))
        fault = ""
    except Damaged as damage:
        fault = str(damage)
    return first_fault(f"verified {place.name}", fault)


def survey(folder: Path) -> Iterator[tuple[int, Record | Damaged]]:
    """Each step in a folder of checkpoints, in order, with its record or what is wrong with its manifest."""
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
        if to_disk:  # also where a quota or a remote disk says late that it is full
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
