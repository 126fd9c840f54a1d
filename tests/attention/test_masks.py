"""Mask predicates against a reference that asks one pair of positions at a time, and what caches must remember."""

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_masks import MASKS, PAIRS, SIMPLE, arbitrary, metas, packed, picture, reference, row

from polygpt.attention import cache as memory
from polygpt.attention import masks
from polygpt.attention.block_sparse import BlockSparse
from polygpt.attention.contract import Context
from polygpt.attention.masks import (
    DECODER,
    ENCODER,
    And,
    Blockwise,
    Causal,
    Dilated,
    Global,
    KeyModality,
    Mask,
    Not,
    Or,
    Prefix,
    QueryModality,
    Reach,
    SameSegment,
    SameSpan,
    Sinks,
    Strided,
    Window,
    allowed,
)
from polygpt.attention.meta import Meta
from polygpt.attention.sinks import SinksAndWindow
from polygpt.attention.sliding import SlidingWindow
from polygpt.attention.strided import LocalAndStrided
from polygpt.errors import SpecError
from polygpt.spec import field_help, from_json, hints, to_json


@settings(max_examples=200, deadline=None)
@given(MASKS, metas(), metas())
def test_a_composed_predicate_is_what_its_parts_say(mask, query, key):
    np.testing.assert_array_equal(allowed(mask, query, key), reference(mask, query, key))


@settings(max_examples=50, deadline=None)
@given(MASKS)
def test_masks_go_through_json_and_hash(mask):
    assert from_json(to_json(mask)) == mask and hash(from_json(to_json(mask))) == hash(mask)


def test_every_predicate_is_tried_and_explained():
    found = {cls for cls in vars(masks).values() if isinstance(cls, type) and issubclass(cls, Mask)}
    assert found - {Mask} == {*PAIRS, And, Or, Not}
    for cls in found:
        assert cls.__doc__ and set(hints(cls)) <= set(field_help(cls)), cls


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Window(0), "Window.size is 0: it must be at least 1"),
        (lambda: Sinks(0), "Sinks.count is 0: it must be at least 1"),
        (lambda: Global(-1), "Global.count is -1: it must be at least 1"),
        (lambda: Prefix(0), "Prefix.length is 0: it must be at least 1"),
        (lambda: Strided(0), "Strided.stride is 0: it must be at least 1"),
        (lambda: Dilated(0, 2), "Dilated.rate is 0: it must be at least 1"),
        (lambda: Dilated(2, 0), "Dilated.size is 0: it must be at least 1"),
        (lambda: Blockwise(0), "Blockwise.size is 0: it must be at least 1"),
        (lambda: Blockwise(2, -1), "Blockwise.around is -1: it must be at least 0"),
        (lambda: QueryModality(-1), "QueryModality.number is -1: it must be at least 0"),
        (lambda: KeyModality(-1), "KeyModality.number is -1: it must be at least 0"),
        (lambda: SlidingWindow(window=0), "SlidingWindow.window is 0: it must be at least 1"),
        (lambda: SinksAndWindow(sinks=0), "SinksAndWindow.sinks is 0: it must be at least 1"),
        (lambda: LocalAndStrided(stride=0), "LocalAndStrided.stride is 0: it must be at least 1"),
        (lambda: BlockSparse(shared=-1), "BlockSparse.shared is -1: it must be at least 0"),
        (lambda: BlockSparse(heads=0), "BlockSparse.heads is 0: it must be at least 1"),
    ],
)
def test_a_size_without_meaning_is_an_error(make, said):
    with pytest.raises(SpecError, match=said):
        make()


# --- pictures ---------------------------------------------------------------------------------------------------------


def seen(mask, meta) -> list[str]:
    return picture(allowed(mask, meta, meta)[0])


def test_the_decoder_sees_its_own_past_and_its_own_span():
    meta = row(segment=[1, 1, 1, 1, 2, 2, 0], span=[0, 1, 1, 0, 0, 0, 0])
    assert seen(DECODER, meta) == [
        "#......",
        "###....",
        "###....",
        "####...",
        "....#..",
        "....##.",
        ".......",
    ]


def test_spans_of_the_same_number_in_two_segments_are_two_spans():
    meta = row(segment=[1, 1, 2, 2], span=[1, 1, 1, 1])
    assert seen(DECODER, meta) == ["##..", "##..", "..##", "..##"]


def test_an_encoder_sees_all_of_its_item_and_no_padding():
    assert seen(ENCODER, row(segment=[1, 1, 0])) == ["##.", "##.", "..."]


