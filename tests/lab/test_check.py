"""`polygpt attention check`: each mistake is found and called by its name, and what is right passes."""

import importlib
import json
import threading

import numpy as np
import pytest

from polygpt.attention.cross import GatedCross
from polygpt.attention.masks import DECODER, Causal, KeyModality, QueryModality, SameSegment, Window
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.retention import Retention
from polygpt.attention.sliding import SlidingWindow
from polygpt.cli.main import main
from polygpt.errors import SpecError
from polygpt.lab import check as lab
from polygpt.lab import drawing
from polygpt.lab.layout import layouts
from polygpt.lab.measured import Measured, difference
from polygpt.lab.subject import seen_by, suitable_length
from polygpt.spec import load_class

OWN = __file__.replace("test_check", "wrong_variants")
QUICK = [
    "causality",
    "segments isolated",
    "mask honoured",
    "spans bidirectional",
    "full cache = no cache",
    "ragged decoding = each alone",
    "packed examples in any order",
    "padding without effect",
    "half batch = full batch",
    "finite gradients beside padding",
]
"""What takes few compiled programs."""
RING, CHUNKED = "ring cache = no cache", "chunked = reference"
SLOPES, NARROW = "gradient = finite differences", "bfloat16 near float32"
MISTAKES = {
    "PeeksAhead": {
        "causality",
        "full cache = no cache",  # what is ahead is not there yet
        "ragged decoding = each alone",
        "padding without effect",  # the next position is padding
    },
    "LeaksAcross": {"segments isolated", "packed examples in any order"},
    "IgnoresSpans": {"spans bidirectional"},
    "OneAheadInSpans": {"spans bidirectional"},
    "CountsPadding": {"padding without effect", "ragged decoding = each alone"},
    "WrongCacheIndex": {"full cache = no cache", "ragged decoding = each alone"},
    "PositionOff": {"full cache = no cache", "ragged decoding = each alone"},
    "RingTooSmall": {RING},
    "NotANumber": {"finite gradients beside padding"},
    "UnitQueries": {"finite gradients beside padding"},
    "DependsOnBackend": {CHUNKED},
    "Rounds": {SLOPES},
    "StopsGradient": {SLOPES},
    "MixesRows": {
        "half batch = full batch",
        "ragged decoding = each alone",  # other positions of other rows beside each
        "packed examples in any order",
        "padding without effect",
    },
    "ReturnsFloat32": {NARROW},
    "Crashes": {"full cache = no cache", "ragged decoding = each alone"},
    "CarriesState": {"segments isolated", "packed examples in any order"},
    "ReadsPadding": {"padding without effect", "ragged decoding = each alone"},
}
"""Which properties, of the quick ones and those named here, a variant of `wrong_variants.py` fails."""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_called_by_its_name(name):
    chosen = [one for one in lab.PROPERTIES if one in {*QUICK, *MISTAKES[name]}]
    _, findings = lab.check(load_class(f"{OWN}:{name}")(), chosen=chosen)
    assert {one.name for one in findings if one.passed is False} == MISTAKES[name]
    notes = {one.name: one.note for one in findings}
    advised = "sees_ahead() returning False" in notes["spans bidirectional"]
    assert advised == (name == "IgnoresSpans"), "it is no advice to who looks ahead somewhere"


def test_a_recurrence_without_mistakes_passes():
    _, findings = lab.check(load_class(f"{OWN}:Decaying")(), chosen=[*QUICK, RING, SLOPES, NARROW])
    assert [one for one in findings if one.passed is False] == []
    reasons = {one.name: one.note for one in findings if one.passed is None}
    assert set(reasons) == {"spans bidirectional", RING}
    assert "sees_ahead() is False" in reasons["spans bidirectional"]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            SlidingWindow(window=300),
            "reaches back 300 positions and rows have 24: pass a smaller field, or --positions 400",
        ),
        (MultiHead(), "its mask has no reach(): the cache holds every position"),
        (Retention(), "its cache is no smaller with ring=True"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_why_there_is_no_ring_is_said(spec, reason):
    (found,) = lab.check(spec, chosen=[RING])[1]
    assert (found.passed, found.note) == (None, reason)


def test_the_verb_prints_a_table_and_names_what_fails(capsys):
    assert main(["attention", "check", f"{OWN}:Crashes", "--only", "causality, full cache = no cache"]) == 2
    out, err = capsys.readouterr()
    assert (
        "causality" in out
        and "pass" in out
        and "FAIL" in out
        and "KeyError: 'no such\\nthing'" in " ".join(out.split())
    )
    assert err.splitlines()[-1].endswith("fails full cache = no cache") and "Traceback" not in err


def test_with_debug_a_property_that_crashes_shows_where(capsys):
    words = ["attention", "check", f"{OWN}:Crashes", "--only", "full cache = no cache", "--debug"]
    assert main(words) == 2
    assert "wrong_variants.py" in capsys.readouterr().err


def test_the_verb_writes_json_and_takes_fields(capsys):
    words = ["polygpt.attention.sliding:SlidingWindow", "--window", "8", "--only", "mask honoured", "--json"]
    assert main(["attention", "check", *words]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["fault"] is None and out["spec"]["window"] == 8 and out["positions"] == 24
    (finding,) = out["findings"]
    assert finding["name"] == "mask honoured" and finding["passed"] and finding["error"] <= finding["bound"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["polygpt.attention.masks:Window"], "not an attention variant"),
        (["polygpt.attention.multi_head:MultiHead", "--heads", "5"], "a divisor of the model width (32)"),
        (["polygpt.attention.multi_head:MultiHead", "--positions", "8"], "it needs at least 24"),
        (["polygpt.attention.multi_head:MultiHead", "--only", "casuality"], "did you mean causality"),
        (["polygpt.attention.multi_head:MultiHead", "--haeds", "2"], "did you mean --heads"),
    ],
)
def test_a_wrong_word_is_an_error_of_one_line(capsys, words, expected):
    assert main(["attention", "check", *words]) == 2
    *progress, last = capsys.readouterr().err.splitlines()
    assert expected in last and all(line.startswith("checking") for line in progress)


