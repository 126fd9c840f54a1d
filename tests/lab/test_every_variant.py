"""Every attention variant of the package passes `attention check`, at sizes that make its window or chunks matter."""

import importlib.util
from pathlib import Path

import pytest

from polygpt.attention.contract import Attention
from polygpt.lab import catalogue
from polygpt.lab import check as lab
from polygpt.spec import class_name, hints

TABLE = Path(__file__).parents[2] / "research" / "polygpt" / "attention" / "VARIANTS.md"
SMALL = {"window": 8, "chunk": 8, "block": 4, "stride": 4, "piece": 8, "state_width": 8, "sinks": 2}
"""Fields that count positions, so that the 24 positions of a row go beyond them; the state is as wide as a head."""
EVERY = pytest.mark.parametrize("cls", catalogue.variants(), ids=lambda cls: cls.__name__)


def small(cls: type[Attention]) -> Attention:
    """The variant with such fields as above made small."""
    return cls(**{name: size for name, size in SMALL.items() if name in hints(cls)})


@pytest.mark.slow
@EVERY
def test_every_property_holds(cls):
    subject, findings = lab.check(small(cls), chosen=[name for name in lab.PROPERTIES if name != lab.TPU])
    for one in findings:
        print(f"{one.name:32} {one.result:5} {one.error} {one.bound} {one.note}")
    assert subject.length == 24, "a field that counts positions is not in SMALL"
    assert [f"{one.name}: {one.error} above {one.bound} {one.note}" for one in findings if one.passed is False] == []
    held = {one.name for one in findings if one.passed}
    claimed = set(cls().backends()) - {"reference", "library"}  # the library takes on a CPU less than elsewhere
    assert {f"{name} = reference" for name in claimed} <= held
    (row,) = [line for line in TABLE.read_text().splitlines() if line.startswith(f"| `{class_name(cls)}`")]
    print(row)
    assert row.endswith(f"| {len(held)} hold |"), len(held)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install 'polygpt[tpu]'")
@EVERY
def test_forward_and_backward_compile_for_a_tpu(cls):
    _, (finding,) = lab.check(cls(), chosen=[lab.TPU])
    assert finding.passed, finding.note
    assert ("fused kernels" in finding.note) == ("flex" in cls().backends()), finding.note
