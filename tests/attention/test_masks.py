"""Mask predicates against a reference that asks one pair of positions at a time."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from polygpt.attention.masks import DECODER, ENCODER, And, Causal, Meta, Not, Or, SameSegment, SameSpan, allowed
from polygpt.spec import from_json, to_json

SIMPLE = {
    Causal: lambda q, k: k["index"] <= q["index"],
    SameSegment: lambda q, k: k["segment"] == q["segment"],
    SameSpan: lambda q, k: k["span"] == q["span"] and q["span"] != 0,
}
MASKS = st.recursive(
    st.sampled_from([Causal(), SameSegment(), SameSpan()]),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=6,
)


def sees(mask, query, key) -> bool:
    if isinstance(mask, And):
        return sees(mask.left, query, key) and sees(mask.right, query, key)
    if isinstance(mask, Or):
        return sees(mask.left, query, key) or sees(mask.right, query, key)
    if isinstance(mask, Not):
        return not sees(mask.inner, query, key)
    return SIMPLE[type(mask)](query, key)


def reference(mask, query: Meta, key: Meta) -> np.ndarray:
    B, T, S = *query.index.shape, key.index.shape[1]
    matrix = np.zeros((B, T, S), bool)
    for b, t, s in np.ndindex(B, T, S):
        q = {name: array[b, t] for name, array in vars(query).items()}
        k = {name: array[b, s] for name, array in vars(key).items()}
        matrix[b, t, s] = k["segment"] != 0 and sees(mask, q, k)
    return matrix


@st.composite
def metas(draw, rows: int = 2):
    length = draw(st.integers(1, 7))
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    index = np.broadcast_to(np.arange(length) + draw(st.integers(0, 5)), (rows, length))
    segment, span, modality = (rng.integers(0, high, (rows, length)) for high in (4, 3, 2))
    return Meta(index, index, segment, span, modality)


@settings(max_examples=150, deadline=None)
@given(MASKS, metas(), metas())
def test_a_composed_predicate_is_what_its_parts_say(mask, query, key):
    np.testing.assert_array_equal(allowed(mask, query, key), reference(mask, query, key))


@settings(max_examples=50, deadline=None)
@given(MASKS)
def test_masks_go_through_json_and_hash(mask):
    assert from_json(to_json(mask)) == mask and hash(from_json(to_json(mask))) == hash(mask)


def row(**arrays) -> Meta:
    length = len(next(iter(arrays.values())))
    fields = dict.fromkeys(("position", "segment", "span", "modality"), np.zeros(length, int)) | arrays
    return Meta(np.arange(length)[None], **{name: np.asarray(value)[None] for name, value in fields.items()})


def picture(matrix) -> list[str]:
    return ["".join(".#"[int(cell)] for cell in line) for line in matrix]


def test_the_decoder_sees_its_own_past_and_its_own_span():
    meta = row(segment=[1, 1, 1, 1, 2, 2, 0], span=[0, 1, 1, 0, 0, 0, 0])
    assert picture(allowed(DECODER, meta, meta)[0]) == [
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
    assert picture(allowed(DECODER, meta, meta)[0]) == ["##..", "##..", "..##", "..##"]


def test_an_encoder_sees_all_of_its_item_and_no_padding():
    meta = row(segment=[1, 1, 0])
    assert picture(allowed(ENCODER, meta, meta)[0]) == ["##.", "##.", "..."]


def test_padding_is_never_seen_whatever_the_predicate_says():
    meta = row(segment=[1, 0])
    assert picture(allowed(Causal() | ~Causal(), meta, meta)[0]) == ["#.", "#."]
