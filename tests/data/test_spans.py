"""Spans of bytes that two tokenizers share, against the sums of the tokens between shared boundaries, one by one."""

import numpy as np
import pytest

from polygpt.data.example import Example, Text
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.scores import scored
from polygpt.data.spans import aligned
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.errors import BadRecord
from polygpt.sequence import INSIDE_SPAN


class Pieces(Tokenizer):
    """Greedy tokens of these texts and of single bytes."""

    def __init__(self, *texts):
        super().__init__([bytes([byte]) for byte in range(256)] + [text.encode() for text in texts])

    def encode(self, text):
        rest, ids = text.encode(), []
        while rest:
            fits = [i for i, piece in enumerate(self._pieces) if piece and rest.startswith(piece)]
            ids.append(max(fits, key=lambda i: len(self._pieces[i])))
            rest = rest[len(self._pieces[ids[-1]]) :]
        return np.array(ids, np.int32)


EXAMPLE = Example(
    (Text("the café: ", 0.0), Text("therefore é"), Text(" no", 0.0), Text("then")), "here", rejected="other"
)
OWN, OTHER = Pieces("the", "ther", "re", "n"), Pieces("there", "fore ", "fé", "en", "é")


def rows(pairs=False):
    layout = LayoutSpec(seq_len=100, pairs=pairs)
    return [lay_out(EXAMPLE, layout, one, {}) for one in (OWN, OTHER)]


def test_spans_end_where_both_tokenizers_end_a_token():
    own, theirs = rows()
    log_p = np.full(len(theirs), np.nan, np.float32)
    log_p[scored(theirs)] = -(2.0 ** np.arange(scored(theirs).sum()))
    # own:    ther|e|f|o|re|' '|0xc3|0xa9      th: the|n       eos
    # theirs: there|fore_|é                    t|h|en          eos
    found = aligned(own, OWN, theirs, OTHER, log_p, "here")
    x = INSIDE_SPAN
    np.testing.assert_array_equal(found, [x, -1, x, x, x, -2, x, -4, x, -(8 + 16 + 32), -64])
    back = aligned(theirs, OTHER, own, OWN, np.where(scored(own), -1.0, np.nan), "here")
    np.testing.assert_array_equal(back, [-2, -4, -2, x, x, -2, -1])


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("first, second", [(OWN, OTHER), (OTHER, OWN), (Bytes().build(), OWN), (OWN, OWN)])
def test_the_spans_of_a_text_add_up_to_its_log_probability(pairs, first, second):
    layout = LayoutSpec(seq_len=100, pairs=pairs)
    own, theirs = (lay_out(EXAMPLE, layout, one, {}) for one in (first, second))
    rng = np.random.default_rng(0)
    log_p = np.where(scored(theirs), -rng.exponential(size=len(theirs)), np.nan).astype(np.float32)
    found = aligned(own, first, theirs, second, log_p, "here")
    for segment in (1, 2)[: 1 + pairs]:
        here, there = (row.segment[scored(row)] == segment for row in (own, theirs))
        total = np.sum(found[here][found[here] <= 0], dtype=np.float64)
        np.testing.assert_allclose(total, log_p[scored(theirs)][there].sum(dtype=np.float64), rtol=1e-6)
        assert found[here][-1] <= 0, "eos ends a span"
    if first is second:
        np.testing.assert_allclose(found, log_p[scored(theirs)], rtol=1e-6)


def test_tokenizers_that_change_the_text_are_refused():
    own, theirs = rows()
    with pytest.raises(BadRecord, match="here: not aligned: the tokenizers give texts of different length in bytes"):
        aligned(
            own, OWN, lay_out(Example((Text("therefore"),), ""), LayoutSpec(99), OTHER, {}), OTHER, own.weight, "here"
        )
