"""Files written whole or not at all, and strict JSON data."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from polygpt.files import plain, write_atomically


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    place = tmp_path / "page.html"
    write_atomically(place, "é")
    assert place.read_text(encoding="utf-8") == "é"
    with pytest.raises(UnicodeEncodeError):
        write_atomically(place, "begun \ud800")
    assert place.read_text(encoding="utf-8") == "é" and list(tmp_path.iterdir()) == [place]


def test_data_become_strict_json():
    data = {1: (np.float32(0.5), np.int64(3), np.bool_(True)), "b": [math.inf, -math.inf, math.nan, np.float64("nan")]}
    data |= {"c": {"place": Path("a/b"), "flag": False, "none": None, "n": 2**70}}
    read = json.loads(json.dumps(plain(data), allow_nan=False))
    assert read["1"] == [0.5, 3, True] and read["b"] == [None] * 4
    assert read["c"] == {"place": "a/b", "flag": False, "none": None, "n": 2**70}
