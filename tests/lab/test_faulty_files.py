"""A user's file with a mistake: one line that names it, from every verb that reads the file."""

import pytest

from polygpt.cli.main import main

FRAME = """import dataclasses
import polygpt.api as pg

@dataclasses.dataclass(frozen=True)
class Mine(pg.MultiHead):
    window: int = 8
    "How far."

"""
FAULTS = {
    "    def mask(self, mask):\n        mask & pg.Window(8)\n": "Mine.mask() gives None: it must return a Mask",
    "    def mask(self, mask):\n        return lambda q, k: True\n": "it must return a Mask",
    "    def score(self, score):\n        return pg.Score\n": "it must return a Score",
    "    def mask(self, mask):\n        return mask & pg.Windows(1)\n": "line 10: AttributeError: module 'polygpt.api'",
}


@pytest.mark.parametrize("body", FAULTS)
def test_a_method_that_gives_something_else_is_named(tmp_path, capsys, body):
    (tmp_path / "mine.py").write_text(FRAME + body)
    assert main(["attention", "show", f"{tmp_path}/mine.py:Mine"]) == 2
    message = capsys.readouterr().err
    assert FAULTS[body] in message and len(message.splitlines()) == 1


def test_a_class_that_is_no_dataclass_or_lacks_a_default_is_told_so(tmp_path, capsys):
    (tmp_path / "bare.py").write_text(FRAME.replace("@dataclasses.dataclass(frozen=True)\n", ""))
    (tmp_path / "without.py").write_text(
        FRAME.replace("int = 8", "int").replace("frozen=True", "frozen=True, kw_only=True")
    )
    assert main(["attention", "show", f"{tmp_path}/bare.py:Mine"]) == 2
    assert "write @dataclasses.dataclass(frozen=True) above" in capsys.readouterr().err
    assert main(["attention", "show", f"{tmp_path}/without.py:Mine"]) == 2
    assert "give a default to window" in capsys.readouterr().err
