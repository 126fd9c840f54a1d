"""Generation agrees with training: with a full cache, with a ring buffer, and with padding in between."""

import jax

from polygpt.lab.layout import Rows
from polygpt.lab.measured import Measured, absent, difference
from polygpt.lab.subject import Subject, mask_of

MORE = 8
"""Number of extra positions in rows and caches, to check that their size does not matter."""


def full_cache(subject: Subject) -> Measured:
    """A prompt, a few positions, then one at a time through a full cache give the same results as without a cache."""
    return _compare(subject, subject.rows.packed, subject.rows.packed, ring=False)


def ring_cache(subject: Subject) -> Measured:
    """The same with a cache that is smaller than the row."""
    if _shapes(subject, ring=True) == _shapes(subject, ring=False):
        mask = mask_of(subject.spec)
        if mask is None:
            return absent("its cache is no smaller with ring=True")
        reach = mask.reach()
        if reach is None:
            return absent("its mask has no reach(): the cache holds every position")
        back, T = reach.first + reach.last, subject.length
        if back < T:
            return absent(f"reaches back {back} positions of {T}, but its cache is no smaller with ring=True")
        longer = 100 * (back // 100 + 1)
        return absent(f"reaches back {back} positions and rows have {T}: pass a smaller field, or --positions {longer}")
    packed = _compare(subject, subject.rows.packed, subject.rows.packed, ring=True)
    ragged = _compare(subject, subject.rows.ragged, subject.rows.compact, ring=True)
    return max(packed, ragged, key=lambda measured: (measured.holds is False, measured.error))


def ragged_decoding(subject: Subject) -> Measured:
    """Padded prompts and pausing rows, through a full cache, give the same results as each example alone."""
    return _compare(subject, subject.rows.ragged.with_garbage(), subject.rows.compact, ring=False)


def any_size(subject: Subject) -> Measured:
    """Longer rows and larger caches do not change the results of the same examples."""
    rows = subject.rows.compact
    expected = rows.by_example(subject.y_BTD(rows))
    longer = rows.padded(MORE)
    errors = {"of the row": difference(longer.by_example(subject.y_BTD(longer)), expected)}
    errors["of the cache"] = difference(
        rows.by_example(subject.cached_BTD(rows, size=subject.length + MORE)), rows.by_example(subject.cached_BTD(rows))
    )
    guilty = max(errors, key=lambda name: (not errors[name] <= subject.bound, errors[name]))
    return Measured(errors[guilty], subject.bound, "" if errors[guilty] <= subject.bound else f"the size {guilty}")


def _shapes(subject, ring):
    B = subject.rows.packed.x_BTD.shape[0]
    cache = jax.eval_shape(lambda: subject.spec.init_cache(subject.form.dims, B, subject.length, ring))
    return [x.shape for x in jax.tree.leaves(cache)]


def _compare(subject, cached: Rows, plain: Rows, ring: bool) -> Measured:
    got_BTD = subject.cached_BTD(cached, ring)
    got, expected = cached.by_example(got_BTD), plain.by_example(subject.y_BTD(plain))
    error = difference(got, expected)
    note = ""
    if not error <= subject.bound and cached is plain:
        error_T = abs(got_BTD - subject.y_BTD(plain)).max((0, 2))
        position = int((~(error_T <= subject.bound)).argmax())
        prefill, chunk = subject.calls
        call = "prompt" if position < prefill else "chunk" if position < prefill + chunk else "single steps"
        note = f"from position {position} on, in the {call}"
    return Measured(error, subject.bound, note)
