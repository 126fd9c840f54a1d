"""Packing: a packed row is its examples side by side, within the bounds of positions and media items."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygpt import sequence
from polygpt.data.example import Example, Medium, Text
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.packing import POSITION_ARRAYS, Packer, collate, pack
from polygpt.sequence import PADDING

LAYOUT = LayoutSpec(seq_len=64, media_span="bidirectional")


def rows_of(small, seeds):
    return [lay_out(small.example(seed), LAYOUT, small.tokenizer, small.adapters) for seed in seeds]


def embeddings(row, small):
    """What each media position refers to: its item's features and its place within the item."""
    found = []
    for number, name in enumerate(small.adapters, start=1):
        P = small.positions[name]
        for t in np.flatnonzero(row.modality == number):
            item, within = divmod(int(row.slot[t]), P)
            found.append((t, name, row.media[name][item][0].tobytes(), within))
    return found


@given(seeds=st.lists(st.integers(0, 500), min_size=1, max_size=5))
def test_a_packed_row_is_its_examples_side_by_side(small, seeds):
    rows = rows_of(small, seeds)
    packed = pack(rows, small.adapters)
    start = 0
    expected = []
    for number, row in enumerate(rows, start=1):
        here = slice(start, start + len(row))
        for name in ("tokens", "modality", "position", "span", "target", "weight", "coordinate"):
            np.testing.assert_array_equal(getattr(packed, name)[here], getattr(row, name))
        np.testing.assert_array_equal(packed.segment[here], number)
        expected += [(t + start, *rest) for t, *rest in embeddings(row, small)]
        start += len(row)
    assert len(packed) == start
    assert sorted(embeddings(packed, small)) == sorted(expected)


def test_packed_rows_can_be_packed_again(small):
    rows = rows_of(small, range(6))
    once = pack(rows, small.adapters)
    twice = pack([pack(rows[:2], small.adapters), pack(rows[2:], small.adapters)], small.adapters)
    for name in POSITION_ARRAYS:
        np.testing.assert_array_equal(getattr(once, name), getattr(twice, name))


def test_padding_is_zero_and_its_own_modality(small):
    (row,) = rows_of(small, [3])
    batch = collate([row, None], 64, small.adapters)
    assert batch.shape == (2, 64)
    for name, field in POSITION_ARRAYS.items():
        array = getattr(batch, field)
        np.testing.assert_array_equal(array[0, : len(row)], getattr(row, name))
        padding = PADDING if name == "modality" else 0
        assert (array[0, len(row) :] == padding).all() and (array[1] == padding).all()
    dtypes = {name: getattr(batch, field).dtype for name, field in POSITION_ARRAYS.items()}
    expected = dict.fromkeys(POSITION_ARRAYS, np.int32) | {"modality": np.int8, "weight": np.float32}
    assert dtypes == {name: np.dtype(dtype) for name, dtype in expected.items()}


def test_a_row_without_media_has_zero_items(small):
    row = lay_out(Example((Text("words"),), "r"), LAYOUT, small.tokenizer, small.adapters)
    batch = collate([row], 64, small.adapters)
    for name, adapter in small.adapters.items():
        assert batch.media[name].features.shape == (1, adapter.items, *adapter.features.shape)
        assert batch.media[name].features.dtype == np.float32 and batch.media[name].length_BN.dtype == np.int32
        assert not batch.media[name].features.any() and not batch.media[name].length_BN.any()


@given(seeds=st.lists(st.integers(0, 500), min_size=1, max_size=40), packing=st.booleans())
def test_a_packer_keeps_the_bounds_and_loses_nothing(small, seeds, packing):
    packer = Packer(4, LAYOUT.seq_len, small.adapters, packing)
    rows = rows_of(small, seeds)
    taken = [row for row in rows if packer.add(row)]
    batch = packer.batch()
    sequence.check(batch, small.tokenizer.vocabulary, small.positions)
    assert batch.shape == (4, 64)
    assert (batch.segment_BT > 0).sum() == sum(map(len, taken))
    assert batch.segment_BT.max(axis=1).sum() == len(taken)
    for name in small.adapters:
        items = sum(len(row.media[name]) for row in taken)
        assert batch.media[name].valid_BN.sum() == items
    assert len(taken) >= min(4, len(rows))  # an empty row takes any example
    if not packing:
        assert batch.segment_BT.max() <= 1 and packer.closed == (len(rows) >= 4)


def test_the_row_is_closed_by_positions_or_by_items(small):
    short = lay_out(Example((Text("ab"),), "r"), LAYOUT, small.tokenizer, small.adapters)
    heard = Example((Medium("audio", small.flac(0)), Text("ab")), "r")
    heard = lay_out(heard, LAYOUT, small.tokenizer, small.adapters)
    packer = Packer(1, 64, small.adapters, packing=True)
    assert packer.add(heard)
    assert not packer.add(heard)  # one recording a row
    while packer.add(short):
        pass
    batch = packer.batch()
    used = (batch.segment_BT > 0).sum()
    assert 64 - len(short) < used <= 64
    np.testing.assert_array_equal(batch.position_BT[0, used - 4 : used], range(4))


@pytest.mark.parametrize("packing", [False, True])
def test_an_example_of_the_full_length_fits(small, packing):
    row = lay_out(Example((Text("x" * 62),), "r"), LAYOUT, small.tokenizer, small.adapters)
    packer = Packer(2, 64, small.adapters, packing)
    assert packer.add(row) and packer.add(row) and not packer.add(row)
    assert packer.batch().weight_BT.sum() == 2 * 63
