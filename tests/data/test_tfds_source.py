"""Prepared TFDS datasets as a source, without TensorFlow."""

import importlib.util
import json
import pickle
import shutil

import numpy as np
import pytest

from polygpt.data.embedded import builder
from polygpt.data.example import Medium, Text
from polygpt.data.sources.tfds import Field, Fixed, TfdsSource, _label, _part, find_dataset
from polygpt.errors import BadRecord, SpecError, UserError
from polygpt.spec import from_json, to_json

COUNTS = {"train": 7, "validation": 3}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A small dataset with text, a label, a number, nested fields and bytes, as ArrayRecord."""
    import tensorflow_datasets as tfds

    class TinyPets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            features = {
                "picture": tfds.features.Tensor(shape=(), dtype=np.object_),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                "legs": np.int64,
                "words": {"short": tfds.features.Text(), "raw": tfds.features.Tensor(shape=(), dtype=np.object_)},
                "sizes": tfds.features.Tensor(shape=(2,), dtype=np.int64),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(count) for split, count in COUNTS.items()}

        def _generate_examples(self, count):
            for i in range(count):
                words = {"short": f"pet {i} ü", "raw": b"\xff" if i == 0 else b"fine"}
                yield i, {"picture": b"PNG%d" % i, "label": i % 2, "legs": 4, "words": words, "sizes": [i, i]}

    folder = tmp_path_factory.mktemp("tfds")
    TinyPets(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def source(prepared, *parts, split="train", dataset="tiny_pets"):
    return TfdsSource(dataset=dataset, split=split, parts=parts or (Field("words/short"),), data_dir=str(prepared))


def test_fields_become_parts_in_order(prepared):
    examples = source(
        prepared, Field("picture", "image"), Fixed("legs?"), Field("legs", weight=0.0), Fixed(" ", 1.0), Field("label")
    ).open()
    assert len(examples) == COUNTS["train"]
    found = set()
    for i, example in enumerate(examples):
        picture, question, legs, space, label = example.parts
        number = int(picture.source.removeprefix(b"PNG"))
        assert picture == Medium("image", b"PNG%d" % number)
        assert (question, legs, space) == (Text("legs?", 0.0), Text("4", 0.0), Text(" ", 1.0))
        assert label == Text(["cat", "dog"][number % 2])
        assert example.place == f"tiny_pets train, example {i}"
        found.add(number)
    assert found == set(range(COUNTS["train"]))
    assert examples[-1] == examples[len(examples) - 1]
    with pytest.raises(IndexError):
        examples[len(examples)]


def test_nested_text_is_decoded(prepared):
    texts = {example.answer for example in source(prepared, split="validation").open()}
    assert texts == {f"pet {i} ü" for i in range(3)}


def test_slices_of_splits_and_versions(prepared):
    assert len(source(prepared, split="train[:3]").open()) == 3
    assert len(source(prepared, dataset="tiny_pets:1.2.0").open()) == COUNTS["train"]


def test_the_embedded_data_by_name():
    folder = builder.data_dir("speech")
    parts = (Field("audio", "audio"), Fixed("="), Field("word"))
    examples = TfdsSource("polygpt_embedded/speech", "test", parts, data_dir=str(folder)).open()
    expected = {row["audio"]: row["word"] for row in builder.records("speech", "test")}
    assert len(examples) == len(expected)
    for i in range(0, len(examples), 37):
        assert expected[examples[i].parts[0].source] == examples[i].answer


def test_bad_records_name_dataset_example_and_field(prepared):
    examples = source(prepared, Field("words/raw")).open()
    with pytest.raises(BadRecord, match=r"tiny_pets train, example \d, field words/raw: invalid UTF-8"):
        list(examples)
    with pytest.raises(BadRecord, match="field sizes: not text"):
        source(prepared, Field("sizes")).open()[0]
    with pytest.raises(BadRecord, match="field legs: not encoded"):
        source(prepared, Field("legs", "image")).open()[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dataset": "tiny_pet"}, "no prepared dataset 'tiny_pet' in .*: did you mean tiny_pets"),
        ({"dataset": "tiny_pets:1.0.0"}, "no version '1.0.0': did you mean 1.2.0"),
        ({"split": "trian"}, "no split 'trian': did you mean train"),
        ({"split": "train[:nonsense]"}, "split 'train"),
        ({"parts": (Field("lable"),)}, "no field 'lable': did you mean label"),
        ({"parts": (Field("words/shirt"),)}, "no field 'words/shirt': did you mean words/short"),
    ],
)
def test_what_is_not_there_is_one_line_with_the_nearest_names(prepared, change, message):
    with pytest.raises(UserError, match=message) as caught:
        source(prepared).replace(**change).open()
    assert "\n" not in str(caught.value)


def test_a_dataset_without_random_access_says_how_to_prepare_it(tmp_path, prepared):
    folder = tmp_path / "tiny_pets" / "1.2.0"
    folder.mkdir(parents=True)
    for name in ("dataset_info.json", "features.json"):
        (folder / name).write_text((prepared / "tiny_pets" / "1.2.0" / name).read_text())
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="stored as tfrecord.*array_record"):
        source(tmp_path).open()


def redeclare(prepared, folder, feature):
    """A copy of the small dataset whose picture is declared as another feature that stores encoded bytes."""
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    path = folder / "tiny_pets/1.2.0/features.json"
    features = json.loads(path.read_text())
    features["featuresDict"]["features"]["picture"] = feature
    path.write_text(json.dumps(features))


def test_image_features_are_taken_as_encoded_bytes(tmp_path, prepared):
    shape = {"dimensions": ["4", "4", "3"]}
    name = "tensorflow_datasets.core.features.image_feature.Image"
    redeclare(prepared, tmp_path, {"pythonClassName": name, "image": {"shape": shape, "dtype": "uint8"}})
    pictures = {example.parts[0].source for example in source(tmp_path, Field("picture", "image")).open()}
    assert pictures == {b"PNG%d" % i for i in range(COUNTS["train"])}


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed")
def test_a_feature_that_needs_tensorflow_says_so(tmp_path, prepared, capfd):
    name = "tensorflow_datasets.core.features.audio_feature.Audio"
    audio = {"shape": {"dimensions": ["-1"]}, "dtype": "int64", "fileFormat": "flac", "encoding": "bytes"}
    redeclare(prepared, tmp_path, {"pythonClassName": name, "audio": audio})
    with pytest.raises(UserError, match="tensorflow, which is not installed: install tensorflow-cpu") as caught:
        source(tmp_path).open()
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_one_of_several_configs_must_be_named(tmp_path):
    for config in ("a", "b"):
        for version in ("1.9.0", "1.10.0"):
            folder = tmp_path / "set" / config / version
            folder.mkdir(parents=True)
            (folder / "dataset_info.json").write_text("{}")
    assert find_dataset("set/b", tmp_path) == tmp_path / "set" / "b" / "1.10.0"
    with pytest.raises(UserError, match="several configs: name one of set/a, set/b"):
        find_dataset("set", tmp_path)


@pytest.mark.parametrize("value", [-1, 2])
def test_a_label_that_is_unknown_is_a_bad_record(value):
    with pytest.raises(BadRecord, match="^pets, example 3, field label: no label: -?[12] is not one of its 2 classes$"):
        _part(Field("label"), {"label": np.int64(value)}, {"label": ["cat", "dog"]}, "pets, example 3")


def test_the_data_folder_comes_from_the_environment(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert find_dataset("tiny_pets") == prepared / "tiny_pets" / "1.2.0"


def test_specifications_travel_as_json_and_examples_pickle(prepared):
    spec = source(prepared, Field("picture", "image"), Fixed(":"), Field("label"))
    assert from_json(json.loads(json.dumps(to_json(spec)))) == spec
    examples = spec.open()
    assert pickle.loads(pickle.dumps(examples))[2] == examples[2]
    with pytest.raises(SpecError, match="parts"):
        source(prepared, Fixed("only this"))


def test_fields_become_labels(prepared):
    spec = TfdsSource("tiny_pets", "train", (Field("words/short"),), str(prepared), ("label", "legs", "sizes"))
    for example in spec.open():
        number = int(example.answer.split()[1])
        assert (example.labels["label"], example.labels["legs"]) == (number % 2, 4)
        assert list(example.labels["sizes"]) == [number, number]
    assert _label("label", {"label": -1}, {"label": ["cat", "dog"]}) is None
    assert _label("legs", {"legs": -1}, {"label": ["cat", "dog"]}) == -1
    with pytest.raises(UserError, match="has no field 'leg': did you mean legs"):
        spec.replace(labels=("leg",)).open()
