"""Showing rows: every position in the table, every medium in the picture, no text taken for markup."""

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from polygpt.data.example import Example, Medium, Text
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.packing import Packer
from polygpt.data.show import beginning, draw, runs, table, token_text


@pytest.fixture
def batch(small):
    """A row of two packed examples, and a row of padding alone."""
    layout = LayoutSpec(seq_len=48, media_span="bidirectional")
    parts = [
        (Text("see ", 0.0), Medium("image", small.png(1)), Medium("image", small.png(2)), Text("[red]\n$5é", 1.0)),
        (Medium("audio", small.flac(1)), Text("yes", 1.0)),
    ]
    packer = Packer(2, 48, small.adapters, packing=True)
    for i, some in enumerate(parts):
        assert packer.add(lay_out(Example(some, f"example {i}"), layout, small.tokenizer, small.adapters))
    return packer.batch()


def printed(renderable) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(renderable)
    return console.file.getvalue()


def cells(result, column):
    return [str(cell) for cell in result.columns[column].cells]


def test_the_table_has_every_position_of_the_row(small, batch):
    result = table(batch, 0, small.tokenizer)
    used = int((batch.segment_BT[0] > 0).sum())
    assert cells(result, 0) == [str(t) for t in range(used)]
    assert cells(result, 1)[:14] == ["text"] * 5 + ["image"] * 8 + ["text"]
    assert cells(result, 2)[:6] == ["<bos>", "s", "e", "e", " ", ""]
    assert cells(result, 5) == [str(segment) for segment in batch.segment_BT[0, :used]]
    targets, weights = cells(result, 7), cells(result, 8)
    assert targets[0] == "s" and weights[0] == ""
    assert targets[12] == "[" and weights[12] == "1"  # the last position of the picture predicts the answer
    assert targets[4] == "" and targets[-1] == "" and targets.count("<eos>") == 2
    text = printed(result)
    assert f"row 0: {used} of 48 positions, 2 examples" in text
    assert "\\n" in text and "[" in text


def test_the_beginning_is_the_first_example_without_the_middle_of_its_media(small, batch):
    first = int((batch.segment_BT[0] == 1).sum())
    shown = beginning(batch, 0, 100)
    assert shown[:8] == [*range(8)] and shown[-1] == first - 1, "pictures of 4 positions are shown whole"
    one = {"slot_BT": np.maximum(batch.slot_BT, np.arange(48)), "span_BT": np.minimum(batch.span_BT, 1)}
    longer = batch.replace(**one)  # one picture of 8 positions
    assert beginning(longer, 0, 100) == [*range(7), 12, *range(13, first)]
    assert beginning(longer, 0, 9) == [*range(7), 12, 13]
    assert cells(table(longer, 0, small.tokenizer, [*range(7), 12, 13]), 0)[6:] == ["6", "…", "12", "13"]
    assert beginning(batch, 1, 100) == []


def test_a_row_of_padding_is_an_empty_table(small, batch):
    assert table(batch, 1, small.tokenizer).row_count == 0


def test_tokens_are_shown_readably(small):
    shown = [token_text(small.tokenizer, token) for token in (97, 10, 0xC3, 256, 257)]
    assert shown == ["a", "\\n", "#195", "<bos>", "<eos>"]


def test_runs_are_texts_media_and_padding(batch):
    found = runs(batch, 0)
    assert [start for start, _ in found[1:]] == [stop for _, stop in found[:-1]]
    assert found[0][0] == 0 and found[-1][1] == 48
    assert (5, 9) in found and (9, 13) in found  # two pictures that touch
    for start, stop in found:
        assert len(set(batch.modality_BT[0, start:stop])) == len(set(batch.segment_BT[0, start:stop])) == 1


def test_the_picture_shows_the_media(small, batch, tmp_path):
    path = draw(batch, small.tokenizer, small.adapters, tmp_path / "rows.png")
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width >= 1000
        pixels = np.asarray(image.convert("RGB"))
    for colour in [(0, 128, 0), (255, 0, 255), (255, 0, 0)]:  # green pictures, magenta recordings, red ends
        assert (np.abs(pixels.astype(int) - colour).max(axis=-1) < 30).any()
    (tmp_path / "blank").mkdir()
    blank = batch.media["image"].features.copy()
    blank[:] = 1
    white = batch.replace(
        media={**batch.media, "image": type(batch.media["image"])(blank, batch.media["image"].length_BN)}
    )
    again = draw(white, small.tokenizer, small.adapters, tmp_path / "blank" / "rows.png")
    assert again.read_bytes() != path.read_bytes()
