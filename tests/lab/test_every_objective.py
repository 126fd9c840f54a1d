"""Every objective of the package passes `objective check`, on eight devices too."""

from pathlib import Path

import pytest

from polygpt.lab.objective import catalogue
from polygpt.lab.objective import check as lab
from polygpt.spec import class_name

TABLE = Path(__file__).parents[2] / "research" / "polygpt" / "objectives" / "OBJECTIVES.md"


OBJECTIVES = catalogue.objectives()
TURNS = 6
"""Where time is short, each objective is checked on one of this many commits in succession: a check takes a minute."""


@pytest.mark.slow
@pytest.mark.parametrize("number, cls", enumerate(OBJECTIVES), ids=[cls.__name__ for cls in OBJECTIVES])
def test_every_property_holds(number, cls, request):
    commit = request.config.getoption("--commit")
    if commit is not None and (number - commit) % TURNS:
        pytest.skip(f"its turn comes within {TURNS} commits")
    findings = lab.check(cls.small())
    for one in findings:
        print(f"{one.name:32} {one.result:5} {one.error} {one.bound} {one.note}")
    assert [f"{one.name}: {one.error} above {one.bound} {one.note}" for one in findings if one.passed is False] == []
    held = [one.name for one in findings if one.passed]
    (row,) = [line for line in TABLE.read_text().splitlines() if line.startswith(f"| `{class_name(cls)}`")]
    print(row)
    assert lab.DEVICES in held and row.endswith(f"| {len(held)} hold |"), len(held)
