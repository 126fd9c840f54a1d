"""The operators of `make mutation`: what is changed, how, and what is left alone."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

PLACE = Path(__file__).parent / "mutation" / "operators.py"
SPEC = importlib.util.spec_from_file_location("mutation_operators", PLACE)
operators = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(operators)


def changes(source: str) -> set[str]:
    return {mutant.apply(source) for mutant in operators.mutants(source)}


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("a < b", {"(a <= b)"}),
        ("x = a * b", {"x = (a / b)"}),
        ("x = not a", {"x = (a)"}),
        ("x = -a", {"x = (a)"}),
        ("x = a and b", {"x = (a or b)"}),
        ("x[3]", {"x[4]", "x[2]"}),
        ("x = 0.5", {"x = 1.0"}),
        ("x = max(a, b)", {"x = min(a, b)"}),
        ("x = jnp.all(a)", {"x = jnp.any(a)"}),
        ("fill(a)", {"pass"}),
        ("x += a", {"x -= a", "pass"}),
        ("x.y = a", {"pass"}),
        ("if é == b: fill()", {"if (é != b): fill()", "if (not (é == b)): fill()", "if é == b: pass"}),
        ("def f(a):\n    return a", {"def f(a):\n    return None"}),
        ("raise ValueError('more than 1')", {"pass"}),
    ],
)
def test_one_change_at_a_time(source, changed):
    assert changes(source) == changed
    for text in changed:
        ast.parse(text)


@pytest.mark.parametrize(
    "source",
    [
        '"""A text with 1."""',
        "import a",
        "x = f'{a + 1}'",
        "x = 'a' + b",
        "x = zip(a, b, strict=True)",
        "log.info(a + 1)",
        "def f(a: Literal[1]) -> Literal[2]: ...",
        "@cache(maxsize=1)\ndef f(): ...",
        "class A:\n    def __repr__(self):\n        return a + 1",
        "class A:\n    width: int = 3",
        "if __name__ == '__main__':\n    main(1)",
    ],
)
def test_what_is_left_alone(source):
    assert changes(source) == set()
