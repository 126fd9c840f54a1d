"""The content of a report, as plain data, separate from gathering and rendering."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from polygpt.evaluation.metric import Measure


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve. Missing `values` are NaN."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves with common steps and unit. A `noisy` chart is drawn smoothed, on top of its raw values."""

    title: str
    lines: tuple[Line, ...]
    unit: str = ""
    noisy: bool = False


@dataclasses.dataclass(frozen=True)
class Item:
    """A media item of a prompt, as the model received it.

    Attributes:
        modality: name of its adapter.
        png: the image or the spectrogram.
        size: (width, height) of that picture in pixels.
        grid: (rows, columns) of the item's positions in the picture, in row-major order.
        wav: the recording, if any.
        seconds: length of the recording.
        attention: arrays [L, W, P] by kind, as in `BlockSpec.kinds_of_weights`: attention from the predictions of each
            word of the answer to each position, averaged over heads and the word's tokens; NaN in layers without
            attention weights. Empty if unavailable.
    """

    modality: str
    png: bytes
    size: tuple[int, int]
    grid: tuple[int, int]
    wav: bytes | None = None
    seconds: float | None = None
    attention: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of the model's answer; `right` is None for free text."""

    text: str
    right: bool | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """A held-out example with the model's answer.

    Attributes:
        prompt: texts and media in reading order.
        words: the words of the answer.
        truth: the true continuation.
        right: whether the answer is right; None for free text.
        place: location of the example in its source.
    """

    prompt: tuple[str | Item, ...]
    words: tuple[Word, ...]
    truth: str
    right: bool | None
    place: str


@dataclasses.dataclass(frozen=True)
class Content:
    """The content of a report. Empty parts are omitted; `notes` explain what is missing.

    Attributes:
        title: name of the run.
        facts: (label, value) pairs for the page header.
        tasks: held-out results by task and measure.
        measures: metadata of the measures by name, in table order.
        modalities: the same measures over all tasks, by the media of an example ("text", "image+audio").
        gains: modality gains, {"task/modality": {"gain", "low", "high"}}, in nats per token.
        charts: the curves.
        time: seconds of the run by category ("productive", "compile", ...), in drawing order.
        samples: by task.
        config, environment: JSON data, shown collapsed.
        notes: plain sentences.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    tasks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    measures: Mapping[str, Measure] = dataclasses.field(default_factory=dict)
    modalities: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    gains: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    charts: tuple[Chart, ...] = ()
    time: Mapping[str, float] = dataclasses.field(default_factory=dict)
    samples: Mapping[str, tuple[Sample, ...]] = dataclasses.field(default_factory=dict)
    config: Any = None
    environment: Any = None
    notes: tuple[str, ...] = ()
