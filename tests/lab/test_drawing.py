"""The picture of a mask: rows read from a line of text, what is drawn, and how many blocks are skipped."""

import json

import numpy as np
import pytest
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from polygpt.attention.masks import DECODER, Window
from polygpt.cli.main import main
from polygpt.errors import UserError
from polygpt.lab import bench, drawing
from polygpt.lab.drawing import blocks, draw, matrix, read_row, text_picture

ROW = "2 image:3 1 | 2 pad:1"


def test_a_row_is_read_from_text():
    row = read_row("2 image:3 | 1 audio:2 image:1 pad:2")
    meta = {name: np.asarray(array)[0].tolist() for name, array in vars(row.meta).items() if name != "extra"}
    assert row.names == ("text", "image", "audio") and row.length == 11
    assert meta["position"] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0]
    assert meta["segment"] == [1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert meta["span"] == [0, 0, 1, 1, 1, 0, 2, 2, 3, 0, 0]
    assert meta["modality"] == [0, 0, 1, 1, 1, 0, 2, 2, 1, -1, -1]
    assert not np.asarray(read_row("image:3", bidirectional=False).meta.span).any()


def test_padding_within_an_example_moves_no_position():
    assert np.asarray(read_row("3 pad:2 3").meta.position)[0].tolist() == [0, 1, 2, 0, 0, 3, 4, 5]


@pytest.mark.parametrize(
    "text, part", [("2 image", "'image'"), ("0", "'0'"), ("image:-1", "'image:-1'"), (" | ", "empty")]
)
def test_a_row_that_cannot_be_read_is_told(text, part):
    with pytest.raises(UserError, match=part):
        read_row(text)


def test_the_picture_in_characters():
    assert text_picture(DECODER, read_row(ROW)).splitlines() == [
        "  TTiiiTTT-",
        "T #........",
        "T ##.......",
        "i #####....",
        "i #####....",
        "i #####....",
        "T ######...",
        "T ......#..",
        "T ......##.",
        "- .........",
    ]


def test_the_picture_shows_the_mask_and_its_blocks(tmp_path):
    row, mask = read_row("16 | 16"), DECODER & Window(4)
    found, exact = blocks(mask, row, 4)
    np.testing.assert_array_equal(found, exact)
    assert (found > 0).sum() == 4 + 3 + 4 + 3, "the diagonal and one block before it, in both examples"
    draw(mask, row, 4, tmp_path / "deep" / "mask.png", "a title")
    pixels = np.asarray(Image.open(tmp_path / "deep" / "mask.png").convert("L"))
    dark = (pixels < 80).mean()  # seen pairs are the dark part of the left half
    assert 0.2 * matrix(mask, row).mean() < dark < 0.6 * matrix(mask, row).mean()


@pytest.mark.parametrize("length", [1024, 2000])
def test_a_long_row_is_drawn_by_its_blocks_alone(monkeypatch, length):
    drawn = []
    monkeypatch.setattr(drawing.picture, "save", lambda figure, path: drawn.append(figure))
    row = read_row(f"{length - 600} image:100 300 | audio:150 pad:50")
    draw(DECODER & Window(64), row, 8, "mask.png", "a title")
    (figure,) = drawn
    shapes = [image.get_array().shape for axes in figure.axes for image in axes.images]
    n = -(-length // 8)
    strips = [(1, length), (length, 1)]
    assert shapes == ([(1024, 1024), *strips, (128, 128)] if length == 1024 else [(n, n), *strips])
    assert len(figure.findobj(Line2D)) < 200 and len(figure.findobj(Rectangle)) < 20, "nothing is drawn by position"
    (strip,) = (image for axes in figure.axes for image in axes.images if image.get_array().shape == (1, length))
    np.testing.assert_array_equal(strip.get_array()[0], row.meta.modality[0])
    assert strip.get_extent()[:2] == [0, length], "beside the positions that it names"


def test_seen_pairs_are_counted_a_few_queries_at_a_time(monkeypatch):
    row = read_row("20 image:9 | 4 pad:2")
    whole = matrix(DECODER, row)
    monkeypatch.setattr(drawing, "DENSE", 8)
    assert drawing.seen(DECODER, row) == whole.sum() == 20 * 21 // 2 + 9 * 29 + 4 * 5 // 2
    np.testing.assert_array_equal(matrix(DECODER, row), whole)


@pytest.mark.parametrize("verb", ["show", "bench"])
@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (".", "is not a picture file: use .png"),
        ("mask", "is not a picture file"),
        ("mask.xyz", "is not a picture file"),
        ("folder.png", "folder.png is a folder"),
        ("file/mask.png", "file/mask.png cannot be written: "),
    ],
)
def test_a_picture_that_cannot_be_written_is_told(tmp_path, monkeypatch, capsys, verb, picture, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "compare", lambda *_: iter(()))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    words = ["attention", verb, "polygpt.attention.multi_head:MultiHead", "--picture", picture]
    assert main([*words, *(["--layout", "4"] if verb == "show" else [])]) == 2
    out, err = capsys.readouterr()
    assert "drawn" not in out and expected in err and err.count("\n") == 1


def test_the_command_says_which_number_a_medium_has(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["attention", "show", "polygpt.attention.multi_head:MultiHead", "--layout", "2 audio:2 image:1 1"]
    assert main(words) == 0
    assert "modalities: text 0, audio 1, image 2" in capsys.readouterr().out


def test_the_command_draws_a_variant_with_its_fields(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "attention",
        "show",
        "polygpt.attention.sliding:SlidingWindow",
        "--window",
        "2",
        "--layout",
        "8",
        "--block-size",
        "4",
    ]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seen"] == 15 and found["blocks"]["map"] == found["blocks"]["exact"] == {
        "empty": 1,
        "partial": 3,
        "full": 0,
    }
    assert (tmp_path / found["picture"]).stat().st_size > 5000
    assert main([*words[:3], "--layout", "8 what"]) == 2
    assert "'what'" in capsys.readouterr().err
