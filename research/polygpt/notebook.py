"""Extracts the source of classes defined in `__main__`, in a notebook or a script.

Such classes cannot be imported again. Their source is assembled from the definitions that they need, so that running it
repeats neither training nor plotting: a statement of a cell (or of the script) is included if it binds a name that an
included statement refers to. The last of several bindings of a name counts.
"""

import ast
import dataclasses
import linecache
import symtable
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

MAIN = "__main__"


@dataclasses.dataclass(frozen=True)
class _Statement:
    """A statement at the top level.

    Attributes:
        place: whether it is no import from the future, the number of its cell, and its first line there.
        text: its source.
        binds: the names that it binds.
        needs: the global names that it refers to, in any scope.
        always: whether it is taken in any case: an import from the future, or of all names of a module.
    """

    place: tuple[bool, int, int]
    text: str
    binds: frozenset[str]
    needs: frozenset[str]
    always: bool


def source(names: Iterable[str], script: Path | None = None) -> bytes | None:
    """The definitions of these names of `__main__` and everything they need; None if they are not found.

    Args:
        names: names of classes.
        script: a file to search instead of the code executed in this process.
    """
    cells = _executed() if script is None else [script.read_text(encoding="utf-8")]
    statements = [made for number, cell in enumerate(cells) for made in _statements(number, cell)]
    last = {name: statement for statement in statements for name in statement.binds}
    taken, wanted = {statement for statement in statements if statement.always}, list(names)
    if not all(name in last for name in wanted):
        return None
    while wanted:
        statement = last.get(wanted.pop())
        if statement is not None and statement not in taken:
            taken.add(statement)
            wanted += statement.needs
    ordered = sorted(taken, key=lambda statement: statement.place)
    return ("\n\n".join(statement.text for statement in ordered) + "\n").encode()


def script() -> Path | None:
    """The file of `__main__`, if it is a script."""
    file = getattr(sys.modules[MAIN], "__file__", None)
    return Path(file).resolve() if file and Path(file).is_file() else None


def _executed() -> list[str]:
    """The code executed in `__main__`, in order: IPython's cells, the script, or the history of a Python shell."""
    if isinstance(cells := getattr(sys.modules[MAIN], "In", None), list):
        return [cell for cell in cells if isinstance(cell, str)]
    if (file := script()) is not None:
        return [file.read_text(encoding="utf-8")]
    shell = [name for name in linecache.cache if name.startswith("<python-input-")]
    return ["".join(linecache.getlines(name)) for name in sorted(shell, key=lambda name: int(name[14:-1]))]


def _statements(number: int, cell: str) -> Iterator[_Statement]:
    try:
        body = ast.parse(cell).body
    except SyntaxError:  # a cell that failed
        return
    lines = cell.splitlines()
    for node in body:
        decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", ())]
        begin = min([node.lineno, *decorators])  # segments exclude decorators
        text = "\n".join(lines[begin - 1 : node.end_lineno]) if decorators else ast.get_source_segment(cell, node)
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        star = isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
        scope = symtable.symtable(text, "<cell>", "exec")
        binds = [name.get_name() for name in scope.get_symbols() if name.is_assigned() or name.is_imported()]
        needs = {*_referred(scope), *_quoted(node)}
        yield _Statement((not future, number, begin), text, frozenset(binds), frozenset(needs), future or star)


def _referred(scope: symtable.SymbolTable) -> Iterator[str]:
    """The global names that a scope and those inside it refer to."""
    top = scope.get_type() == "module"
    yield from (s.get_name() for s in scope.get_symbols() if (s.is_referenced() if top else s.is_global()))
    for inner in scope.get_children():
        yield from _referred(inner)


def _quoted(node: ast.AST) -> Iterator[str]:
    """The names in quoted annotations."""
    for part in ast.walk(node):
        if isinstance(part, ast.AnnAssign) and isinstance(part.annotation, ast.Constant):
            tree = ast.parse(str(part.annotation.value), mode="eval")
            yield from (name.id for name in ast.walk(tree) if isinstance(name, ast.Name))
