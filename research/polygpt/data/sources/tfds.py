"""Datasets prepared by TensorFlow Datasets, read without TensorFlow."""

import contextlib
import dataclasses
import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polygpt.data.example import Example, Medium, Text
from polygpt.data.sources.base import Source, index_within
from polygpt.errors import BadRecord, UserError
from polygpt.spec import Spec, nearest


@dataclasses.dataclass(frozen=True)
class Field(Spec):
    """A part of an example, taken from a field of the record."""

    name: str
    """Name of the field; `a/b` is the field b inside a."""
    modality: str = "text"
    """"text", or the modality of the field's encoded bytes ("image", "audio")."""
    weight: float = 1.0
    """Loss weight of a text; 0 makes it a prompt."""


@dataclasses.dataclass(frozen=True)
class Fixed(Spec):
    """A text that is the same in every example."""

    text: str
    """The text."""
    weight: float = 0.0
    """Its loss weight; 0 makes it a prompt."""


@dataclasses.dataclass(frozen=True)
class TfdsSource(Source):
    """A prepared TFDS dataset, and the fields that make up its examples.

    The dataset must be stored as ArrayRecord (`file_format="array_record"`), which allows random access. Class labels
    are replaced by their names, numbers by their decimal form; media are read as encoded bytes.
    """

    dataset: str
    """`name`, `name/config` or `name/config:version`; the newest version by default."""
    split: str
    """A split of the dataset or a slice of it: `train`, `train[:90%]`."""
    parts: tuple[Field | Fixed, ...]
    """The parts of each example, in reading order."""
    data_dir: str = ""
    """The folder of prepared datasets; if empty, TFDS_DATA_DIR or else ~/tensorflow_datasets."""
    labels: tuple[str, ...] = ()
    """Fields that are labels of the whole example, under their own names: numbers, or the numbers of classes, of which
    negative ones are none."""

    def validate(self) -> None:
        self.require(any(isinstance(part, Field) for part in self.parts), "parts", "at least one Field among others")

    def open(self) -> "TfdsExamples":
        """The examples.

        Raises:
            UserError: if the dataset, the split or a field does not exist (with the nearest names), or reading needs
                TensorFlow.
        """
        examples = TfdsExamples(self)
        examples.check()
        return examples


class TfdsExamples(Sequence[Example]):
    """Random access to the examples of a TFDS dataset. Cheap to pickle: each process opens the files on first use."""

    def __init__(self, spec: TfdsSource):
        self.spec = spec

    def check(self) -> None:
        """Raises UserError if the dataset lacks a field that the specification names."""
        *_, known = _open(self.spec)
        for name in (*(part.name for part in self.spec.parts if isinstance(part, Field)), *self.spec.labels):
            if name not in known:
                raise UserError(f"dataset {self.spec.dataset!r} has no field {name!r}: {nearest(name, known)}")

    def __len__(self) -> int:
        return len(_open(self.spec)[0])

    def __getitem__(self, index: int) -> Example:
        source, classes, _ = _open(self.spec)
        i = index_within(index, len(source))
        record, place = source[i], f"{self.spec.dataset} {self.spec.split}, example {i}"
        labels = {name: _label(name, record, classes) for name in self.spec.labels}
        return Example(tuple(_part(part, record, classes, place) for part in self.spec.parts), place, labels)


def _value(name: str, record: Any) -> Any:
    """The value of a field; a number or bytes rather than an array without axes."""
    value = functools.reduce(lambda inner, key: inner[key], name.split("/"), record)
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _label(name: str, record: Any, classes: dict[str, list[str]]) -> Any:
    """The value of a label; None for a class that TFDS stores as -1, which is unknown."""
    value = _value(name, record)
    return None if name in classes and value < 0 else value


