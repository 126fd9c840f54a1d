"""Every kind of corrupt record ends training with code 2 and one line that names it; nothing is left half-written."""

import io
import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from own_experiment import write_experiment


def png(size, mode="RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, "PNG")
    return out.getvalue()


def wav(seconds: float, rate: int) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.zeros(int(seconds * rate)), rate, format="WAV")
    return out.getvalue()


FAULTS = {
    "missing file": ("gone.png", None, "a text"),
    "empty file": ("empty.png", b"", "a text"),
    "corrupt image": ("cut.png", png((64, 64))[:60], "a text"),
    "unknown image format": ("words.png", b"these are words", "a text"),
    "too many pixels": ("bomb.png", png((9000, 9000), "1"), "a text"),
    "corrupt audio": ("cut.wav", wav(0.4, 8000)[:1000], "a text"),
    "wrong rate": ("fast.wav", wav(0.4, 16000), "a text"),
    "too long": ("long.wav", wav(3.0, 8000), "a text"),
    "empty text": ("red.png", None, " "),
    "invalid UTF-8": ("red.png", None, b"\xff\xfe"),
    "malformed JSON": ("red.png", None, b'"'),
}


@pytest.fixture
def faulty(tmp_path, request):
    """An experiment whose folder holds one record at fault, and its reason."""
    file = write_experiment(tmp_path)
    name, data, text = FAULTS[request.param]
    if data is not None:
        (tmp_path / "data" / name).write_bytes(data)
    line = json.dumps({"file_name": name, "text": "@"}).encode()
    line = line.replace(b"@", text if isinstance(text, bytes) else text.encode())
    (tmp_path / "data" / "metadata.jsonl").write_bytes(line + b"\n")
    return file, request.param


@pytest.mark.parametrize("faulty", FAULTS, indirect=True)
def test_training_stops_with_one_line(faulty, polygpt):
    file, reason = faulty
    run = file.parent / "run"
    words = ["--workdir", run, "--model.adapters.audio.features.other_rates", "refuse"]
    code, out, err = polygpt("train", file, *words)
    assert (code, out) == (2, "") and "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("polygpt: ") and reason in last and "metadata.jsonl" in last
    if reason not in ("empty text", "invalid UTF-8", "malformed JSON"):
        assert last.count(FAULTS[reason][0]) == 1, "the media file is named, once"
    assert sum(line.startswith("polygpt: ") for line in err.splitlines()) == 1
    for place in run.rglob("*") if run.exists() else ():
        if place.suffix == ".json":
            json.loads(place.read_text())
        assert ".tmp" not in place.name and "partial" not in place.name
    assert not any((run / "checkpoints").glob("*"))


@pytest.mark.parametrize("faulty", ["corrupt image"], indirect=True)
def test_a_mended_folder_trains_by_the_same_command(faulty, polygpt):
    file, _ = faulty
    words = ["train", file, "--workdir", file.parent / "run", "--no-report", "--train.steps", "1"]
    assert polygpt(*words)[0] == 2
    (file.parent / "data" / "cut.png").write_bytes(png((64, 64)))
    code, _, err = polygpt(*words)
    assert code == 0, err
