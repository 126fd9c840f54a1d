"""The embedded data: what is in it, what is held out, and how its dataset comes to be built."""

import io
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from polygpt.data.embedded import builder
from polygpt.data.example import Medium, Text
from polygpt.data.sources.embedded import NUMBERS, Embedded
from polygpt.errors import SpecError, UserError
from polygpt.spec import from_json, to_json

ARCHIVES = builder.ARCHIVES
LIMIT = 12_000_000


def manifest(config):
    with zipfile.ZipFile(ARCHIVES / f"{config}.zip") as archive:
        return [json.loads(line) for line in archive.read("manifest.jsonl").decode().splitlines()]


def media(config, count=None):
    return list(itertools.islice(((row, data) for row, data in builder.archive_records(config)), count))


# --- what ships -------------------------------------------------------------------------------------------------------


def test_the_package_carries_at_most_12_megabytes():
    assert sum(path.stat().st_size for path in ARCHIVES.rglob("*") if path.is_file()) <= LIMIT


@pytest.mark.parametrize("config", builder.FIELDS)
def test_manifests_list_each_file_once_and_nothing_else(config):
    files = [row["file"] for row in manifest(config)]
    with zipfile.ZipFile(ARCHIVES / f"{config}.zip") as archive:
        assert sorted([*files, "manifest.jsonl"]) == sorted(archive.namelist())
        assert archive.testzip() is None
    assert len(set(files)) == len(files)


def test_no_picture_is_on_both_sides():
    for config in ("digits", "pictures"):
        sides = {"train": set(), "test": set()}
        for row, data in media(config):
            sides[row["split"]].add(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes())
        assert sides["train"] and sides["test"]
        assert not sides["train"] & sides["test"], config


def test_whole_voices_are_held_out():
    kinds = {}
    for row in manifest("speech") + manifest("utterances"):
        kinds.setdefault((row["voice"], row["kind"]), set()).add(row["split"])
    assert all(len(splits) == 1 for splits in kinds.values())
    held_out = {voice for voice, splits in kinds.items() if splits == {"test"}}
    assert {"armelle", "menardi"} <= {voice for voice, kind in held_out if kind == "human"}
    english = {(row["voice"], row["split"]) for row in manifest("speech") if row["language"] == "en"}
    assert sum(split == "train" for _, split in english) >= 40
    assert sum(split == "test" for _, split in english) >= 8


def test_every_voice_says_every_digit():
    said = {}
    for row in manifest("speech"):
        said.setdefault((row["language"], row["voice"]), set()).add(row["number"])
        if row["language"] == "en" and row["number"] < len(NUMBERS):
            assert row["word"] == NUMBERS[row["number"]]
    assert {language for language, _ in said} == {"en", "es", "fr", "it", "ru"}
    assert all(numbers >= set(range(10)) for numbers in said.values())


def test_held_out_sentences_and_documents_are_not_in_training():
    for language in ("en", "es", "fr", "it", "ru"):
        rows = [row for row in manifest("utterances") if row["language"] == language]
        sides = {split: {row["text"] for row in rows if row["split"] == split} for split in ("train", "test")}
        assert sides["test"] and not sides["train"] & sides["test"]
    texts = {"train": set(), "test": set()}
    for row, data in media("text"):
        texts[row["split"]].update(data.decode().splitlines())
    assert not texts["train"] & texts["test"]
    assert 2_000_000 < sum(len(line) for side in texts.values() for line in side)


@pytest.mark.parametrize("config, language_limits", [("speech", {"en": 0.96}), ("utterances", {})])
def test_recordings_are_whole_and_short(config, language_limits):
    longest = {"speech": 1.2, "utterances": 3.0}[config]
    for row, data in media(config):
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        assert data[:4] == b"fLaC" and rate == 8000 and samples.ndim == 1
        assert 0.1 < len(samples) / rate <= language_limits.get(row["language"], longest), row["file"]
        assert 0.85 < np.abs(samples).max() <= 0.95, row["file"]
        assert np.abs(samples[:8]).max() < 0.2 and np.abs(samples[-8:]).max() < 0.2, row[
            "file"
        ]  # faded, so not cut hard


def test_pictures_decode_and_captions_are_clean():
    for row, data in media("digits", 100):
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            assert picture.size == (8, 8) and picture.mode == "L"
        assert 0 <= row["number"] <= 9
    for row, data in media("pictures"):
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            assert picture.size == (32, 32)
        text = row["text"]
        assert text.isascii() and text == text.lower().strip() and 1 <= len(text.split()) <= 4


