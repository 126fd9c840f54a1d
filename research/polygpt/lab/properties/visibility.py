"""Influence between positions, by gradients and by replacing inputs: causality, mask, segments, spans."""

import numpy as np

from polygpt.attention.masks import DECODER, allowed
from polygpt.lab.measured import Measured, absent
from polygpt.lab.subject import Subject, mask_of, seen_by

SILENT = 0.01
"""Fraction of visible pairs that may be without influence, because weights can underflow."""
UNSEEING = 0.5
"""Fraction of positions that may see only themselves if the mask is an upper bound."""


def causality(subject: Subject) -> Measured:
    """No output depends on a later input of its example, unless they share a bidirectional span."""
    later, same_segment, same_span = _pairs(subject)
    return _influence(subject, later & same_segment & ~same_span)


def segments_isolated(subject: Subject) -> Measured:
    """No output depends on an input of another example in the row, before or after."""
    _, same_segment, _ = _pairs(subject)
    return _influence(subject, ~same_segment)


def mask_honoured(subject: Subject) -> Measured:
    """Among the inputs that a decoder may see, outputs depend on exactly those that the variant's mask shows."""
    own = np.eye(subject.length, dtype=bool)[:, None, :]
    decoder, visible = _visible(subject, DECODER), _permitted(subject)
    leak = _influence(subject, decoder & ~visible & ~own)
    return _silence(subject) or leak if leak.holds else leak


def honoured_in_long_rows(subject: Subject) -> Measured:
    """In rows of at least 160 positions, outputs depend on exactly the inputs that the mask shows."""
    subject = subject.long
    leak = _influence(subject, ~_permitted(subject) & ~np.eye(subject.length, dtype=bool)[:, None, :])
    return _silence(subject) or leak if leak.holds else leak


def _silence(subject: Subject) -> Measured | None:
    """The failure if too many visible inputs are without influence; otherwise None."""
    own, visible = np.eye(subject.length, dtype=bool)[:, None, :], _permitted(subject)
    seen, shown = (subject.influence_TBS > 0) & ~own, visible & ~own
    if subject.spec.mask_is_bound:
        shown, seen = shown.any(-1), (seen & shown).any(-1)
        blind = float((shown & ~seen).sum() / max(shown.sum(), 1))
        return None if blind <= UNSEEING else Measured(blind, UNSEEING, "share of positions that see no other one")
    if mask_of(subject.spec) is None:  # it says only that something is seen
        shown, seen = shown.any(-1), (seen & shown).any(-1)
    silent = float((shown & ~seen).sum() / max(shown.sum(), 1))
    if silent > SILENT:
        note = "share of visible inputs without influence"
        if _sees_no_more(subject):  # who looks elsewhere has another fault
            note += ": if the inputs select what is visible, or gates can close it, set mask_is_bound = True"
        return Measured(silent, SILENT, note)
    return None


def spans_bidirectional(subject: Subject) -> Measured:
    """In every span, outputs depend on the later positions that the variant's mask shows.

    For a variant without a mask, the first position of a span must depend on the last.
    """
    if not subject.spec.sees_ahead():
        return absent("causal by construction: sees_ahead() is False")
    later, _, same_span = _pairs(subject)
    ahead = later & same_span
    seen = subject.influence_TBS > 0
    spans = _spans(subject.rows.packed.meta.span)
    if mask_of(subject.spec) is not None:
        due = ahead & _permitted(subject)
    else:
        due = np.zeros_like(ahead)
        for b, place in spans:
            due[place[0], b, place[-1]] = len(place) >= 3
    blind = sum(not (seen & ahead)[place[:, None], b, place[None]].any() for b, place in spans)
    if subject.spec.mask_is_bound:
        missing, blind = float(blind == len(spans)), blind * (blind == len(spans))
    else:
        missing = 1.0 if blind else float((due & ~seen).sum() / max(due.sum(), 1))
    note = (
        f"{blind} spans without any influence of later positions"
        if blind
        else "later positions of a span without influence"
    )
    if not (seen & later).any() and _sees_no_more(subject):  # who looks ahead elsewhere has another fault
        note += ": a variant that never looks ahead needs sees_ahead() returning False"
    return Measured(missing, SILENT, note if missing > SILENT else "")


def _spans(span_BT) -> list[tuple[int, np.ndarray]]:
    """The row and the indices of the positions of each bidirectional span."""
    return [(b, np.flatnonzero(row == span)) for b, row in enumerate(span_BT) for span in np.unique(row) if span]


def _influence(subject: Subject, forbidden_TBS: np.ndarray) -> Measured:
    """The largest influence among the pairs, compared with the residue of cancelling sums of T terms.

    Measured by gradients, pair by pair, and by replacing all inputs hidden from an output at once, which also detects
    dependencies without gradients.
    """
    influence = np.where(forbidden_TBS, subject.influence_TBS, 0)
    if not influence.max() <= subject.bound:
        t, b, s = np.unravel_index(np.nanargmax(influence), influence.shape)
        return Measured(float(influence.max()), subject.bound, f"row {b}: position {t} depends on {s}")
    moved_TB = subject.moved_TB(forbidden_TBS)
    note = ""
    if not moved_TB.max() <= subject.bound:
        t, b = np.unravel_index(np.argmax(moved_TB), moved_TB.shape)
        note = f"row {b}: position {t} changes when inputs hidden from it are replaced, although its gradient is "
        note += "zero: a comparison, a choice among positions or a stopped gradient reads them"
    return Measured(float(max(influence.max(), moved_TB.max())), subject.bound, note)


def _sees_no_more(subject: Subject) -> bool:
    """Whether no output depends on inputs that a decoder hides from it."""
    return bool(subject.moved_TB(~_visible(subject, DECODER)).max() <= subject.bound)


def _visible(subject, mask) -> np.ndarray:
    """The mask as a matrix, [T, B, S]."""
    meta = subject.rows.packed.meta
    return np.asarray(allowed(mask, meta, meta)).swapaxes(0, 1)


def _permitted(subject) -> np.ndarray:
    """The pairs that are visible according to the variant, [T, B, S]."""
    return _visible(subject, seen_by(subject.spec))


def _pairs(subject) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[T, B, S] each: whether s is later than t, in the same example, in the same span."""
    meta = subject.rows.packed.meta

    def of_pairs(relation, array):
        return np.swapaxes(relation(array[:, :, None], array[:, None, :]), 0, 1)

    same_span = of_pairs(lambda query, key: (query == key) & (key > 0), meta.span)
    return of_pairs(np.less, meta.index), of_pairs(np.equal, meta.segment), same_span
