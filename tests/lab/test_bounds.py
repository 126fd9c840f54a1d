"""The bounds of `attention check`: what is just within passes, what is just beyond fails."""

import pytest

from polygpt.lab import check as lab
from polygpt.spec import load_class

OWN = __file__.replace("test_bounds", "near_bounds")
ROUNDING = 4 * (24 + 32) * 2.0**-23
"""Of 24 positions at the width 32, in float32: four sums, each off by an epsilon a term."""
LONG_ROUNDING = 4 * (160 + 32) * 2.0**-23
HIDDEN = "mask honoured"
PLACES = {
    "full cache = no cache": ("step", ROUNDING),
    "bfloat16 near float32": ("bfloat16", 8 * 2.0**-7),
    "ring cache = no cache": ("ring", ROUNDING),
    "ragged decoding = each alone": ("pause", ROUNDING),
    "row and cache of any size": ("larger", ROUNDING),
    "chunked = reference": ("backend", ROUNDING),
    "packed examples in any order": ("behind others", ROUNDING),
    "padding without effect": ("beside garbage", ROUNDING),
    "half batch = full batch": ("alone", ROUNDING),
    "weights are those of the output": ("weights", ROUNDING),
    "full cache = no cache, long rows": ("far", LONG_ROUNDING),
    "jit": ("jit", ROUNDING),
    "vmap": ("vmap", ROUNDING),
    "pmap": ("pmap", ROUNDING),
    "scan and remat": ("scanned", ROUNDING),
}
"""By property: where a variant is off, and what the property may be off by."""
QUICK = list(PLACES)[:2]


def passes(name, variant="Off", **fields):
    chosen = ["packed examples in any order", name]  # by then the result to compare with is computed
    return lab.check(load_class(f"{OWN}:{variant}")(**fields), chosen=chosen)[1][-1].passed


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in PLACES])
def test_a_bound_is_neither_wider_nor_narrower(name):
    where, bound = PLACES[name]
    assert passes(name, where=where, by=0.7 * bound)
    beyond = 6 if where == "pause" else 1.6  # where a row pauses, the largest result may be another
    assert not passes(name, where=where, by=beyond * bound)


def test_a_share_of_visible_pairs_may_be_silent_and_no_more():
    assert passes(HIDDEN, "SomeUnseen", every=300)
    assert not passes(HIDDEN, "SomeUnseen", every=60)


@pytest.mark.slow
def test_gradients_may_be_off_by_rounding():
    assert passes("gradient = finite differences", where="gradient", by=1e-6)
    assert not passes("gradient = finite differences", where="gradient", by=3e-4)


@pytest.mark.slow
def test_nothing_comes_from_ahead_but_rounding():
    assert passes("causality", where="ahead", by=1e-7)
    assert not passes("causality", where="ahead", by=1e-3)


@pytest.mark.slow
def test_bfloat16_may_not_lose_more_at_the_end_of_a_long_row():
    assert passes("long rows in bfloat16", where="bfloat16, far", by=0.01)
    assert not passes("long rows in bfloat16", where="bfloat16, far", by=0.05)
