"""Cached log-probabilities of each example under a model, written once and read in training instead of running it.

A folder has `scores.json` (what was scored, by which model, with which tokenizer) and, for every `SHARD` examples of a
task, two NumPy files: an index with a record per example, and a record per scored token, which are read when needed.
Each shard is written atomically, so that writing resumes after an interruption. The index has a digest of the example,
by which changed examples are recognised, and a checksum of its tokens' records. Media in files count by name and size.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polygpt.data.example import Example, Text
from polygpt.data.layout import AS_READ
from polygpt.data.packing import Row
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.errors import BadRecord, UserError
from polygpt.sequence import PREFERENCE, TEXT, top_ids, top_log_p

FORMAT = 1
"""The format that this version writes."""
MANIFEST = "scores.json"
SHARD = 1024
"""Examples per file; another number is another format."""
INDEX = np.dtype([("digest", "<u8"), ("checksum", "<u4"), ("first", "<i8"), ("count", "<i4")])
"""Of an example: its identity, a checksum, and where its tokens are. A count of -1 marks an unusable record."""
OPEN = 256
"""Indexes in memory at a time."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the scores of a folder are of. Resuming needs an equal one.

    Attributes:
        model: the model that gave them: its run and step.
        fingerprint: a digest of its parameters.
        tokenizer: the fingerprint of the tokenizer whose tokens have scores.
        vocabulary: its number of ids.
        aligned: whether the model has another tokenizer, so that scores are of spans of bytes.
        top: number of likely tokens per position, 0 for none.
        layout: fields of the layout that change what a model reads.
        tasks: number of examples of each task.
        complete: whether all examples have been scored.
    """

    model: str
    fingerprint: str
    tokenizer: str
    vocabulary: int
    aligned: bool
    top: int
    layout: Mapping[str, Any]
    tasks: Mapping[str, int]
    complete: bool = False

    def shards(self) -> Iterator[tuple[str, int]]:
        """Each task with the number of each of its shards."""
        for task, examples in self.tasks.items():
            for number in range(-(-examples // SHARD)):
                yield task, number

    def examples(self, task: str, number: int) -> range:
        """The examples of a shard."""
        return range(number * SHARD, min((number + 1) * SHARD, self.tasks[task]))

    @property
    def record(self) -> np.dtype:
        """Of a scored token: its log-probability and, with `top`, the likely tokens and their log-probabilities."""
        likely = [("ids", "<u4", (self.top,)), ("top", "<f4", (self.top,))] if self.top else []
        return np.dtype([("log_p", "<f4"), *likely])


def layout_fields(layout) -> dict[str, Any]:
    """The fields of a `LayoutSpec` that change what is scored of an example."""
    return {name: getattr(layout, name) for name in (*AS_READ, "pairs")}


def scored(row: Row) -> np.ndarray:
    """bool [t]: where a token is predicted that an objective scores."""
    signs = row.extra.get(PREFERENCE)
    return row.weight != 0 if signs is None else (row.weight != 0) | (signs != 0)


def digest(example: Example, row: Row) -> int:
    """The identity of an example and of its tokens: what must not change between scoring and training."""
    found = hashlib.blake2b(digest_size=8)
    for part in example.parts:
        if isinstance(part, Text):
            continue  # its tokens count
        source = part.source
        if not isinstance(source, bytes):
            source = f"{source.name} {source.stat().st_size if source.exists() else 0}".encode()
        found.update(hashlib.blake2b(source, digest_size=8).digest() + part.modality.encode())
    text = row.modality == TEXT
    own = np.concatenate([[False], scored(row)[:-1]])
    for array in (row.tokens[text], row.segment[text], own[text]):
        found.update(array.tobytes())
    return int.from_bytes(found.digest(), "little")


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder. Raises UserError if there is none that this version reads."""
    path = Path(folder) / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format") == FORMAT:
            return Manifest(**data)
    except OSError:
        raise UserError(f"{folder} has no scores: it has no {MANIFEST}; polygpt data score writes them") from None
    except (ValueError, TypeError, AttributeError, KeyError):
        pass
    raise UserError(f"{path} is damaged, or of another version: write the scores again into another folder")


