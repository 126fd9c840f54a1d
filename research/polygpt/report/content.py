"""What a report says, as plain data: gathered from a run in one place, drawn in another."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from polygpt.evaluation.metric import Measure


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve. `values` may hold NaN where nothing was measured."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves over the same steps and unit. A `noisy` chart is drawn smoothed, over its raw values."""

    title: str
    lines: tuple[Line, ...]
    unit: str = ""
    noisy: bool = False


@dataclasses.dataclass(frozen=True)
class Item:
    """A medium of a prompt, as the model got it.

    Attributes:
        modality: the name of the adapter that reads it.
        png: its picture: the image itself or the spectrogram.
        size: (width, height) of that picture in pixels.
        grid: (rows, columns) in which the medium's positions tile the picture, in row-major order.
        wav: the recording, if it is one.
        seconds: its length.
        attention_LWP: for each layer and each word of the answer, the attention that the predictions of the word's
            tokens pay to each position, averaged over heads and tokens; NaN in a layer that has no weights to look at,
            None if nothing is known.
    """

    modality: str
    png: bytes
    size: tuple[int, int]
    grid: tuple[int, int]
    wav: bytes | None = None
    seconds: float | None = None
    attention_LWP: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of the model's answer; `right` is None where nothing is right or wrong."""

    text: str
    right: bool | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """A held-out example: the prompt, what the model wrote, what is true.

    Attributes:
        prompt: texts and media in reading order.
        words: the model's words.
        truth: the true continuation.
        right: whether the answer counts as right; None for free text.
        place: where the example comes from.
    """

    prompt: tuple[str | Item, ...]
    words: tuple[Word, ...]
    truth: str
    right: bool | None
    place: str


@dataclasses.dataclass(frozen=True)
class Content:
    """Everything that a report shows. An empty part is left out of the page; `notes` say why something is missing.

    Attributes:
        title: the run's name.
        facts: (label, value) pairs for the head of the page.
        tasks: the held-out results by task, by name of the measure.
        measures: what is known of the measures, by name, in the order of tables.
        modalities: the same measures over all tasks, by the media that an example holds ("text", "image+audio").
        gains: the modality gains, {"task/modality": {"gain", "low", "high"}}, in nats per token.
        charts: the curves.
        time: seconds of the run by what they were spent on ("productive", "compile", ...), in the order to be drawn.
        samples: by task.
        config, environment: JSON data, shown folded.
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
