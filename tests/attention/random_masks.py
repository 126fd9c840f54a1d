"""Masks composed at random of every predicate, and rows to try them on."""

import numpy as np
from hypothesis import strategies as st

from polygpt.attention.masks import (
    And,
    Blockwise,
    Causal,
    Dilated,
    Global,
    KeyModality,
    Not,
    Or,
    Prefix,
    QueryModality,
    SameModality,
    SameSegment,
    SameSpan,
    Sinks,
    Strided,
    Window,
)
from polygpt.attention.meta import Meta

PAIRS = {
    Causal: lambda m, q, k: k["index"] <= q["index"],
    SameSegment: lambda m, q, k: k["segment"] == q["segment"],
    SameSpan: lambda m, q, k: k["span"] == q["span"] and q["span"] != 0,
    Window: lambda m, q, k: k["position"] in range(q["position"] - m.size + 1, q["position"] + m.size),
    Dilated: lambda m, q, k: any(
        k["position"] == q["position"] + sign * i * m.rate for i in range(m.size) for sign in (-1, 1)
    ),
    Strided: lambda m, q, k: (k["position"] - q["position"]) % m.stride == 0,
    Blockwise: lambda m, q, k: q["position"] // m.size - k["position"] // m.size in range(-m.around, m.around + 1),
    Sinks: lambda m, q, k: k["position"] in range(m.count),
    Global: lambda m, q, k: min(k["position"], q["position"]) < m.count,
    Prefix: lambda m, q, k: max(k["position"], q["position"]) < m.length,
    QueryModality: lambda m, q, k: q["modality"] == m.number,
    SameModality: lambda m, q, k: q["modality"] == k["modality"],
    KeyModality: lambda m, q, k: k["modality"] == m.number,
}
"""What each predicate says of one pair."""

SMALL = st.integers(1, 4)
SIMPLE = st.one_of(
    st.sampled_from([Causal(), SameModality(), SameSegment(), SameSpan()]),
    *(st.builds(cls, SMALL) for cls in (Window, Strided, Sinks, Global, Prefix)),
    st.builds(Dilated, SMALL, SMALL),
    st.builds(Blockwise, SMALL, st.integers(0, 2)),
    *(st.builds(cls, st.integers(0, 2)) for cls in (QueryModality, KeyModality)),
)
MASKS = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=6,
)


def sees(mask, query, key, pairs=PAIRS) -> bool:
    """The mask asked of one pair of positions; `pairs` says what each predicate says."""
    if isinstance(mask, And):
        return sees(mask.left, query, key, pairs) and sees(mask.right, query, key, pairs)
    if isinstance(mask, Or):
        return sees(mask.left, query, key, pairs) or sees(mask.right, query, key, pairs)
    if isinstance(mask, Not):
        return not sees(mask.inner, query, key, pairs)
    return pairs[type(mask)](mask, query, key)


def arrays_of(meta: Meta) -> dict[str, np.ndarray]:
    """All arrays by name, labels among them."""
    own = dict(vars(meta))
    return own.pop("extra") | own


def reference(mask, query: Meta, key: Meta) -> np.ndarray:
    """The dense mask, bool [B, T, S], pair by pair."""
    B, T, S = *query.index.shape, key.index.shape[1]
    matrix = np.zeros((B, T, S), bool)
    for b, t, s in np.ndindex(B, T, S):
        q = {name: int(array[b, t]) for name, array in arrays_of(query).items()}
        k = {name: int(array[b, s]) for name, array in arrays_of(key).items()}
        matrix[b, t, s] = k["segment"] != 0 and sees(mask, q, k)
    return matrix


def arbitrary(rng, rows: int, length: int) -> Meta:
    """Metadata of no order at all; every eighth position is padding."""
    index, position, segment, span, modality = (rng.integers(0, n, (rows, length)) for n in (12, 12, 4, 3, 3))
    segment[rng.random((rows, length)) < 1 / 8] = 0
    return Meta(*(x.astype(np.int32) for x in (index, position, segment, span, modality)))


def packed(rng, rows: int, length: int, gaps: bool = False, spans: bool = True) -> Meta:
    """Rows of examples one after another with spans of media in them, padded at the end, or, with `gaps`, anywhere."""
    fields = np.zeros((5, rows, length), np.int32)
    for b in range(rows):
        used = np.arange(rng.integers(0, length + 1))
        if gaps:
            used = used[rng.random(len(used)) < 0.8]
        fields[0, b], fields[4, b] = np.arange(length), -1
        segment = np.sort(rng.integers(1, 1 + rng.integers(1, 4), len(used)))
        segment = np.unique(segment, return_inverse=True)[1] + 1
        position = np.arange(len(used)) - np.searchsorted(segment, segment)
        span = np.repeat(rng.integers(0, 2, len(used)), rng.integers(1, 5, len(used)))[: len(used)] * spans
        number = np.cumsum(np.diff(span, prepend=0) > 0) * span
        fields[1:, b, used] = position, segment, number, span * rng.integers(1, 3)
    return Meta(*fields)


@st.composite
def metas(draw, kinds=(arbitrary, packed), lengths=(1, 4, 9), rows: int = 2) -> Meta:
    """Metadata of random rows; few lengths, for every shape is compiled anew."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    return draw(st.sampled_from(kinds))(rng, rows, draw(st.sampled_from(lengths)))


def row(**arrays) -> Meta:
    """Metadata of one row, zeros where nothing is said."""
    length = len(next(iter(arrays.values())))
    fields = dict.fromkeys(("position", "segment", "span", "modality"), np.zeros(length, int)) | arrays
    fields = {name: np.asarray(value, np.int32)[None] for name, value in fields.items()}
    return Meta(np.arange(length, dtype=np.int32)[None], **fields)


def picture(matrix, cells: str = ".#") -> list[str]:
    """A matrix as lines of text."""
    return ["".join(cells[int(cell)] for cell in line) for line in matrix]