def test_attribution_names_every_source():
    text = (ARCHIVES / "ATTRIBUTION.md").read_text()
    for row in manifest("speech") + manifest("utterances"):
        formant = row["kind"] == "synthesized" and "-" in row["voice"]
        assert ("eSpeak NG" if formant else row["voice"]) in text, row["voice"]
    for folder in {row["source"] for row in manifest("text")}:
        assert f"| text | {folder}/ |" in text
    for holder in ("Kaynak", "openclipart.org", "Princeton University", "Allison Smith", "http://www.voip.ammdomus.it"):
        assert holder in text


def test_the_recipe_lists_the_voices_that_ship(monkeypatch):
    monkeypatch.syspath_prepend(str(ARCHIVES / "recipe"))
    monkeypatch.delitem(sys.modules, "voices", raising=False)
    import voices

    del sys.modules["voices"]
    listed = {(voice.name, voice.language, voice.kind, voice.split) for voice in voices.voices()}
    assert listed == {(row["voice"], row["language"], row["kind"], row["split"]) for row in manifest("speech")}


# --- the source -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", ["text", "digits", "pictures", "speech", "utterances", "fusion", "sums"])
def test_every_task_gives_prompts_and_answers(task, split):
    examples = Embedded(task, split, examples=50).open()
    assert len(examples) >= 30
    for i in (0, 1, len(examples) - 1, -1):
        example = examples[i]
        assert example == examples[i]
        assert example.answer and f"{task}/{split}" in example.place
        assert all(isinstance(part, (Text, Medium)) for part in example.parts)
        assert all(part.text for part in example.parts if isinstance(part, Text))
        if task != "text":
            assert any(isinstance(part, Medium) for part in example.prompt)
            assert example.parts == (*example.prompt, Text(example.answer))
    assert examples[-1] == examples[len(examples) - 1]
    with pytest.raises(IndexError):
        examples[len(examples)]


def test_fusion_names_its_files_in_the_order_in_which_they_come():
    suffixes, first = {"image": ".png", "audio": ".flac"}, set()
    for example in Embedded("fusion", examples=20).open():
        order = [part.modality for part in example.parts if isinstance(part, Medium)]
        files = example.place.partition(": ")[2].split(" + ")
        assert [suffixes[modality] for modality in order] == [Path(file).suffix for file in files], example.place
        first.add(order[0])
    assert first == {"image", "audio"}


def test_counts_agree_with_the_manifests():
    for task in ("digits", "pictures"):
        for split in ("train", "test"):
            expected = sum(row["split"] == split for row in manifest(task))
            assert len(Embedded(task, split).open()) == expected
    every = ("en", "es", "fr", "it", "ru")
    for split in ("train", "test"):
        rows = [row for row in manifest("speech") if row["split"] == split]
        assert len(Embedded("speech", split, languages=every, numbers="all").open()) == len(rows)
        digits = [row for row in rows if row["number"] < 10]
        assert len(Embedded("speech", split, languages=every).open()) == len(digits)
        assert len(Embedded("speech", split, languages=("fr",)).open()) == sum(r["language"] == "fr" for r in digits)


@pytest.mark.parametrize("split", ["train", "test"])
def test_sums_are_right_and_their_media_belong_to_the_split(split):
    seen = {data: row["number"] for row, data in media("digits") if row["split"] == split}
    heard = {
        data: row["number"]
        for row, data in media("speech")
        if row["split"] == split and row["language"] == "en" and row["number"] < 10
    }
    orders, answers = set(), set()
    for example in Embedded("fusion", split, examples=400).open():
        first, plus, second, equals, answer = example.parts
        assert (plus, equals) == (Text("+", 0.0), Text("=", 0.0))
        by_modality = {part.modality: part.source for part in (first, second)}
        assert answer == Text(NUMBERS[seen[by_modality["image"]] + heard[by_modality["audio"]]])
        orders.add(first.modality)
        answers.add(answer.text)
    assert orders == {"image", "audio"}
    assert len(answers) >= 17


@pytest.mark.parametrize("split", ["train", "test"])
def test_sums_with_a_number_in_words_are_right(split):
    seen = {data: row["number"] for row, data in media("digits") if row["split"] == split}
    pairs = set()
    for example in Embedded("sums", split, examples=2000).open():
        picture, question, answer = example.parts
        number = NUMBERS.index(question.text.removeprefix("+").removesuffix("="))
        assert question == Text(f"+{NUMBERS[number]}=", 0.0)
        assert answer == Text(NUMBERS[seen[picture.source] + number])
        pairs.add((seen[picture.source], number))
    assert pairs == set(itertools.product(range(10), range(10)))