class Scores:
    """The scores of a folder, by random access. Cheap to pickle: files are opened on first use.

    Args:
        name: their name in `data.scores`.
        folder: the folder.

    Raises:
        UserError: if the folder has no complete scores.
    """

    def __init__(self, name: str, folder: str):
        self.name, self.folder = name, Path(folder)
        try:
            self.manifest = read_manifest(folder)
        except UserError as error:
            raise UserError(f"data.scores.{name}: {error}") from None
        self._indexes: dict[tuple[str, int], np.ndarray] = {}
        if not self.manifest.complete:
            raise UserError(f"{self._place}: it is not complete: polygpt data score with the same arguments resumes it")

    @property
    def _place(self) -> str:
        return f"data.scores.{self.name}: {self.folder}"

    def require(self, layout, tokenizer: Tokenizer, counts: Mapping[str, int]) -> None:
        """Raises UserError if the scores are of other data: of another tokenizer, layout or number of examples."""
        made = self.manifest
        again = "write the scores again with polygpt data score"
        if made.tokenizer != tokenizer.fingerprint:
            raise UserError(
                f"{self._place}: the scores are of another tokenizer ({made.vocabulary:,} ids, here "
                f"{tokenizer.vocabulary:,}): {again}"
            )
        for field, now in layout_fields(layout).items():
            if made.layout.get(field) != now:
                raise UserError(
                    f"{self._place}: scored with layout.{field} {made.layout.get(field)!r}, here {now!r}: {again}"
                )
        for task, count in counts.items():
            if made.tasks.get(task) != count:
                had = f"{made.tasks[task]:,} examples" if task in made.tasks else "no scores"
                raise UserError(f"{self._place}: the task {task!r} has {had} there and {count:,} here: {again}")

    def arrays(self, task: str, number: int, example: Example, row: Row) -> dict[str, np.ndarray]:
        """What `Batch.extra` gets of an example, arrays [t, ...]; see `polygpt.sequence.top_ids`.

        Raises:
            UserError: if the example is not the one that was scored, or a file is damaged.
            BadRecord: if the example was unusable when it was scored.
        """
        entry = self._index(task, number // SHARD)[number % SHARD]
        if entry["count"] < 0:
            raise BadRecord(
                "not scored", example.place, f"{self.folder} has no scores of it: mend it and score it again"
            )
        if entry["digest"] != digest(example, row):
            raise UserError(
                f"{self._place}: example {number} of the task {task!r} ({example.place}) is not the one that was "
                "scored: restore the data and the task's prompt_weight, or write the scores again with polygpt data "
                "score"
            )
        found, here = self._records(task, number // SHARD, entry), scored(row)
        if len(found) != here.sum():
            raise self._damaged(task, number // SHARD)
        arrays = {self.name: np.full(len(row), np.nan, np.float32)}
        arrays[self.name][here] = found["log_p"]
        if self.manifest.top:
            top = self.manifest.top
            arrays[top_ids(self.name)] = np.zeros((len(row), top), np.int32)
            arrays[top_log_p(self.name)] = np.full((len(row), top), np.nan, np.float32)
            arrays[top_ids(self.name)][here] = found["ids"]
            arrays[top_log_p(self.name)][here] = found["top"]
        return arrays

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape after [B, T] and dtype of each array."""
        top = (self.manifest.top,)
        likely = {top_ids(self.name): (top, "int32"), top_log_p(self.name): (top, "float32")}
        return {self.name: ((), "float32")} | (likely if self.manifest.top else {})

    def _index(self, task: str, number: int) -> np.ndarray:
        """The index of a shard."""
        if (task, number) not in self._indexes:
            try:
                found = np.load(shard_paths(self.folder, task, number)[0], allow_pickle=False)
            except (OSError, ValueError, EOFError):
                raise self._damaged(task, number) from None
            if found.dtype != INDEX or len(found) != len(self.manifest.examples(task, number)):
                raise self._damaged(task, number)
            if len(self._indexes) == OPEN:
                del self._indexes[next(iter(self._indexes))]
            self._indexes[task, number] = found
        return self._indexes[task, number]

    def _records(self, task: str, number: int, entry: np.void) -> np.ndarray:
        """The records of an example. A file that shrank while it is mapped into memory would end the process."""
        record = self.manifest.record
        try:
            with shard_paths(self.folder, task, number)[1].open("rb") as file:
                np.lib.format.read_magic(file)
                dtype = np.lib.format.read_array_header_1_0(file)[2]
                file.seek(int(entry["first"]) * record.itemsize, os.SEEK_CUR)
                content = file.read(int(entry["count"]) * record.itemsize)
        except (OSError, ValueError, EOFError):
            raise self._damaged(task, number) from None
        if dtype != record or zlib.crc32(content) != entry["checksum"]:
            raise self._damaged(task, number)
        return np.frombuffer(content, record)

    def _damaged(self, task: str, number: int) -> UserError:
        files = " and ".join(path.name for path in shard_paths(self.folder, task, number))
        return UserError(f"{self._place}: {files} are damaged: remove them and run polygpt data score again")


def open_scores(data, tokenizer: Tokenizer, counts: Mapping[str, int]) -> tuple[Scores, ...]:
    """All scores of the training data (`DataSpec`), given the number of examples of each task.

    Raises:
        UserError: if one is missing, incomplete, or of other data.
    """
    found = tuple(Scores(name, folder) for name, folder in data.scores.items())
    for one in found:
        one.require(data.layout, tokenizer, counts)
    return found


def require_same(found: Sequence[Scores], before: Mapping[str, str]) -> None:
    """Raises UserError if the scores of a folder are not by the model by which they were, given its fingerprints by
    folder. A phase of a run may read other folders."""
    for one in found:
        if before.get(str(one.folder), one.manifest.fingerprint) != one.manifest.fingerprint:
            raise UserError(
                f"data.scores.{one.name}: {one.folder} has the scores of another model ({one.manifest.model}) than at "
                "the checkpoint: restore it, or use another workdir"
            )


def shard_paths(folder: Path, task: str, number: int) -> tuple[Path, Path]:
    """The files of a shard: the index and the records."""
    name = f"{zlib.crc32(task.encode()):08x}-{number:06d}"  # a task's name may contain anything
    return folder / f"{name}.index.npy", folder / f"{name}.npy"
