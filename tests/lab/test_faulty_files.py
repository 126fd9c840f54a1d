"""A user's file with a mistake: one line that names it, from every verb that reads the file."""

import json

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
    "    def mask(self, mask):\n        mask & pg.Window(8)\n": "Mine.mask() returned None: it must return a Mask",
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
    assert "add defaults for window" in capsys.readouterr().err


MODULE = """import dataclasses
import jax.numpy as jnp
import polygpt.api as pg
from polygpt.attention.multi_head import MultiHeadModule

@dataclasses.dataclass(frozen=True)
class Near(pg.MultiHead):
    def build(self, dims, rngs):
        return NearModule(self, dims, rngs)

class NearModule(MultiHeadModule):
    def __call__(self, x_BTD, context, cache=None):
        y_BTD, cache = super().__call__(x_BTD, context, cache)
"""
BROKEN = {
    "        raise ValueError('of two\\nlines')": "near.py, line 14: ValueError: of two lines",
    "        return y_BTD[..., 1:], cache": "the result is [3, 24, 31], but must be [3, 24, 32]",
    "        return y_BTD.astype(int), cache": "the result is int32[3, 24, 32], but must be float32[3, 24, 32]",
    "        return y_BTD": "a call returns float32[3, 24, 32]: it must return a pair, (y_BTD, cache)",
    "        return y_BTD, x_BTD": "with a cache, the second result does not have the structure of init_cache()",
}


@pytest.mark.parametrize("line", BROKEN)
def test_what_does_not_run_is_told_once_with_its_line(tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "near.py").write_text(MODULE + line)
    assert main(["attention", "check", f"{tmp_path}/near.py:Near", "--no-tpu", "--json"]) == 2
    out, err = capsys.readouterr()
    (finding,) = json.loads(out)["findings"]
    assert finding["name"] == "builds and runs" and finding["passed"] is False and finding["note"] == BROKEN[line]
    assert "the others cannot be measured" in err and "Traceback" not in err
    assert err.splitlines()[-1].endswith(f"near.py:Near: fails builds and runs: {BROKEN[line]}")


def test_what_cannot_be_built_is_told_and_traced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "near.py").write_text(MODULE.replace("NearModule(self", "NearModul(self"))
    assert main(["attention", "check", f"{tmp_path}/near.py:Near", "--only", "jit", "--debug"]) == 2
    out, err = capsys.readouterr()
    assert "near.py, line 9: NameError: name 'NearModul' is not defined" in err.splitlines()[-1]
    assert "Traceback" in err and "FAIL" in out and "jit" not in out


def test_a_method_of_the_contract_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "near.py").write_text(MODULE.replace("pg.MultiHead", "pg.Attention").replace("def build", "def make"))
    assert main(["attention", "check", f"{tmp_path}/near.py:Near"]) == 2
    assert "fails builds and runs: NotImplementedError: Near has no build()" in capsys.readouterr().err
