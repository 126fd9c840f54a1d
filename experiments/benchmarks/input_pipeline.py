"""The input pipeline against the library under each part, and the share of training that waits for input.

    python experiments/benchmarks/input_pipeline.py

Tokenising is `BPE.encode` of pieces of 4,000 characters on one thread, against bare tiktoken and bare tokenizers with
the same merges. Images are JPEG files of 640 x 480, decoded, cropped and resized to 224 x 224, against the same calls
of Pillow, which leave bytes where polygpt gives normalised float32. Waiting is that of the quickstart, on the same
cores.
"""

import io
import json
import sys
import sysconfig
import tempfile
from pathlib import Path

import harness
import numpy as np
import tokenizers
from PIL import Image

from polygpt.data.media.image import ImageFeatures, crop_box
from polygpt.data.tokenizers.bpe import train_bpe

TITLE = "Input pipeline"
PIECE, PIXELS = 4000, 224


def text(characters: int) -> str:
    """Sources of Python's standard library."""
    found, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found.append(path.read_text(encoding="utf-8", errors="ignore"))
        size += len(found[-1])
        if size >= characters:
            break
    return "".join(found)[:characters]


def tokenising(folder: Path, quick: bool, say) -> dict:
    """Summaries of MB/s by side."""
    source = text(40_000 if quick else 4_000_000)
    corpus = folder / "corpus.txt"
    corpus.write_text(source[: len(source) // 2], encoding="utf-8")
    say("training a tokenizer")
    spec = train_bpe([corpus], 300 if quick else 16_384, folder / "tokenizer.json")
    ours = spec.build()
    library = tokenizers.Tokenizer.from_file(spec.file)
    pieces = [source[at : at + PIECE] for at in range(0, len(source), PIECE)]
    sides = {
        "polygpt": lambda: [ours.encode(piece) for piece in pieces],
        "tiktoken": lambda: [ours.ranked.encode_ordinary(piece) for piece in pieces],
        "tokenizers": lambda: [library.encode(piece).ids for piece in pieces],
    }
    seconds = harness.alternate(sides, 2 if quick else harness.REPEATS, say=lambda text: say(f"tokenising: {text}"))
    return {"MB": len(source.encode()) / 1e6, "seconds": seconds}


def images(quick: bool, say) -> dict:
    """Seconds per image by side."""
    rng, files = np.random.default_rng(0), []
    for _ in range(2 if quick else 32):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    features = ImageFeatures(PIXELS, PIXELS)

    def bare(source: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(source)) as image:
            box = crop_box(*image.size, 1.0)
            return np.asarray(image.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BICUBIC, box))

    for source in files[:2]:
        np.testing.assert_allclose(features.load(source, "")[0], bare(source) / 127.5 - 1, rtol=0, atol=1e-6)
    sides = {
        "polygpt": lambda: [features.load(source, "") for source in files],
        "Pillow": lambda: [bare(source) for source in files],
    }
    seconds = harness.alternate(sides, 2 if quick else 15, say=lambda text: say(f"images: {text}"))
    return {"count": len(files), "seconds": seconds}


def waiting(folder: Path, say) -> list[float]:
    """The share of time that the quickstart's loop waits for input, by ten steps, after the first fifty."""
    say("training the quickstart")
    words = [
        "train",
        "experiments/quickstart.py",
        "--no-report",
        "--train.steps",
        "200",
        "--train.evaluate_every",
        "null",
    ]
    code = "import sys; from polygpt.cli.main import main; sys.exit(main(sys.argv[1:]))"
    harness.fresh(code, *words, "--workdir", str(folder / "run"))
    lines = [json.loads(line) for line in (folder / "run" / "timing.jsonl").read_text().splitlines()]
    return [line["input_wait"] for line in lines if line["step"] > 50]


def run(quick: bool, say) -> dict:
    """The figures of all three parts; at toy size nothing is trained."""
    with tempfile.TemporaryDirectory(prefix="polygpt-bench-") as place:
        folder = Path(place)
        found = {"tokenising": tokenising(folder, quick, say), "images": images(quick, say)}
        if not quick:
            found["input_wait"] = harness.summary(waiting(folder, say))
    return found


def tables(result: dict) -> str:
    """MB/s and ms per image by side, with ratios; the share of waiting."""
    words, pictures = result["tokenising"], result["images"]
    rows = []
    for name, one in words["seconds"].items():
        speed = harness.number(words["MB"] / one["median"])
        rows.append(["tokenising", name, f"{speed} MB/s", _share(words["seconds"], name)])
    for name, one in pictures["seconds"].items():
        per_image = harness.with_quartiles(one, 1e3 / pictures["count"], "ms per image")
        rows.append(["decoding and resizing", name, per_image, _share(pictures["seconds"], name)])
    text = harness.table(["part", "side", "speed", "polygpt's speed / side's"], rows)
    if wait := result.get("input_wait"):
        text += f"\n\nThe quickstart waits for input {harness.with_quartiles(wait, 100)} % of the time."
    return text


def _share(seconds: dict, name: str) -> str:
    return "" if name == "polygpt" else harness.with_quartiles(harness.ratio(seconds[name], seconds["polygpt"]))


def figures(result: dict) -> dict[str, str]:
    """Speeds and shares."""
    words, pictures = result["tokenising"], result["images"]["seconds"]
    found = {
        "tokenising": harness.number(words["MB"] / words["seconds"]["polygpt"]["median"]),
        "of_tiktoken": f"{harness.ratio(words['seconds']['tiktoken'], words['seconds']['polygpt'])['median']:.0%}",
        "of_pillow": f"{harness.ratio(pictures['Pillow'], pictures['polygpt'])['median']:.0%}",
    }
    return found | ({"wait": f"{result['input_wait']['median']:.1%}"} if "input_wait" in result else {})


if __name__ == "__main__":
    harness.alone(sys.modules[__name__])