def test_padding_is_never_seen_whatever_the_predicate_says():
    assert seen(Causal() | ~Causal(), row(segment=[1, 0])) == ["#.", "#."]


@pytest.mark.parametrize(
    "variant, lines",
    [
        (SlidingWindow(window=2), ["#....", "##...", ".##..", "..##.", "...##"]),
        (SinksAndWindow(sinks=1, window=2), ["#....", "##...", "###..", "#.##.", "#..##"]),
        (LocalAndStrided(stride=2, window=1), ["#....", ".#...", "#.#..", ".#.#.", "#.#.#"]),
        (LocalAndStrided(stride=3), ["#....", "##...", "###..", "####.", ".####"]),
        (BlockSparse(block=1, around=1, shared=1), ["#....", "##...", "###..", "#.##.", "#..##"]),
        (BlockSparse(block=2, around=0, shared=0), ["#....", "##...", "..#..", "..##.", "....#"]),
    ],
)
def test_a_sparse_variant_in_a_decoder(variant, lines):
    assert seen(variant.mask(DECODER), row(position=range(5), segment=[1] * 5)) == lines


@pytest.mark.parametrize(
    "variant, lines",
    [
        (SlidingWindow(window=2), ["##..", "###.", ".###", "..##"]),
        (SinksAndWindow(sinks=1, window=1), ["#...", "##..", "#.#.", "#..#"]),
        (LocalAndStrided(stride=2, window=1), ["#.#.", ".#.#", "#.#.", ".#.#"]),
        (BlockSparse(block=1, around=0, shared=1), ["####", "##..", "#.#.", "#..#"]),
    ],
)
def test_a_sparse_variant_in_a_tower(variant, lines):
    assert seen(variant.mask(ENCODER), row(position=range(4), segment=[1] * 4)) == lines


def test_distances_are_those_within_an_example():
    """Packed behind another example, and with padding between, the same positions are seen."""
    meta = row(position=[0, 1, 0, 1, 0, 2], segment=[1, 1, 2, 2, 0, 2])
    assert seen(DECODER & Window(2), meta) == ["#.....", "##....", "..#...", "..##..", "......", "...#.#"]


def test_sound_that_sees_text_but_no_pictures():
    meta = row(segment=[1] * 4, modality=[0, 1, 2, 0])
    assert seen(DECODER & ~(QueryModality(2) & KeyModality(1)), meta) == ["#...", "##..", "#.#.", "####"]


def test_a_prefix_language_model():
    meta = row(position=range(4), segment=[1] * 4)
    assert seen(SameSegment() & (Causal() | Prefix(2)), meta) == ["##..", "##..", "###.", "####"]


# --- reach ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask, reach",
    [
        (DECODER, None),
        (ENCODER, None),
        (DECODER & Window(8), Reach(0, 8)),
        (DECODER & (Window(8) | Sinks(2)), Reach(2, 8)),
        ((Causal() | SameSpan()) & Window(3), Reach(0, 3)),
        (DECODER & (Window(8) | Strided(4)), None),
        (DECODER & ~Window(8), None),
        (~(~Window(8) | Causal()), Reach(0, 8)),
        (~~Sinks(3), Reach(3, 0)),
        (Sinks(4) & Window(3), Reach(0, 3)),
        (Blockwise(4, 1), Reach(0, 8)),
        (Dilated(3, 4), Reach(0, 10)),
        (DECODER & (Blockwise(4) | Global(4)), Reach(4, 4)),
        (SlidingWindow(window=5).mask(DECODER), Reach(0, 5)),
        (SinksAndWindow(sinks=2, window=5).mask(DECODER), Reach(2, 5)),
        (LocalAndStrided().mask(DECODER), None),
        (BlockSparse(block=4, around=2, shared=1).mask(DECODER), Reach(4, 12)),
    ],
)
def test_the_reach_of_masks(mask, reach):
    assert mask.reach() == reach


@settings(max_examples=200, deadline=None)
@given(MASKS | SIMPLE, metas(kinds=(packed,), lengths=(16,)))
def test_nothing_beyond_the_reach_is_seen(mask, meta):
    reach = mask.reach()
    assume(reach is not None)
    t, s = meta.position[:, :, None], meta.position[:, None, :]
    own_past = (meta.segment[:, :, None] == meta.segment[:, None, :]) & (s <= t)
    beyond = (s >= reach.first) & (s <= t - reach.last)
    assert not (allowed(mask, meta, meta) & own_past & beyond).any()


# --- the mask of a step over a cache ----------------------------------------------------------------------------------

