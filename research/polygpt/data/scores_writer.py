"""Writes the cache of log-probabilities that `scores.py` reads."""

import dataclasses
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polygpt.data.scores import FORMAT, INDEX, MANIFEST, Manifest, read_manifest, shard_paths
from polygpt.errors import UserError
from polygpt.files import write_atomically


class ScoresWriter:
    """Writes scores into a folder, or resumes it.

    Raises:
        UserError: if the folder has something else, or scores of something else.
    """

    def __init__(self, folder: str | Path, manifest: Manifest):
        self.folder, self.manifest = Path(folder), manifest
        if (self.folder / MANIFEST).exists():
            there = read_manifest(folder)
            for field in dataclasses.fields(Manifest):
                before, now = getattr(there, field.name), getattr(manifest, field.name)
                if field.name != "complete" and before != now:
                    raise UserError(
                        f"{folder} has scores with another {field.name} ({_brief(before)}, now {_brief(now)}): name "
                        "another folder, or remove this one"
                    )
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{folder} exists and has no scores: name a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_manifest(manifest)

    def missing(self) -> list[tuple[str, int]]:
        """Task and number of each shard that has not been written."""
        return [shard for shard in self.manifest.shards() if not shard_paths(self.folder, *shard)[0].exists()]

    def write(self, task: str, number: int, examples: Sequence[tuple[int, np.ndarray] | None]) -> None:
        """Writes a shard: the digest and the records of each example; None for an unusable one."""
        index = np.zeros(len(examples), INDEX)
        records = [np.zeros(0, self.manifest.record)]
        first = 0
        for i, one in enumerate(examples):
            if one is None:
                index[i] = (0, 0, first, -1)
                continue
            found = np.ascontiguousarray(one[1])
            index[i] = (one[0], zlib.crc32(found.tobytes()), first, len(found))
            records.append(found)
            first += len(found)
        index_path, records_path = shard_paths(self.folder, task, number)
        # The index comes last: a shard that has one is complete.
        for path, array in ((records_path, np.concatenate(records)), (index_path, index)):
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            write_atomically(path, content.getvalue())

    def finish(self) -> None:
        """Marks the folder as complete."""
        self._write_manifest(dataclasses.replace(self.manifest, complete=True))

    def counts(self) -> dict[str, int]:
        """Numbers of examples, unusable records, scored tokens and bytes. Raises UserError for a damaged file."""
        counts = np.concatenate([self._counts(shard_paths(self.folder, *shard)[0]) for shard in self.manifest.shards()])
        size = sum(path.stat().st_size for path in self.folder.iterdir())
        skipped = int((counts < 0).sum())
        return {
            "examples": len(counts) - skipped,
            "skipped": skipped,
            "tokens": int(counts[counts > 0].sum()),
            "bytes": size,
        }

    def _counts(self, path: Path) -> np.ndarray:
        try:
            return np.load(path, allow_pickle=False)["count"]
        except (OSError, ValueError, EOFError, IndexError):
            raise UserError(f"{path} is damaged: remove it and run polygpt data score again") from None

    def _write_manifest(self, manifest: Manifest) -> None:
        data = {"format": FORMAT} | dataclasses.asdict(manifest)
        write_atomically(self.folder / MANIFEST, json.dumps(data, indent=2) + "\n")


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
