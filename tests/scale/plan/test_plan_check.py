"""Committed plans beside what a compiler says now."""

import json
from pathlib import Path

import pytest

from polygpt.cli.main import main
from polygpt.scale.plan import check

TINY = Path(__file__).with_name("tiny.py")
THEN = {
    "experiment": "tiny",
    "on": "v5e:2x2",
    "slices": 1,
    "file": str(TINY),
    "changes": {"data.batch_size": "16"},
    "memory": {"total": 1000},
    "collective_bytes": 100,
    "kernels": {"flex_forward": {}, "flex_backward_key": {}},
}


@pytest.mark.parametrize(
    "now, said",
    [
        ({"memory": {"total": 1049}, "collective_bytes": 105}, None),
        ({"memory": {"total": 1051}}, "memory per device grew"),
        ({"collective_bytes": 106}, "bytes sent per step grew"),
        ({"memory": None}, "memory per device grew"),
        ({"kernels": {"flex_forward": {}}}, "kernel flex_backward_key is missing"),
        (
            {"memory": {"total": 1051}, "kernels": {}},
            "memory per device grew, kernel flex_backward_key is missing, kernel flex_forward is missing",
        ),
    ],
)
def test_what_grew_and_kernels_that_are_gone_are_named(tmp_path, monkeypatch, capsys, now, said):
    path, asked = tmp_path / "plan.json", []
    path.write_text(json.dumps(THEN))

    def planned(experiment, on, limit):
        asked.append((experiment.data.batch_size, on.name))
        return THEN | {"compile_seconds": 1.0} | now

    monkeypatch.setattr(check, "plan_in_subprocess", planned)
    assert main(["plan", "check", str(tmp_path)]) == (0 if said is None else 2)
    error = capsys.readouterr().err
    assert asked == [(16, "v5e:2x2")], "with the changes that it names"
    assert (f"plan check: {path}: {said} (limit 5%)" in error) == (said is not None)


def test_a_folder_without_plans_is_told(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert main(["plan", "check", str(tmp_path)]) == 2
    assert "no plans below" in capsys.readouterr().err
