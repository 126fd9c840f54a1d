"""A report's content without a model: real digits, a synthesized tone, invented figures."""

import numpy as np
from sklearn.datasets import load_digits

from polygpt.evaluation.classification import Classification
from polygpt.evaluation.likelihood import MEASURES
from polygpt.evaluation.transcription import Transcription
from polygpt.report import media
from polygpt.report.content import Chart, Content, Item, Line, Sample, Word

RATE = 8000


def attention(rng, layers: int, words: int, positions: int, total: float) -> np.ndarray:
    """[L, W, P], each map summing to about `total`."""
    weights = rng.dirichlet(np.full(positions, 0.4), (layers, words))
    return (weights * rng.uniform(0.5, 1, (layers, words, 1)) * total).astype(np.float32)


def picture(rng, number: int, words: int) -> Item:
    digits = load_digits()
    pixels = np.repeat(digits.images[number][..., None] / 16, 3, axis=-1)
    seen = {"self-attention": attention(rng, 3, words, 4, 0.4)}
    return Item("image", media.png(pixels), (8, 8), (2, 2), attention=seen)


def recording(rng, words: int) -> Item:
    seconds = rng.uniform(0.5, 1.0)
    time = np.arange(int(RATE * seconds)) / RATE
    samples = 0.3 * np.sin(2 * np.pi * (220 + 200 * time) * time) * np.hanning(len(time))
    frames = np.abs(np.lib.stride_tricks.sliding_window_view(samples, 200)[::80] @ rng.normal(size=(200, 40)))
    spectrogram = np.log10(frames + 1e-2).T[::-1]
    size = (spectrogram.shape[1], spectrogram.shape[0])
    return Item(
        "audio",
        media.png(spectrogram),
        size,
        (1, 12),
        media.wav(samples, RATE),
        seconds,
        {"self-attention": attention(rng, 3, words, 12, 0.3)},
    )


def content() -> Content:
    rng = np.random.default_rng(0)
    steps = np.arange(10, 3010, 10)
    loss = 4.2 * np.exp(-steps / 500) + 0.35 + rng.normal(0, 0.05, len(steps)) * np.exp(-steps / 2000)
    rate = 2e-3 * np.minimum(steps / 200, 0.5 * (1 + np.cos(np.pi * steps / 3000)))
    held_out = np.arange(500, 3001, 500)
    names = {"text": 1.9, "digits": 0.1, "speech": 0.05, "fusion": 0.4}
    sums = ["six", "eleven", "twelve", "nine", "four", "fifteen"]
    fusion = tuple(
        Sample(
            ("what is ", picture(rng, i, 1), " plus ", recording(rng, 1), "? "),
            (Word(said, said == true),),
            true,
            said == true,
            f"embedded fusion test, record {i}",
        )
        for i, (said, true) in enumerate(
            zip(["six", "eleven", "twelve", "nine", "seven", "fifteen"], sums, strict=True)
        )
    )
    caption = Sample(
        (picture(rng, 12, 4),),
        (Word("a", True), Word("red", True), Word("boat", False), Word("<b>&", False)),
        "a red ship",
        False,
        "pictures test, record 3",
    )
    story = Sample(
        ("In the beginning God created the heaven and the",),
        tuple(Word(word) for word in "earth. And the earth was without form, and void".split()),
        "earth. And the earth was without form, and void; and darkness was upon the face of the deep.",
        None,
        "text test, record 0",
    )
    return Content(
        title="quickstart",
        facts=(
            ("step", "3,000 of 3,000"),
            ("parameters", "1,482,368"),
            ("device", "1 × cpu"),
            ("median speed", "14,210 tokens/s"),
            ("written", "2026-11-22 14:03"),
        ),
        tasks={
            "text": {"loss": 1.902, "perplexity": 6.7, "bits_per_byte": 2.74, "token_accuracy": 0.47, "n": 512},
            "digits": {"loss": 0.11, "accuracy": 0.985, "perplexity": 1.12, "token_accuracy": 0.98, "n": 360},
            "speech": {"loss": 0.04, "accuracy": 1.0, "wer": 0.0, "token_accuracy": 1.0, "n": 400},
            "fusion": {"loss": 0.41, "accuracy": 0.947, "perplexity": float("nan"), "token_accuracy": 0.9, "n": 1000},
        },
        measures={one.name: one for one in (*Classification.measures, *Transcription.measures, *MEASURES)},
        modalities={"audio": {"loss": 0.04, "n": 400}, "image+audio": {"loss": 0.41, "n": 1000}},
        gains={
            "digits/image": {"gain": 2.31, "low": 2.11, "high": 2.52},
            "speech/audio": {"gain": 3.02, "low": 2.84, "high": 3.2},
            "fusion/image": {"gain": 1.24, "low": 1.13, "high": 1.36},
            "fusion/audio": {"gain": 0.05, "low": -0.04, "high": 0.14},
        },
        charts=(
            Chart("Training loss", (Line("loss", tuple(steps), tuple(loss)),), "nats per token", noisy=True),
            Chart(
                "Held-out accuracy",
                tuple(
                    Line(name, tuple(held_out), tuple(1 - np.exp(-held_out / (1500 * (i + 1)))))
                    for i, name in enumerate(names)
                ),
            ),
            Chart("Learning rate", (Line("learning rate", tuple(steps), tuple(rate)),)),
            Chart(
                "Speed",
                (Line("speed", tuple(steps), tuple(rng.normal(14200, 400, len(steps)))),),
                "tokens/s",
                noisy=True,
            ),
        ),
        time={
            "productive": 9870.0,
            "compile": 61.5,
            "input_wait": 130.0,
            "checkpoint": 210.0,
            "evaluation": 640.0,
            "startup": 65.0,
            "restart": 140.0,
            "down": 210.0,
            "lost": 380.0,
            "other": 4.0,
        },
        samples={"text": (story,), "pictures": (caption,), "fusion": fusion},
        config={"name": "quickstart", "train": {"steps": 3000}},
        environment={"python": "3.11.7", "jax": "0.10.2", "note": "</script><script>alert(1)</script>"},
        notes=("The run is under way: step 3,000 of 6,000.",),
    )
