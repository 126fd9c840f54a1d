"""Every attention variant of the package passes `attention check`, at sizes that make its window or chunks matter."""

import pytest

from polygpt.attention.contract import Attention
from polygpt.lab import catalogue
from polygpt.lab import check as lab
from polygpt.spec import hints

SMALL = {"window": 8, "chunk": 8, "block": 4, "stride": 4, "piece": 8, "state_width": 8, "sinks": 2}
"""Fields that count positions, so that the 24 positions of a row go beyond them; the state is as wide as a head."""


def small(cls: type[Attention]) -> Attention:
    """The variant with such fields as above made small."""
    return cls(**{name: size for name, size in SMALL.items() if name in hints(cls)})


@pytest.mark.slow
@pytest.mark.parametrize("cls", catalogue.variants(), ids=lambda cls: cls.__name__)
def test_every_property_holds(cls):
    subject, findings = lab.check(small(cls), chosen=[name for name in lab.PROPERTIES if name != lab.TPU])
    assert subject.length == 24, "a field that counts positions is not in SMALL"
    assert [f"{one.name}: {one.error} above {one.bound} {one.note}" for one in findings if one.passed is False] == []
