"""Builds the archives of the embedded data. See README.md in this folder."""

import json
import sys
import tempfile
import zipfile
from pathlib import Path

import packages
import pictures
import speech
import text

HUMAN_UTTERANCES = {"en": 100, "es": 20, "fr": 20, "it": 20, "ru": 20}
SYNTHESIZED_UTTERANCES = {"train": 2, "test": 4}
PICTURES = 2_800
LIMIT = 12_000_000  # total bytes of all archives


def write(path: Path, records) -> int:
    """Writes (manifest row, bytes or text) records as a zip: manifest.jsonl, then each row's file. Returns its size."""
    records = list(records)
    manifest = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row, _ in records)
    with zipfile.ZipFile(path, "w") as archive:
        add(archive, "manifest.jsonl", manifest.encode())
        for row, data in records:
            add(archive, row["file"], data.encode() if isinstance(data, str) else data)
    splits, size = [row["split"] for row, _ in records], path.stat().st_size
    print(f"{path.name:16} {size:>10,} bytes  {splits.count('train'):>5} train  {splits.count('test'):>4} test")
    return size


def add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Adds a file without date or owner. Text is deflated; media are already compressed."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, 0o644 << 16
    packed = zipfile.ZIP_DEFLATED if name.endswith((".txt", ".jsonl")) else zipfile.ZIP_STORED
    archive.writestr(info, data, packed, compresslevel=9)


def main() -> None:
    work = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    packages.fetch(work)
    into = Path(__file__).parent.parent
    sizes = [
        write(into / "digits.zip", pictures.digits()),
        write(into / "pictures.zip", pictures.clip_art(work, PICTURES)),
        write(into / "speech.zip", speech.spoken_numbers(work)),
        write(into / "utterances.zip", speech.utterances(work, HUMAN_UTTERANCES, SYNTHESIZED_UTTERANCES)),
        write(into / "text.zip", text.documents(work)),
    ]
    print(f"{'together':16} {sum(sizes):>10,} bytes")
    if sum(sizes) > LIMIT:
        raise SystemExit(f"over the limit of {LIMIT:,} bytes")


if __name__ == "__main__":
    main()
