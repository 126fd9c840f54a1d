"""Block maps against the dense mask, and the arithmetic of intervals against every number in them."""

import itertools
import logging
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_masks import MASKS, SIMPLE, arbitrary, metas, packed, picture, row

from polygpt.attention.kernels.block_map import EMPTY, FULL, PARTIAL, Counts, block_map, count, exact_block_map
from polygpt.attention.kernels.intervals import Interval, Ternary
from polygpt.attention.masks import (
    DECODER,
    ENCODER,
    Blockwise,
    Causal,
    Global,
    Mask,
    Prefix,
    SameSegment,
    Sinks,
    Strided,
    Window,
    allowed,
)
from polygpt.attention.meta import Meta

# --- intervals --------------------------------------------------------------------------------------------------------

LOW = st.integers(-9, 9)
RANGES = st.builds(lambda low, size: (low, low + size), LOW, st.integers(0, 5))
CONSTANTS = st.sampled_from([-4, -3, -1, 1, 2, 3, 7])
BINARY = [operator.add, operator.sub, operator.mul]
COMPARISONS = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]


def members(bounds):
    return range(bounds[0], bounds[1] + 1)


def holds(interval: Interval, values) -> None:
    assert all(interval.low <= value <= interval.high for value in values)


@settings(max_examples=100, deadline=None)
@given(RANGES, RANGES, CONSTANTS)
def test_results_of_members_are_members_of_the_result(a, b, constant):
    x, y = (Interval(*map(np.int32, bounds)) for bounds in (a, b))
    for apply in BINARY:
        holds(apply(x, y), itertools.starmap(apply, itertools.product(members(a), members(b))))
        holds(apply(x, constant), [apply(value, constant) for value in members(a)])
        holds(apply(constant, x), [apply(constant, value) for value in members(a)])
    for apply in (operator.floordiv, operator.mod):
        holds(apply(x, constant), [apply(value, constant) for value in members(a)])
    for apply in (operator.neg, operator.pos, abs):
        holds(apply(x), map(apply, members(a)))
    for apply in COMPARISONS:
        for pair, other in ((y, b), (constant, (constant, constant))):
            values = {apply(*numbers) for numbers in itertools.product(members(a), members(other))}
            answer = apply(x, pair)
            assert (bool(answer.surely), bool(answer.possibly)) == (values == {True}, True in values), "independent"


TRUTHS = [(False, False), (False, True), (True, True)]


@pytest.mark.parametrize("a", TRUTHS)
@pytest.mark.parametrize("b", [*TRUTHS, True, False])
@pytest.mark.parametrize("apply", [operator.and_, operator.or_, operator.xor, operator.eq, operator.ne])
def test_three_valued_logic_knows_what_follows(a, b, apply):
    def values(truth):
        return {truth} if isinstance(truth, bool) else set(truth)

    other = b if isinstance(b, bool) else Ternary(*map(np.bool_, b))
    results = {apply(*pair) for pair in itertools.product(values(a), values(b))}
    for answer in (apply(Ternary(*map(np.bool_, a)), other), apply(other, Ternary(*map(np.bool_, a)))):
        assert (bool(answer.surely), bool(answer.possibly)) == (results == {True}, True in results)
        assert (bool((~answer).surely), bool((~answer).possibly)) == (results == {False}, False in results)


def test_arrays_on_either_side_of_a_range():
    x = Interval(np.int32([0, 3]), np.int32([2, 5]))
    for one in (np.int32([1, 1]), jnp.int32([1, 1])):
        assert (one + x).low.tolist() == (x + one).low.tolist() == [1, 4]
        assert (one - x).high.tolist() == [1, -2]
        assert (one < x).possibly.tolist() == (x > one).possibly.tolist() == [True, True]
        assert (one == x).possibly.tolist() == [True, False]
        assert ((one > 0) & (x > 2)).surely.tolist() == [False, True]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x % 0,
        lambda x: x // x,
        lambda x: x % 1.5,
        lambda x: x == "text",
        lambda x: x == (x > 0),
        lambda x: (x > 0) & 3,
        lambda x: not x,
        lambda x: 0 < x < 3,
        lambda x: jnp.where(x > 0, 1, 0),
        lambda x: np.maximum(x, 3),
        lambda x: hash(x),
    ],
)
def test_what_means_nothing_for_a_range_raises(wrong):
    with pytest.raises(TypeError):
        wrong(Interval(np.int32(0), np.int32(5)))


# --- the map against the dense mask -----------------------------------------------------------------------------------