class Forward(MultiHead):
    """Sees nothing ahead, though its mask would."""

    def sees_ahead(self):
        return False


@pytest.mark.parametrize("verb", ["check", "bench", "show"])
def test_every_verb_calls_the_variant_by_one_name(verb):
    parser = importlib.import_module(f"polygpt.cli.attention_{verb}").parser(f"polygpt attention {verb}", "about")
    assert parser.read(["mine.py:Mine"]).variant == "mine.py:Mine"


@pytest.mark.parametrize(
    ("spec", "mask"),
    [
        (MultiHead(), DECODER),
        (SlidingWindow(window=3), DECODER & Window(3)),
        (Retention(), SameSegment() & Causal()),
        (Forward(), SameSegment() & Causal()),
        (GatedCross(), SameSegment() & Causal() & QueryModality(0) & ~KeyModality(0)),
    ],
    ids=lambda one: type(one).__name__,
)
def test_what_a_decoder_lets_a_variant_see_is_said_in_one_place(spec, mask):
    """By `seen_by`, in `attention check` and `attention show` alike."""
    row = drawing.read_row("3 image:4 2 | 2 audio:2 1 pad:2")
    np.testing.assert_array_equal(drawing.matrix(seen_by(spec), row), drawing.matrix(mask, row))


def test_rows_go_beyond_what_a_variant_names():
    assert suitable_length(MultiHead()) == 24
    assert suitable_length(SlidingWindow(window=40)) == 48
    assert suitable_length(SlidingWindow(window=4096)) == 24
    with pytest.raises(SpecError, match="at least 24"):
        lab.check(MultiHead(), length=12)


@pytest.mark.parametrize("length", [24, 31, 96])
def test_two_layouts_hold_the_same_examples(length):
    rows = layouts(length, 4)
    for one, other in ((rows.packed, rows.permuted), (rows.compact, rows.ragged)):
        assert difference(one.by_example(one.x_BTD), other.by_example(other.x_BTD)) == 0
        for name in ("position", "modality"):
            a, b = (layout.by_example(getattr(layout.meta, name)) for layout in (one, other))
            assert (a == b).all(), name
    assert not rows.packed.padding_BT.any() and rows.masked.padding_BT.all(axis=1).any()


def test_a_property_that_hangs_is_named_and_is_the_last(monkeypatch):
    begun, release = [], threading.Event()

    def hangs(subject):
        release.wait(60)
        return Measured(0.0, 0.0)

    monkeypatch.setattr(lab, "Subject", lambda *words: None)  # nothing is compiled, however loaded the machine
    monkeypatch.setitem(lab.PROPERTIES, lab.BUILDS, lambda subject: Measured(0.0, 0.0))
    monkeypatch.setitem(lab.PROPERTIES, "causality", hangs)
    chosen = [lab.BUILDS, "causality", "jit"]
    _, findings = lab.check(MultiHead(), chosen=chosen, progress=lambda name, *_: begun.append(name), limit=2.0)
    release.set()
    assert [one.name for one in findings] == ["builds and runs", "causality"] and begun[-1] == "causality"
    assert findings[1].passed is False and "not done after 2 s" in findings[1].note and findings[1].seconds >= 2


def test_each_property_is_printed_as_it_begins(capsys):
    assert main(["attention", "check", "polygpt.attention.multi_head:MultiHead", "--only", "JSON round trip"]) == 0
    assert "checking JSON round trip" in capsys.readouterr().err