def _part(part: Field | Fixed, record: Any, labels: dict[str, list[str]], place: str) -> Text | Medium:
    if isinstance(part, Fixed):
        return Text(part.text, part.weight)
    value = _value(part.name, record)
    if part.modality != "text":
        if not isinstance(value, bytes):
            raise BadRecord("not encoded", f"{place}, field {part.name}", "media must be stored as encoded bytes")
        return Medium(part.modality, value)
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise BadRecord("invalid UTF-8", f"{place}, field {part.name}", str(error)) from error
    elif part.name in labels:
        names = labels[part.name]
        if not 0 <= value < len(names):  # TFDS stores an unknown label as -1
            raise BadRecord(
                "no label", f"{place}, field {part.name}", f"{value} is not one of its {len(names)} classes"
            )
        value = names[value]
    elif not isinstance(value, (str, int, float)):
        raise BadRecord("not text", f"{place}, field {part.name}", f"its type is {type(value).__name__}")
    return Text(str(value), part.weight)


@functools.lru_cache(maxsize=64)
def _open(spec: TfdsSource) -> tuple[Sequence[Any], dict[str, list[str]], list[str]]:
    """(the records, the class names of label fields, the names of all fields)."""
    import tensorflow_datasets as tfds  # importing it takes a second

    folder = find_dataset(spec.dataset, spec.data_dir)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints that TensorFlow is missing
            builder = tfds.builder_from_directory(folder)
    except ImportError as error:
        raise UserError(
            f"dataset {spec.dataset!r} in {folder} has a feature that TFDS reads with {error.name}, which is "
            "not installed: install tensorflow-cpu, or store encoded bytes as Tensor(shape=(), dtype=np.object_)"
        ) from error
    split = spec.split.partition("[")[0]
    if split not in builder.info.splits:
        raise UserError(f"dataset {spec.dataset!r} has no split {split!r}: {nearest(split, builder.info.splits)}")
    features = _flatten(builder.info.features)
    labels = {name: list(f.names) for name, f in features.items() if isinstance(f, tfds.features.ClassLabel)}
    encoded = {part.name for part in spec.parts if isinstance(part, Field) and part.modality != "text"}
    decoders: dict[str, Any] = {}
    for name in encoded & features.keys():
        if not isinstance(features[name], tfds.features.Tensor):  # Image and Audio: keep the encoded bytes
            *outer, last = name.split("/")
            functools.reduce(lambda inner, key: inner.setdefault(key, {}), outer, decoders)[last] = (
                tfds.decode.SkipDecoding()
            )
    try:
        source = builder.as_data_source(split=spec.split, decoders=decoders or None)
    except NotImplementedError as error:
        raise UserError(
            f"dataset {spec.dataset!r} in {folder} is stored as {builder.info.file_format.value}, which does not allow "
            'random access: prepare it with file_format="array_record"'
        ) from error
    except ValueError as error:
        raise UserError(f"dataset {spec.dataset!r}, split {spec.split!r}: {' '.join(str(error).split())}") from error
    return source, labels, list(features)


def _flatten(features: Any, prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, feature in features.items():
        found |= _flatten(feature, f"{prefix}{name}/") if hasattr(feature, "items") else {f"{prefix}{name}": feature}
    return found


def find_dataset(dataset: str, data_dir: str | Path = "") -> Path:
    """The folder of a prepared dataset, `data_dir/name[/config]/version`.

    Raises:
        UserError: if there is none of that name (with the nearest names), or it has several configs (with their names).
    """
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    name, _, version = dataset.partition(":")
    prepared: dict[str, list[Path]] = {}
    for path in sorted([*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]):
        prepared.setdefault(path.parent.parent.relative_to(root).as_posix(), []).append(path.parent)
    configs = [key for key in prepared if key == name or key.startswith(f"{name}/")]
    if not configs:
        raise UserError(f"no prepared dataset {name!r} in {root}: {nearest(name, prepared)}")
    if len(configs) > 1 and name not in configs:
        raise UserError(f"dataset {name!r} in {root} has several configs: name one of {', '.join(configs)}")
    folders = {path.name: path for path in prepared[name if name in configs else configs[0]]}
    if version and version not in folders:
        raise UserError(f"dataset {name!r} in {root} has no version {version!r}: {nearest(version, folders)}")
    return folders[version or max(folders, key=_version)]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in text.split("."))
