"""`attention check` on two devices: what is wrong there alone is found, and which way of splitting shows it."""

from pathlib import Path

import pytest

from polygpt.lab import check as lab
from polygpt.spec import load_class

SLOW = pytest.mark.slow
OWN = str(Path(__file__).with_name("mesh_variants.py"))


def checked(**fields):
    (found,) = lab.check(load_class(f"{OWN}:HalvesWhereSplit")(**fields), chosen=[lab.MESH])[1]
    return found


@pytest.mark.parametrize(("axis", "word"), [("positions", "sequence"), pytest.param("heads", "tensor", marks=SLOW)])
def test_what_is_wrong_where_an_axis_is_split_is_found(axis, word):
    found = checked(axis=axis, by=1e-4)
    assert found.passed is False and word in found.note


@pytest.mark.slow
def test_a_variant_that_reads_neighbours_and_denies_it_is_found():
    (found,) = lab.check(load_class(f"{OWN}:ShiftedValues")(), chosen=[lab.MESH])[1]
    assert found.passed is False and "sequence" in found.note and "ring" not in found.note


@pytest.mark.slow
def test_rounding_is_not_blamed():
    assert checked(by=1e-5).passed


def test_a_class_that_no_other_process_can_import_is_not_run():
    class Local(load_class(f"{OWN}:HalvesWhereSplit")):
        """Defined in a function."""

    (found,) = lab.check(Local(), chosen=[lab.MESH])[1]
    assert found.passed is None and found.note.startswith("not run")
