"""Mutation operators: small changes of one expression or statement that a test should notice.

Left alone: docstrings, annotations, decorators, strings, error messages, log calls, `__repr__`, `__main__` blocks, and
the defaults of dataclass fields, as a test could only repeat them.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.MatMult: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
CALLS = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any"}
QUIET = {"print", "warn", "say", "log", "debug", "info", "warning", "error", "exception", "set_verbosity"}
UNREAD = {"annotation", "returns", "decorator_list", "type_params", "exc", "msg"}  # fields of a node that are skipped


@dataclass(frozen=True)
class Mutant:
    """One change: the bytes `start:stop` of the file become `after`. `line` counts from 1, `text` is what it says."""

    line: int
    text: str
    kind: str
    start: int
    stop: int
    before: str
    after: str

    def apply(self, source: str) -> str:
        data = source.encode()
        return (data[: self.start] + self.after.encode() + data[self.stop :]).decode()

    def words(self) -> str:
        """The change on one line."""
        return f"`{' '.join(self.before.split())}` → `{' '.join(self.after.split())}`"


def mutants(source: str) -> list[Mutant]:
    """Every mutant of `source`, in the order of the file."""
    data = source.encode()
    starts = [0]
    for line in (lines := data.splitlines(keepends=True)):
        starts.append(starts[-1] + len(line))
    found = []
    for node, kind, after in _changes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[node.end_lineno - 1] + node.end_col_offset
        before = data[start:stop].decode()
        alone = isinstance(node, (ast.stmt, ast.Constant, ast.Name, ast.Attribute))
        text = after if alone else f"({after})"
        found.append(Mutant(node.lineno, lines[node.lineno - 1].decode().strip(), kind, start, stop, before, text))
    return sorted(found, key=lambda mutant: (mutant.start, mutant.stop, mutant.kind))


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    """(node, kind, text that replaces it) for `node` and everything below."""
    if _left_alone(node):
        return
    yield from _of(node)
    if isinstance(node, ast.ClassDef):
        node.body = [statement for statement in node.body if not isinstance(statement, ast.AnnAssign)]
    for name, value in ast.iter_fields(node):
        if name not in UNREAD:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _changes(child)


def _left_alone(node: ast.AST) -> bool:
    match node:
        case ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.Expr(ast.Constant()):
            return True
        case ast.FunctionDef(name="__repr__" | "__str__") | ast.keyword(arg="strict"):  # zip's check of the code itself
            return True
        case ast.If(test=ast.Compare(left=ast.Name(id="__name__"))) | ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name in QUIET
    return False


def _of(node: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    match node:
        case ast.Compare(ops=[operator]):
            yield node, "comparison", ast.unparse(ast.Compare(node.left, [SWAPS[type(operator)]()], node.comparators))
        case ast.BinOp(op=operator) if type(operator) in SWAPS and not _of_strings(node):
            yield node, "arithmetic", ast.unparse(ast.BinOp(node.left, SWAPS[type(operator)](), node.right))
        case ast.AugAssign(op=operator) if not _of_strings(node):
            if type(operator) in SWAPS:
                yield node, "arithmetic", ast.unparse(ast.AugAssign(node.target, SWAPS[type(operator)](), node.value))
            yield node, "statement", "pass"
        case ast.BoolOp(op=operator):
            yield node, "boolean", ast.unparse(ast.BoolOp(SWAPS[type(operator)](), node.values))
        case ast.UnaryOp(op=ast.Not()):
            yield node, "not", ast.unparse(node.operand)
        case ast.UnaryOp(op=ast.USub()) if not isinstance(node.operand, ast.Constant):
            yield node, "sign", ast.unparse(node.operand)
        case ast.Constant(value=bool(value)):
            yield node, "constant", str(not value)
        case ast.Constant(value=int(value)):
            yield node, "constant", str(value + 1)
            if value > 0:
                yield node, "constant", str(value - 1)
        case ast.Constant(value=float(value)):
            yield node, "constant", repr(2 * value if value else 1.0)
        case ast.Call(func=ast.Name(id=name)) if name in CALLS:
            yield node.func, "call", CALLS[name]
        case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in CALLS:
            yield node.func, "call", f"{ast.unparse(value)}.{CALLS[name]}"
        case ast.Return(value=ast.expr()) if not isinstance(node.value, ast.Constant):
            yield node, "return", "return None"
        case ast.Raise() | ast.Expr(value=ast.Call()) if not _left_alone(getattr(node, "value", node)):
            yield node, "statement", "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, "statement", "pass"
        case ast.Continue() | ast.Break():
            yield node, "statement", "pass"
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield node.test, "condition", f"not ({ast.unparse(node.test)})"


def _of_strings(node: ast.AST) -> bool:
    return any(
        isinstance(part, ast.JoinedStr) or (isinstance(part, ast.Constant) and isinstance(part.value, str))
        for part in ast.walk(node)
    )