def tiles(matrix, block_q: int, block_k: int):
    """(row, column, tile) of every block of a matrix [T, S]."""
    T, S = matrix.shape
    for i, j in itertools.product(range(-(-T // block_q)), range(-(-S // block_k))):
        yield i, j, matrix[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]


def by_hand(mask, query: Meta, key: Meta, block_q: int, block_k: int) -> np.ndarray:
    """The exact map, from the dense mask."""
    blocks = []
    for visible, q, k in zip(np.asarray(allowed(mask, query, key)), query.segment, key.segment, strict=True):
        real = (q > 0)[:, None] & (k > 0)[None]
        kinds = np.zeros((-(-visible.shape[0] // block_q), -(-visible.shape[1] // block_k)), np.int8)
        for i, j, tile in tiles(np.stack([visible, real], axis=-1).view("u1,u1").squeeze(-1), block_q, block_k):
            whole = tile.shape == (block_q, block_k) and tile["f1"].all()
            kinds[i, j] = FULL if whole and tile["f0"].all() else PARTIAL if tile["f0"].any() else EMPTY
        blocks.append(kinds)
    return np.stack(blocks)


ROWS, T, SIZES = 12, 13, (5, 3)
eager = block_map.__wrapped__  # compiling anew for every mask would take most of the time; so would many shapes


@settings(max_examples=50, deadline=None)
@given(MASKS | SIMPLE, metas(lengths=(T,), rows=ROWS), metas(lengths=(T,), rows=ROWS))
def test_what_the_map_decides_is_so(mask, query, key):
    exact, found = by_hand(mask, query, key, *SIZES), np.asarray(eager(mask, query, key, *SIZES))
    assert found.shape == exact.shape and found.dtype == np.int8
    wrong = (found != PARTIAL) & (found != exact)
    assert not wrong.any(), np.argwhere(wrong)


@settings(max_examples=40, deadline=None)
@given(MASKS, metas(lengths=(T,), rows=ROWS))
def test_composed_with_the_decoders_mask_it_decides_soundly_too(mask, meta):
    for whole in (DECODER & mask, DECODER | mask):
        exact, found = by_hand(whole, meta, meta, *SIZES), np.asarray(eager(whole, meta, meta, *SIZES))
        assert not ((found != PARTIAL) & (found != exact)).any()


COMMON = [
    DECODER,
    ENCODER,
    Causal(),
    SameSegment(),
    DECODER & Window(1),
    DECODER & Window(3),
    DECODER & Window(9),
    ENCODER & Window(3),
    DECODER & Blockwise(3),
    ENCODER & Blockwise(2, 1),
    DECODER & (Blockwise(4, 1) | Global(3)),
    SameSegment() & (Causal() | Prefix(5)),
]


@pytest.mark.parametrize("mask", COMMON, ids=str)
def test_nothing_is_lost_in_packed_rows_without_spans(mask):
    for seed in range(4):
        rows = packed(np.random.default_rng(seed), ROWS, T, spans=False)
        np.testing.assert_array_equal(eager(mask, rows, rows, *SIZES), by_hand(mask, rows, rows, *SIZES))


@pytest.mark.parametrize("mask", [DECODER & (Window(3) | Sinks(2)), DECODER & (Window(2) | Prefix(3))], ids=str)
def test_every_empty_block_is_found_where_one_of_two_parts_shows_each_pair(mask):
    """A block may be full of pairs of which some are shown by one part and the rest by the other: that is lost."""
    for seed in range(4):
        rows = packed(np.random.default_rng(seed), ROWS, T, spans=False)
        exact, found = by_hand(mask, rows, rows, *SIZES), np.asarray(eager(mask, rows, rows, *SIZES))
        np.testing.assert_array_equal(found == EMPTY, exact == EMPTY)
        assert not ((found == FULL) & (exact != FULL)).any()


def uniform(length: int, examples: int = 1, rows: int = 1) -> Meta:
    """Rows of examples of equal length."""
    index = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    each = -(-length // examples)
    return Meta(index, index % each, index // each + 1, 0 * index, 0 * index)


def test_a_stride_is_in_every_block_and_a_stride_of_blocks_in_some():
    meta = uniform(16)
    mask = Causal() & Strided(8)
    assert picture(np.asarray(block_map(mask, meta, meta, 4, 4))[0], ".o#") == ["o...", ".o..", "o.o.", ".o.o"]
    np.testing.assert_array_equal(block_map(mask, meta, meta, 4, 4), by_hand(mask, meta, meta, 4, 4))


def test_a_row_with_pictures_between_words_loses_nothing():
    """Spans that begin and end within blocks, and words before and after them."""
    span = [0, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 2, 0, 0, 3, 3]
    meta = row(position=range(16), segment=[1] * 16, span=span)
    found = np.asarray(block_map(DECODER, meta, meta, 4, 4))
    assert picture(found[0], ".o#") == ["o...", "#oo.", "###.", "###o"]
    np.testing.assert_array_equal(found, by_hand(DECODER, meta, meta, 4, 4))


def test_what_is_lost_is_called_partial():
    """Each part of this mask may hold in a block where the two never hold together."""
    meta, mask = uniform(12), Strided(2) & Strided(3)
    exact, found = (f(mask, meta, meta, 2, 2) for f in (by_hand, block_map))
    assert (exact[0, 0, 1], found[0, 0, 1]) == (EMPTY, PARTIAL)


@pytest.mark.parametrize("mask", [DECODER, Causal(), ENCODER & Window(3)], ids=str)
def test_the_exact_map_is_that_of_the_dense_mask(mask):
    rng = np.random.default_rng(1)
    query, key = packed(rng, 2, 13), arbitrary(rng, 2, 16)
    np.testing.assert_array_equal(exact_block_map(mask, query, key, 5, 3), by_hand(mask, query, key, 5, 3))


def test_padding_is_never_full_and_what_padding_sees_is_not_empty():
    meta = row(segment=[1, 1, 1, 0, 0, 0])
    assert picture(np.asarray(block_map(Window(9), meta, meta, 2, 2))[0], ".o#") == ["#o.", "oo.", "oo."]
    assert picture(np.asarray(block_map(ENCODER, meta, meta, 2, 2))[0], ".o#") == ["#o.", "oo.", "..."]
    ragged = row(segment=[1, 1, 1])
    assert picture(np.asarray(block_map(ENCODER, ragged, ragged, 2, 2))[0], ".o#") == ["#o", "oo"]


def test_under_jit_and_vmap_and_for_a_decode_step():
    meta = uniform(16, 2, rows=2)
    mask = DECODER & Window(5)
    expected = by_hand(mask, meta, meta, 4, 4)
    one_row = jax.vmap(lambda m: block_map(mask, jax.tree.map(lambda x: x[None], m), add_row(m), 4, 4)[0])
    np.testing.assert_array_equal(jax.jit(one_row)(jax.tree.map(jnp.asarray, meta)), expected)
    last = jax.tree.map(lambda x: x[:, -1:], meta)
    np.testing.assert_array_equal(block_map(mask, last, meta, 1, 4), by_hand(mask, last, meta, 1, 4))


def add_row(meta: Meta) -> Meta:
    return jax.tree.map(lambda x: x[None], meta)


# --- predicates that have no meaning on ranges ------------------------------------------------------------------------


class Even(Mask):
    """The key's position is even, said with a function of arrays."""

    def __call__(self, query, key):
        return jnp.bitwise_and(key.position, 1) == 0


class Any(Mask):
    """No truth value at all for ranges: it does not look at its arguments."""

    def __call__(self, query, key):
        return True


@pytest.mark.parametrize("cls", [Even, Any])
def test_a_predicate_of_arrays_gets_the_exact_map_and_a_line_in_the_log(cls, caplog):
    meta = uniform(13, 2)
    mask = DECODER & cls() if cls is Even else cls()
    with caplog.at_level(logging.WARNING):
        for size in (4, 3):
            found = block_map(mask, meta, meta, size, size)
            np.testing.assert_array_equal(found, by_hand(mask, meta, meta, size, size))
    said = [record.message for record in caplog.records if record.name.endswith("block_map")]
    assert len(said) == 1 and cls.__name__ in said[0] and "asks every pair" in said[0]


# --- counts -----------------------------------------------------------------------------------------------------------


def test_counts_say_how_sparse_a_mask_is():
    meta = uniform(12)
    counted = count(block_map(DECODER, meta, meta, 4, 4))
    assert counted == Counts(empty=3, partial=3, full=3)
    assert str(counted) == "3 empty, 3 partial, 3 full of 9"
    assert counted.total == 9 and counted.skipped == pytest.approx(1 / 3)
    assert Counts(0, 0, 0).skipped == 0


def test_a_map_of_a_long_row_needs_no_matrix_of_pairs():
    """16384 positions in blocks of 256: the program holds megabytes, not the quarter of a gigabyte of pairs."""
    meta = jax.ShapeDtypeStruct((1, 16384), jnp.int32)
    compiled = block_map.lower(DECODER & Window(1024), Meta(*[meta] * 5), Meta(*[meta] * 5), 256, 256).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16384**2 / 16