S = 14
"""Positions of the caches."""
BOUNDED = st.sampled_from([Window(1), Window(3), Window(4) | Sinks(1), Blockwise(2) | Global(2), Dilated(2, 3)])
REMEMBERED = st.builds(lambda a, b: a & b, MASKS.filter(lambda mask: mask.reach() is None), BOUNDED)
PROMPTS = st.sampled_from([(), (7,), (3, 10)])
"""Ends of the pieces of more than one position."""
EXTEND = jax.jit(memory.extend)


def driven(mask, meta, ends, ring: bool) -> tuple[np.ndarray, type]:
    """The visible keys of every query by their index, bool [B, S, S], when the row is read in pieces up to `ends`."""
    B = meta.index.shape[0]
    cache = memory.empty(np.zeros((B, 1, 1, 1), np.int32), S, mask, ring)
    visible = np.zeros((B, S, S + 1), bool)
    begin = 0
    for end in ends:
        query = jax.tree.map(lambda x: x[:, begin:end], meta)  # noqa: B023
        written = jax.tree.map(lambda x: np.where(np.arange(S)[None] < end, x, 0), meta)  # noqa: B023
        context = Context(query, written, DECODER, np.int32(begin))  # the memory does not depend on who looks
        held, key, cache = jax.tree.map(np.asarray, EXTEND(cache, query.index[:, None, :, None] + 1, context))
        allowed_BTK = np.asarray(allowed(mask, query, key))
        for b, t, k in zip(*np.nonzero(allowed_BTK), strict=True):
            value = int(held[b, 0, k, 0])
            assert not visible[b, begin + t, value], "held twice"
            visible[b, begin + t, value] = True
        begin = end
    assert not visible[:, :, 0].any(), "an empty place is visible"
    return visible[:, :, 1:], type(cache)


@settings(max_examples=60, deadline=None)
@given(REMEMBERED | MASKS.filter(lambda mask: mask.reach() is None), st.integers(0, 2**31), PROMPTS, st.booleans())
def test_what_a_step_sees_is_a_row_of_the_dense_mask(mask, seed, prompts, ring):
    """Read whole or in pieces and then position by position, with packed examples, spans, and padding anywhere."""
    mask = DECODER & mask
    meta = packed(np.random.default_rng(seed), 2, S, gaps=True)
    ends = [*prompts, *range(prompts[-1] + 1 if prompts else 1, S + 1)]
    visible, form = driven(mask, meta, ends, ring)
    reach = mask.reach()
    assert (form is memory.Ring) == (ring and reach is not None and reach.first + reach.last < S)
    dense = np.asarray(allowed(mask, meta, meta))
    read = np.repeat(ends, np.diff(ends, prepend=0))  # by query, what had been read by then
    np.testing.assert_array_equal(visible, dense & (np.arange(S)[None] < read[:, None])[None])


def test_a_ring_holds_a_short_prompt_beside_a_long_one():
    """Rows padded at the right to the same length, then continued; each holds its own last positions."""
    position = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 0, 0, 0, 0, 2, 3, 4]], np.int32)
    segment = np.array([[1] * 9, [1, 1, 0, 0, 0, 0, 1, 1, 1]], np.int32)
    index = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    meta = Meta(index, position, segment, 0 * index, 0 * index)
    mask = DECODER & (Window(2) | Sinks(1))
    cache = memory.empty(np.zeros((2, 1, 1, 1), np.int32), 9, mask)
    begin = 0
    for end in (6, 7, 8, 9):
        query = jax.tree.map(lambda x: x[:, begin:end], meta)  # noqa: B023
        _, _, cache = EXTEND(cache, query.index[:, None, :, None], Context(query, meta, mask, np.int32(begin)))
        begin = end
    assert cache.arrays.shape == (2, 1, 3, 1)
    assert [sorted(held) for held in cache.arrays[:, 0, :, 0].tolist()] == [[0, 7, 8], [0, 7, 8]]
    assert [sorted(held) for held in cache.meta.position.tolist()] == [[0, 7, 8], [0, 3, 4]]


def test_arbitrary_metadata_is_arbitrary():
    """The generators above make what they promise: padding, several examples, spans."""
    rng = np.random.default_rng(0)
    for meta in (arbitrary(rng, 20, 9), packed(rng, 20, 14, gaps=True)):
        assert {0, 1, 2, 3} <= set(meta.segment.ravel().tolist()) and (meta.span > 1).any()
        assert ((meta.segment > 0) & (meta.modality == 2)).any()
