"""Spans of bytes between the token boundaries that two tokenizers share, in rows of the same example.

Two models with different tokenizers give the same text probabilities that can be compared wherever both have read the
same bytes: Minixhofer et al., Approximate Likelihood Matching (2503.20083), section 3.
"""

import numpy as np

from polygpt.data.packing import Row
from polygpt.data.scores import scored
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.errors import BadRecord
from polygpt.sequence import INSIDE_SPAN, TEXT

TOKENS = 2**24
"""More tokens than a row has."""


def aligned(own: Row, tokenizer: Tokenizer, theirs: Row, other: Tokenizer, log_p: np.ndarray, place: str) -> np.ndarray:
    """The log-probability of each span, at its last token.

    Texts of an example begin and end at boundaries of both tokenizers, so spans never cross them.

    Args:
        own, tokenizer: the row whose tokens get scores, and its tokenizer.
        theirs, other: the row of the same example that was scored, and its tokenizer.
        log_p: float32 [t], at each scored position of `theirs` the log-probability of its target.
        place: the example, for messages.

    Returns:
        float32 [scored tokens of `own`]: a log-probability at the last token of each span, INSIDE_SPAN at the others.

    Raises:
        BadRecord: if the tokenizers do not represent the same bytes.
    """
    ends, own_scored = _ends(own, tokenizer), _of_tokens(own, scored(own))
    their_ends = _ends(theirs, other)
    if ends[-1] != their_ends[-1]:
        raise BadRecord("not aligned", place, "the tokenizers give texts of different length in bytes")
    usable = np.where(scored(theirs), log_p, 0).astype(np.float64)
    sums = np.cumsum(_of_tokens(theirs, usable))  # of all tokens up to each boundary
    at = np.searchsorted(their_ends, ends)
    common = their_ends[at] == ends
    values = np.full(len(ends), INSIDE_SPAN)
    values[common] = np.diff(sums[at[common]], prepend=0.0)
    return values[own_scored].astype(np.float32)


def _of_tokens(row: Row, at_predictions: np.ndarray) -> np.ndarray:
    """Values at the positions that predict, as values of the text tokens that are predicted."""
    moved = np.zeros_like(at_predictions)
    moved[1:] = at_predictions[:-1]
    return moved[row.modality == TEXT]


def _ends(row: Row, tokenizer: Tokenizer) -> np.ndarray:
    """int64 [text tokens], rising: where in the text each token ends, counted in bytes and in tokens without bytes."""
    length = tokenizer.token_bytes[row.tokens[row.modality == TEXT]].astype(np.int64)
    return np.cumsum(length) * TOKENS + np.cumsum(length == 0)
