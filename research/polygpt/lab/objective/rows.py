"""The model and the rows on which objectives are checked: packed examples of text, images and audio, and padding."""

import dataclasses
import io
from collections.abc import Mapping

import jax
import numpy as np
import soundfile
from PIL import Image

from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.image import ImageAdapter
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.stack import StackSpec
from polygpt.data.example import Example, Medium, Text
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.media.audio import LogMel
from polygpt.data.media.image import ImageFeatures
from polygpt.data.packing import Row, collate, pack
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.mlp import GatedMLP
from polygpt.sequence import Batch, Media

VOCABULARY = 512
"""Ids of the model. Those of the text, bytes, are below 258."""
WIDTH, LENGTH = 16, 40
"""D and T."""
ROWS = 16
"""B. Half of the rows are padding, so that every example fits into a row of its own."""
PACKED = (3, 1, 2, 2, 1, 2, 3, 2)
"""Examples per row."""
TOWER = StackSpec(width=8, depth=0, attention=MultiHead(heads=2))
MODEL = ModelSpec(
    DecoderSpec(width=WIDTH, depth=2, attention=MultiHead(heads=2), mlp=GatedMLP(multiple=8), tied=False),
    {
        "image": ImageAdapter(ImageFeatures(8, 8, channels=1), items=2, patch=4, tower=TOWER),
        "audio": AudioAdapter(LogMel(0.08, rate=8000, mels=8, window=200, hop=80), items=2, fold=2, tower=TOWER),
    },
)
"""The model, before what an objective needs of it. Its embedding is not its head: each can be changed alone."""


def _picture(rng: np.random.Generator) -> Medium:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(file, "PNG")
    return Medium("image", file.getvalue())


def _recording(rng: np.random.Generator) -> Medium:
    file = io.BytesIO()
    soundfile.write(file, rng.normal(0, 0.2, 480), 8000, format="WAV")
    return Medium("audio", file.getvalue())


def _text(rng: np.random.Generator, letters: int, weight: float = 1.0) -> Text:
    return Text("".join(map(chr, rng.integers(32, 127, letters))), weight)


def _example(count: int, seed: int) -> Example:
    """An example that fits `count` times into a row, up to 4 times."""
    rng = np.random.default_rng(seed)
    kind = seed % 4
    if count >= 3:
        parts = {
            0: [_picture(rng), _text(rng, 3)],
            1: [_text(rng, 2, 0), _text(rng, 4)],
            2: [_recording(rng), _text(rng, 4, 0.5)],
            3: [_text(rng, 6)],
        }[kind]
    elif count == 2:
        parts = {
            0: [_text(rng, 3), _picture(rng), _text(rng, 5)],
            1: [_text(rng, 4, 0), _recording(rng), _text(rng, 5)],
            2: [_recording(rng), _picture(rng), _text(rng, 4, 0.5)],
            3: [_text(rng, 6, 0), _text(rng, 6)],
        }[kind]
    else:
        parts = [_picture(rng), _text(rng, 5, 0), _recording(rng), _text(rng, 12)]
    return Example(tuple(parts), f"example {seed}")


def packed(adapters: Mapping, together: int = 1) -> Batch:
    """The batch [ROWS, LENGTH] of NumPy arrays. The numbers of examples per row are multiples of `together`, 1 or 2."""
    layout, tokenizer = LayoutSpec(LENGTH), Bytes().build()
    rows: list[Row | None] = []
    for b, count in enumerate(PACKED):
        count = count if together == 1 else together * (1 + b % 2)
        examples = [_example(count, seed=7 * b + i) for i in range(count)]
        rows.append(pack([lay_out(one, layout, tokenizer, adapters) for one in examples], adapters))
    return collate(rows + [None] * (ROWS - len(rows)), LENGTH, adapters)


def numbers(batch: Batch) -> np.ndarray:
    """int [B, T]: the number of the example at each position, from 1; 0 at padding."""
    count_B = batch.segment_BT.max(axis=1)
    before_B = np.cumsum(count_B) - count_B
    return np.where(batch.segment_BT > 0, batch.segment_BT + before_B[:, None], 0)


def taken(batch: Batch, rows: list[tuple[int, list[int]]], positions: dict[str, int]) -> Batch:
    """The batch with other rows: each holds some examples (segments) of one row, in the order given.

    Rows that are not given are padding. `positions` has P of every adapter, in the model's order.
    """
    B, T = batch.shape
    segment_BT = np.asarray(batch.segment_BT)
    row_BT, column_BT = np.full((B, T), B - 1), np.full((B, T), T - 1)  # of a batch from `packed`, padding
    renumbered_BT = np.zeros((B, T), np.int32)
    source_B = np.full(B, B - 1)
    for b, (source, segments) in enumerate(rows):
        found = [np.flatnonzero(segment_BT[source] == segment) for segment in segments]
        here = np.concatenate([*found, np.zeros(0, int)]).astype(int)
        source_B[b], row_BT[b, : len(here)], column_BT[b, : len(here)] = source, source, here
        renumbered_BT[b, : len(here)] = np.repeat(np.arange(len(found)) + 1, [len(one) for one in found])

    def moved(x):
        x = np.asarray(x)
        return x[row_BT, column_BT] if x.shape[:2] == (B, T) else x[source_B]

    media = {}
    arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch) if field.name != "media"}
    arrays = jax.tree.map(moved, arrays) | {"segment_BT": renumbered_BT}
    for number, (name, P) in enumerate(positions.items(), start=1):
        features, length_BN = (
            np.asarray(x)[source_B] for x in (batch.media[name].features, batch.media[name].length_BN)
        )
        used_BN = np.zeros(length_BN.shape, bool)
        b, t = np.nonzero(arrays["modality_BT"] == number)
        used_BN[b, arrays["slot_BT"][b, t] // P] = True
        media[name] = Media(features, np.where(used_BN, length_BN, 0))
    return Batch(**arrays, media=media)


def alone(batch: Batch, together: int) -> list[tuple[int, list[int]]]:
    """Rows for `taken`: every example, or group of examples that belong together, in a row of its own."""
    segment_BT = np.asarray(batch.segment_BT)
    groups = [(b, _groups(segment_BT[b], together)) for b in range(len(segment_BT))]
    return [(b, group) for b, found in groups for group in found]


def reordered(batch: Batch, together: int) -> list[tuple[int, list[int]]]:
    """Rows for `taken`: the last row first, and in each row the last example, or group of examples, first."""
    segment_BT = np.asarray(batch.segment_BT)
    return [(b, sum(_groups(segment_BT[b], together)[::-1], [])) for b in range(len(segment_BT))][::-1]


def _groups(segment_T: np.ndarray, together: int) -> list[list[int]]:
    segments = list(dict.fromkeys(segment_T[segment_T > 0].tolist()))
    return [segments[i : i + together] for i in range(0, len(segments), together)]
