"""The embedded data as a TFDS dataset, built in the cache folder from the archives in this folder on first use.

Five configs, each with the splits train and test. The images, voices and texts of the test split are held out.

| config | fields |
|---|---|
| digits | image (PNG), number |
| pictures | image (PNG), text |
| speech | audio (FLAC), word, number, language, voice, kind |
| utterances | audio (FLAC), text, language, voice, kind |
| text | text, source |

Each also has `file`, the name of the record in its archive. Media are stored as encoded bytes, so that neither writing
nor reading needs TensorFlow. Import this module only where data are opened: it imports TFDS, which takes a second.
"""

import contextlib
import functools
import hashlib
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from polygpt.cache_folder import cache_folder, made_whole
from polygpt.errors import UserError

ARCHIVES = Path(__file__).parent
STRINGS = ("file", "word", "text", "language", "voice", "kind", "source")
FIELDS = {
    "digits": ("file", "image", "number"),
    "pictures": ("file", "image", "text"),
    "speech": ("file", "audio", "word", "number", "language", "voice", "kind"),
    "utterances": ("file", "audio", "text", "language", "voice", "kind"),
    "text": ("file", "text", "source"),
}


class PolygptEmbedded(tfds.core.GeneratorBasedBuilder):
    """Handwritten and spoken digits, captioned images, transcribed utterances and plain text."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in FIELDS]

    def _info(self) -> tfds.core.DatasetInfo:
        kinds: dict[str, Any] = {name: tfds.features.Text() for name in STRINGS}
        kinds["number"] = tfds.features.Scalar(np.int64)
        kinds["image"] = kinds["audio"] = tfds.features.Tensor(shape=(), dtype=np.object_)
        features = tfds.features.FeaturesDict({name: kinds[name] for name in FIELDS[self.builder_config.name]})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str):
        for row, data in archive_records(self.builder_config.name):
            if row.pop("split") == split:
                content = next(name for name in FIELDS[self.builder_config.name] if name not in row)
                yield row["file"], {**row, content: data.decode() if content == "text" else data}


def archive_records(config: str):
    """Yields (manifest row, bytes of the file) from the archive of a config."""
    with zipfile.ZipFile(ARCHIVES / f"{config}.zip") as archive:
        for line in archive.read("manifest.jsonl").decode().splitlines():
            row = json.loads(line)
            yield row, archive.read(row["file"])


@functools.cache
def fingerprint(config: str) -> str:
    """Twelve hex digits of the archive's SHA-256, which give each release of the data its own folder."""
    return hashlib.sha256((ARCHIVES / f"{config}.zip").read_bytes()).hexdigest()[:12]


def data_dir(config: str) -> Path:
    """The TFDS data folder with `polygpt_embedded/<config>`, which is built if it does not exist.

    `polygpt.cache_folder.made_whole` builds it atomically, even if several processes start at once.

    Raises:
        UserError: if the cache folder cannot be written.
    """
    place = cache_folder() / "embedded" / f"{config}-{fingerprint(config)}"
    if place.is_dir():
        return place
    try:
        with made_whole(place) as work:
            _build(config, work)
            shutil.rmtree(work / "downloads", ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write the embedded data to {place.parent}: {error.strerror or error}: "
            "set POLYGPT_CACHE to a folder that can be written"
        ) from error
    return place


def _build(config: str, work: Path) -> None:
    builder = PolygptEmbedded(config=config, data_dir=work, file_format="array_record")
    silence = io.StringIO()
    with (
        contextlib.redirect_stdout(silence),
        contextlib.redirect_stderr(silence),
    ):  # hides notes and progress bars of TFDS
        builder.download_and_prepare()


@functools.cache
def records(config: str, split: str) -> tuple[dict[str, Any], ...]:
    """All records of a split in order of file name, kept in memory because the dataset is small."""
    source = tfds.data_source(
        f"polygpt_embedded/{config}:1.0.0", split=split, data_dir=data_dir(config), download=False
    )
    rows = [{name: _plain(value, name) for name, value in source[i].items()} for i in range(len(source))]
    return tuple(sorted(rows, key=lambda row: row["file"]))


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, np.ndarray):
        value = value.item()
    if isinstance(value, bytes) and name in STRINGS:
        return value.decode()
    return int(value) if isinstance(value, np.integer) else value
