"""The layout: turns the texts and media of an example into a row of positions."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from polygpt.data import pairs
from polygpt.data.augment import Augment
from polygpt.data.example import Example, Medium, Text
from polygpt.data.labels import Label, label_arrays
from polygpt.data.packing import Row, collate
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.errors import BadRecord
from polygpt.sequence import PROMPT, TEXT, Batch, coordinates
from polygpt.spec import Spec, nearest


@dataclasses.dataclass(frozen=True)
class LayoutSpec(Spec):
    """How to turn examples into rows.

    A row begins with `bos` and ends with `eos`, which has the loss weight of the last text. The target of a position is
    the next token, if the next position is text.
    """

    seq_len: int
    """T, number of positions per row. A longer example is a bad record."""
    fusion: Literal["interleaved", "prefix"] = "interleaved"
    """Whether to keep media where they occur in the example, or to move them all before the text."""
    media_span: Literal["causal", "bidirectional"] = "causal"
    """Attention among the positions of one item of media; with prefix fusion, among those of all media."""
    prompt_span: Literal["causal", "bidirectional"] = "causal"
    """Attention among the positions before the first text with a loss weight. "bidirectional" gives a prefix language
    model: T5 (1910.10683), section 3.2.1, and PaliGemma (2407.07726), Figure 2."""
    packing: bool = True
    """Whether to pack several short examples into a row, with no attention between them."""
    labels: Mapping[str, Label] = dataclasses.field(default_factory=dict)
    """Labels by name. Those of a whole example are at its last position, `eos`, those of a text at each of its tokens;
    `Batch.extra` has them, with NaN where there is none."""

    pairs: bool = False
    """Whether examples are pairs: the preferred and the rejected answer are two segments with the same prompt, one
    after the other in a row. `Batch.extra["preference"]` marks what preference objectives score. Only the preferred
    answer has loss weights. `Task.paired` says whether all examples of a task are pairs. Evaluation scores the answers
    one by one."""

    def validate(self):
        self.require(self.seq_len >= 2, "seq_len", "at least 2")


AS_READ = ("fusion", "media_span", "prompt_span")
"""The fields of a `LayoutSpec` that change what a model reads of an example."""


class MediaCache:
    """Keeps decoded media in memory for later epochs. Once it is full, nothing is added or evicted."""

    def __init__(self, megabytes: int):
        self.room = megabytes * 2**20
        self.kept: dict = {}

    def put(self, key, arrays: tuple) -> None:
        """Keeps decoded arrays if there is room. The last element of `key` is the encoded bytes or a path."""
        source = key[-1]
        size = arrays[0].nbytes + (len(source) if isinstance(source, bytes) else 0) + 500
        if size <= self.room:
            self.room -= size
            self.kept[key] = arrays


def lay_out(
    example: Example,
    layout: LayoutSpec,
    tokenizer: Tokenizer,
    adapters: Mapping,
    rng: np.random.Generator | None = None,
    augment: Sequence[Augment] = (),
    cache: MediaCache | None = None,
    prompt_weight: float = 0.0,
    paired: bool = True,
) -> Row:
    """The row of an example.

    Args:
        example: texts and media.
        layout: the layout.
        tokenizer: the tokenizer.
        adapters: the model's adapters by modality, in its order; `features`, `items`, `positions`, `grid` and
            `length(frames)` are used.
        rng: random generator of the augmentations; None disables them.
        augment: augmentations, applied in order to the media of their modality.
        cache: keeps decoded media.
        prompt_weight: loss weight of texts whose own weight is 0.
        paired: whether an example without a rejected answer is a bad record, if `layout.pairs` is set.

    Raises:
        BadRecord: if a medium is unusable, there are too many media, a label is not as declared, the row is longer
            than the layout allows, an example is no pair although it must be, or there is nothing to learn:
            no text with a loss weight and no label.
    """
    if not example.answer and not example.labelled:
        raise BadRecord("empty text", example.place, "no text with a loss weight")
    read = functools.partial(
        _read, place=example.place, rng=rng, augment=augment if rng is not None else (), cache=cache
    )
    if layout.pairs:
        read = _once(read)
    row = _assemble(example, layout, tokenizer, adapters, read, end=True, prompt_weight=prompt_weight)
    if layout.pairs and example.rejected is None and not paired:
        row = pairs.single(row)
    elif layout.pairs:
        rejected = pairs.rejected(example)
        row = pairs.joined(row, _assemble(rejected, layout, tokenizer, adapters, read, end=True))
    if len(row) > layout.seq_len:
        raise BadRecord(
            "too long",
            example.place,
            f"{len(row)} positions, a row of the layout has {layout.seq_len}: raise seq_len",
        )
    return row


def prompt_batch(
    prompts: Sequence[Iterable[Text | Medium]],
    layout: LayoutSpec,
    tokenizer: Tokenizer,
    adapters: Mapping,
    places: Sequence[str] | None = None,
) -> Batch:
    """Rows of prompts for generation: like the beginning of a row from `lay_out`, without `eos` and loss weights.

    Args:
        prompts: texts and media in reading order.
        layout, tokenizer, adapters: as in `lay_out`.
        places: names of the prompts in error messages; "prompt 0", ... by default.

    Returns:
        A batch with one row per prompt, padded on the right to the longest.

    Raises:
        BadRecord: if a medium cannot be used, there are too many media, or a prompt is longer than the layout allows.
    """
    rows = []
    for i, parts in enumerate(prompts):
        example = Example(tuple(parts), places[i] if places else f"prompt {i}")
        read = functools.partial(_read, place=example.place, rng=None, augment=(), cache=None)
        row = _assemble(example, layout, tokenizer, adapters, read, end=False)
        if len(row) > layout.seq_len:
            raise BadRecord(
                "too long",
                example.place,
                f"{len(row)} positions, a row of the layout has {layout.seq_len}: raise seq_len",
            )
        rows.append(dataclasses.replace(row, weight=np.zeros_like(row.weight)))
    return collate(rows, max((len(row) for row in rows), default=1), adapters)


def _assemble(example, layout, tokenizer, adapters, read, end: bool, prompt_weight: float = 0.0) -> Row:
    """The row of an example of any length t, arrays [t].

    Args:
        read: gives the features of a medium, and the number of their real frames.
        end: whether to append `eos`; if not, the whole example is a prompt.
        prompt_weight: see `lay_out`.
    """
    numbers = {name: number for number, name in enumerate(adapters, start=1)}
    media = {name: [] for name in adapters}
    parts = example.parts
    if layout.fusion == "prefix":
        parts = sorted(parts, key=lambda part: isinstance(part, Text))  # a stable sort: media first, in their order
    # Numbers of the last span and of the prompt's span.
    spans = prompt_span = PROMPT if layout.prompt_span == "bidirectional" else 0
    # Runs of positions: token ids (zeros for media), modality, first slot, span, weight of the tokens, media grid.
    runs = [(np.array([tokenizer.bos], np.int32), TEXT, 0, prompt_span, 0.0, None)]
    weight, labelled = 0.0, []
    for part in parts:
        if isinstance(part, Text):
            if end and part.weight > 0:
                prompt_span = 0
            labelled.append((len(runs), part.labels))
            weight = part.weight or (0.0 if part.special else prompt_weight)
            ids = np.array([tokenizer.special_id(part.text)], np.int32) if part.special else tokenizer.encode(part.text)
            runs.append((ids, TEXT, 0, prompt_span, weight, None))
            continue
        name = part.modality
        if name not in adapters:
            detail = f"{name!r}: {nearest(name, adapters)}" if adapters else f"{name!r}: it reads only text"
            raise BadRecord("the model has no such adapter", example.place, detail)
        adapter, items = adapters[name], media[name]
        if len(items) == adapter.items:
            raise BadRecord(
                "too many media",
                example.place,
                f"the model takes {adapter.items} of {name} per row: raise the adapter's items",
            )
        features, frames = read(part, adapter.features)
        length = adapter.length(frames)
        span = prompt_span
        if not span and layout.media_span == "bidirectional":
            span = spans = 1 if layout.fusion == "prefix" else spans + 1
        first_slot = len(items) * adapter.positions
        runs.append((np.zeros(length, np.int32), numbers[name], first_slot, span, 0.0, adapter.grid))
        items.append((features, length))
    if end:
        labelled.append((len(runs), example.labels))
        runs.append((np.array([tokenizer.eos], np.int32), TEXT, 0, 0, weight, None))
    row = _row(runs, media)
    if not (layout.labels or example.labelled):
        return row
    stops = np.cumsum([len(run[0]) for run in runs])
    places = ((slice(stops[i] - len(runs[i][0]), stops[i]), labels) for i, labels in labelled)
    return dataclasses.replace(row, extra=label_arrays(layout.labels, places, len(row), example.place))


def _row(runs: list[tuple], media: dict) -> Row:
    """Concatenates runs of positions into arrays [t], where t is the sum of their lengths.

    The coordinates of a run begin after the largest coordinate before it: Qwen2-VL (2409.12191), section 2.1.
    """
    tokens, modality, slot, span, target = np.zeros((5, sum(len(run[0]) for run in runs)), np.int32)
    position = np.arange(len(tokens), dtype=np.int32)
    coordinate = np.zeros((len(tokens), 3), np.int32)
    weight = np.zeros(len(tokens) + 1, np.float32)
    stop = origin = 0
    for ids, number, first_slot, run_span, run_weight, grid in runs:
        start, stop = stop, stop + len(ids)
        tokens[start:stop], span[start:stop] = ids, run_span
        if number == TEXT:
            weight[start:stop] = run_weight
            coordinate[start:stop] = origin + position[: stop - start, None]
        else:
            modality[start:stop] = number
            slot[start:stop] = position[: stop - start] + first_slot
            coordinate[start:stop] = origin + coordinates(grid)[: stop - start]
        origin = int(coordinate[start:stop].max(initial=origin - 1)) + 1
    target[:-1] = tokens[1:]
    return Row(tokens, modality, slot, position, np.ones_like(tokens), span, target, weight[1:], coordinate, media)


def _once(read):
    """`read` that augments each medium once: both segments of a pair have the same."""
    kept = {}

    def again(medium, features):
        if id(medium) not in kept:
            kept[id(medium)] = read(medium, features)
        return kept[id(medium)]

    return again


def _read(medium: Medium, features, place: str, rng, augment, cache) -> tuple[np.ndarray, int]:
    """The augmented features of a medium, float32 of `features.shape`, and the number of their real frames."""
    if isinstance(medium.source, Path):
        place = f"{place}: {medium.source}"
    augment = [a for a in augment if a.modality == medium.modality]
    raw_stage = [a for a in augment if a.stage == "raw"]
    key = (
        repr(features),
        bool(raw_stage),
        medium.source,
    )  # the repr, since a specification with a mapping is not hashable
    kept = cache.kept.get(key) if cache else None
    if raw_stage:
        raw = kept[0] if kept else features.decode(medium.source, place)
        if cache and not kept:
            cache.put(key, (raw,))
        for change in raw_stage:
            raw = change(raw, rng)
        array, frames = features.extract(raw)
    else:
        array, frames = kept or features.load(medium.source, place)
        if cache and not kept:
            cache.put(key, (array, frames))
    if len(raw_stage) < len(augment):
        array = array.copy()  # the cache holds the original
        real = features.real(array, frames)
        for change in augment:
            if change.stage == "features":
                real[...] = change(real, rng)
    return array, frames