@pytest.mark.parametrize("task", ["fusion", "sums"])
def test_pairs_depend_on_seed_and_index_alone(task):
    few, many = (Embedded(task, "train", examples=n).open() for n in (20, 1000))
    assert list(few) == [many[i] for i in range(20)]
    other = Embedded(task, "train", examples=20, seed=1).open()
    assert sum(a != b for a, b in zip(few, other, strict=True)) >= 19


def test_text_is_cut_into_pieces_with_a_prompt():
    whole = Embedded("text", "test", characters=64).open()
    prompted = Embedded("text", "test", characters=64, prompt=16).open()
    assert len(whole) == len(prompted)
    for a, b in zip(itertools.islice(whole, 40), prompted, strict=False):
        assert len(a.answer) <= 64 and a.prompt == ()
        assert b.prompt == (Text(a.answer[:16], 0.0),) and b.answer == a.answer[16:]


def test_recordings_are_chosen_by_length():
    every = Embedded("utterances", "train").open()
    lengths = [soundfile.info(io.BytesIO(example.parts[0].source)).duration for example in every]
    short = Embedded("utterances", "train", seconds=1.0).open()
    assert 0 < len(short) == sum(length <= 1.0 for length in lengths) < len(every)


def test_sources_pickle_small_and_travel_as_json():
    spec = Embedded("fusion", "test", languages=("en", "fr"), examples=10)
    assert from_json(json.loads(json.dumps(to_json(spec)))) == spec
    examples = spec.open()
    first = examples[0]
    pickled = pickle.dumps(examples)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[0] == first


def test_bad_fields_are_named():
    with pytest.raises(SpecError, match="prompt is 300"):
        Embedded("text", prompt=300)
    with pytest.raises(SpecError, match="Embedded.task is 'fusoin'"):
        Embedded("fusoin")
    with pytest.raises(SpecError, match="seconds is 0.0"):
        Embedded("utterances", seconds=0)
    with pytest.raises(SpecError, match="languages"):
        Embedded("speech", languages=())


def test_reading_is_fast_enough_to_feed_a_step():
    examples = Embedded("fusion", "train").open()
    examples[0]
    start = time.perf_counter()
    for i in range(2000):
        examples[i]
    assert 2000 / (time.perf_counter() - start) > 2000  # measured: 50,000 a second


# --- building the dataset ---------------------------------------------------------------------------------------------

BUILD = "from polygpt.data.sources.embedded import Embedded; print(len(Embedded('digits', 'test').open()))"


def start(cache: Path, code: str = BUILD, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "POLYGPT_CACHE": str(cache)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_dataset_is_built_once_quietly_by_processes_that_start_together(tmp_path):
    runs = [start(tmp_path) for _ in range(2)]
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert (run.returncode, out, err) == (0, "299\n", "")
    (folder,) = (tmp_path / "embedded").iterdir()
    assert folder.name == f"digits-{builder.fingerprint('digits')}"


def test_a_build_that_is_killed_is_done_again_and_swept_up(tmp_path):
    hang = """
import pathlib, sys, time
import polygpt.data.embedded.builder as builder
records = builder.archive_records
def slow(config):
    for i, record in enumerate(records(config)):
        if i == 700:
            pathlib.Path(sys.argv[1]).touch()
            time.sleep(60)
        yield record
builder.archive_records = slow
builder.data_dir("digits")
"""
    halfway = tmp_path / "halfway"
    run = start(tmp_path, hang, str(halfway))
    deadline = time.monotonic() + 60
    while not halfway.exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    (left,) = (tmp_path / "embedded").glob(".building-*")
    os.utime(left, (0, 0))
    again = start(tmp_path)
    assert again.communicate(timeout=120) == ("299\n", "")
    assert [path.name for path in (tmp_path / "embedded").iterdir()] == [f"digits-{builder.fingerprint('digits')}"]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POLYGPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="POLYGPT_CACHE") as caught:
        builder.data_dir("digits")
    assert "\n" not in str(caught.value)


def test_the_specification_alone_does_not_import_tfds():
    code = """
import sys, polygpt.data.sources.embedded, polygpt.data.sources.tfds
print("tensorflow_datasets" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
