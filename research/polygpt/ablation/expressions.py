"""The expressions of claims: Python's syntax, read by `ast`, over what each seed measured.

A name is a variant as `written`, a number for each seed along the factors of the ablation. `noise` is the smallest
difference that counts. Terms are made of names and numbers by + - * / and

    min(a, b)  max(a, b)  mean(a, b)  best(a, b)      of several terms; best is min where a lower metric is better
    abs(a)
    at(a, length=256)                                 at one value of a factor, or of several
    min(a, over=length)  max  mean  best              over the values of a factor
    rise(a, over=length)                              last minus first
    spread(a, over=width)                             highest minus lowest
    argmin(a, over=rate)                              where it is lowest, in steps from 0; ties give their mean

and a claim of terms by `a < b`, `a > b`, chains `a < b < c`, and

    flat(a, over=length)                              abs(rise(a, over=length)) < noise
    constant(a, over=width)                           spread(a, over=width) < 1.5
    claim and claim

What is taken over a factor is taken within each seed: `best(a, over=rate)` is the metric of a seed that was tuned. What
is chosen of several terms is chosen of their means: `x < min(a, b)` says x < a and x < b, `min(a, b) < x` says a < x or
b < x, and `abs(a) < b` says a < b and -a < b. For the lowest of each seed lies below the lowest mean, by which
`min(a, b) < x` would be held of three equals. Within a factor, `max(abs(a), over=length)`, it is still chosen by seed,
and `max(a, over=length) > 0` may be true of noise.
"""

import ast
import dataclasses
import functools
import itertools
import keyword
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from polygpt.ablation.terms import (
    ARITHMETIC,
    OVER,
    Extremum,
    Quantity,
    Term,
    absolute,
    arithmetic,
    at,
    by_seed,
    negative,
    over,
)
from polygpt.errors import SpecError
from polygpt.spec import nearest


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The statement that the mean of `left` is lower than that of `right`."""

    left: Quantity
    right: Quantity

    @property
    def text(self) -> str:
        """The statement as an expression."""
        return f"{self.left.text} < {self.right.text}"


@dataclasses.dataclass(frozen=True)
class Junction:
    """The statement that `every` one of its parts is true, or that at least one is."""

    every: bool
    parts: tuple["Statement", ...]


Statement = Comparison | Junction

CHOOSE = ("min", "max", "mean", "best")
"""Functions that select among several terms."""
FORMS = {
    "at": "at(a, factor=value)",
    "abs": "abs(a)",
    **{name: f"{name}(a, over=factor) or {name}(a, b)" for name in CHOOSE},
    **{name: f"{name}(a, over=factor)" for name in OVER if name not in CHOOSE},
}
"""Syntax of each function of terms."""
STATED = ("flat", "constant")
"""Functions that form a statement."""


def written(name: str) -> str:
    """The identifier of a variant or factor in expressions: each run of non-alphanumerics becomes an underscore.

    "rope + swiglu" is rope_swiglu, "post-norm" post_norm, "4 heads" _4_heads, "None" None_.
    """
    identifier = re.sub(r"\W+", "_", unicodedata.normalize("NFKC", name)).strip("_")
    if keyword.iskeyword(identifier):
        return f"{identifier}_"
    return identifier if identifier.isidentifier() else f"_{identifier}"


def by_written(names: Iterable[str], what: str) -> dict[str, str]:
    """Names by their identifiers; raises SpecError if two collide. `what` is their plural, for the error."""
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(written(name), name)) != name:
            raise SpecError(f"{what} {other!r} and {name!r} are both written {written(name)} in claims: rename one")
    return found


def parsed(text: str) -> ast.expr:
    """A claim's syntax tree; raises SpecError if it is not a Python expression."""
    text = " ".join(text.split())
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise SpecError(f"claim {text!r}: {error.msg} (character {error.offset})") from None


class Reader:
    """Reads claims about the values of variants."""

    def __init__(
        self,
        values: Mapping[str, np.ndarray],
        axes: Mapping[str, Sequence],
        noise: float | None = None,
        better: str = "lower",
    ):
        """
        Args:
            values: by variant, [S, n_axis1, ...]; non-finite values are missing.
            axes: the values of each factor, in the order of the axes.
            noise: the value of `noise`; None if unknown: comparisons with it are then missing.
            better: "lower" or "higher", used by `best`.

        Raises:
            SpecError: two variants or two factors have the same identifier, or a variant's is `noise`.
        """
        factors = by_written(axes, "factors")
        self.axes = {short: (i, tuple(axes[name])) for i, (short, name) in enumerate(factors.items(), 1)}
        self.lowest = "min" if better == "lower" else "max"
        self.variants: dict[str, Term] = {}
        shape = tuple(len(points) for _, points in self.axes.values())
        for short, name in by_written(values, "variants").items():
            array = np.asarray(values[name], np.float64)
            if array.shape[1:] != shape:
                raise ValueError(f"values of {name} are {array.shape}: {shape} must follow the seeds")
            array = np.where(np.isfinite(array), array, np.nan)
            self.variants[short] = Quantity(ast.Name(short), array, frozenset(self.axes))
        if "noise" in self.variants:
            raise SpecError("a variant is named noise, which in claims means the smallest difference that counts")
        self.noise = self._number(math.nan if noise is None else noise, ast.Name("noise"))

    def read(self, text: str) -> Statement:
        """Parses the statement of a claim.

        Raises:
            SpecError: names the claim and the error.
        """
        body = parsed(text)
        try:
            statement = self._statement(body)
            if not self.variants.keys() & {node.id for node in ast.walk(body) if isinstance(node, ast.Name)}:
                raise SpecError(f"it names no variant: choose from {', '.join(self.variants)}")
        except SpecError as error:
            raise SpecError(f"claim {ast.unparse(body)!r}: {error}") from None
        return statement

    # --- statements ---------------------------------------------------------------------------------------------------

    def _statement(self, node: ast.expr) -> Statement:
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
            return Junction(True, tuple(map(self._statement, node.values)))
        if isinstance(node, ast.Compare):
            sides = [self._term(side) for side in (node.left, *node.comparators)]
            pairs = zip(itertools.pairwise(sides), node.ops, strict=True)
            parts = tuple(self._compared(left, right, op) for (left, right), op in pairs)
            return parts[0] if len(parts) == 1 else Junction(True, parts)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in STATED:
            if node.func.id == "flat":
                return self._less(absolute(self._called(node, "rise")), self.noise)
            return self._less(self._called(node, "spread"), self._number(1.5))
        raise SpecError(
            f"{ast.unparse(node)} is not a statement: write a < b, a > b, a < b < c, "
            "flat(a, over=factor), constant(a, over=factor), or several joined by 'and'"
        )

    def _compared(self, left: Term, right: Term, op: ast.cmpop) -> Statement:
        if isinstance(op, ast.Lt):
            return self._less(left, right)
        if isinstance(op, ast.Gt):
            return self._less(right, left)
        if isinstance(op, (ast.LtE, ast.GtE)):
            raise SpecError("write < or >: no test distinguishes them from <= and >=")
        raise SpecError("compare terms by < or >; for equality write abs(a - b) < noise")

    def _less(self, left: Term, right: Term) -> Statement:
        if isinstance(left, Extremum):
            return Junction(left.kind == "max", tuple(self._less(option, right) for option in left.options))
        if isinstance(right, Extremum):
            return Junction(right.kind == "min", tuple(self._less(left, option) for option in right.options))
        for side in (left, right):
            for name, (_, points) in self.axes.items():
                if name in side.axes and len(points) > 1:
                    raise SpecError(
                        f"{side.text} has a value for each {name}: write at({side.text}, {name}={points[-1]!r}), or "
                        f"{', '.join(OVER)} or best({side.text}, over={name})"
                    )
        return Comparison(left, right)

    # --- terms --------------------------------------------------------------------------------------------------------

    def _number(self, value: float, node: ast.expr | None = None) -> Quantity:
        return Quantity(node or ast.Constant(value), np.full((1,) * (1 + len(self.axes)), float(value)))

    def _term(self, node: ast.expr) -> Term:
        if isinstance(node, ast.Name):
            if node.id != "noise" and node.id not in self.variants:
                raise SpecError(f"no variant is named {node.id!r}: {nearest(node.id, (*self.variants, 'noise'))}")
            return self.variants.get(node.id, self.noise)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return self._number(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return negative(self._term(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            return arithmetic(node.op, self._term(node.left), self._term(node.right))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._called(node, node.func.id)
        raise SpecError(f"{ast.unparse(node)} is not a term: use variants, numbers, + - * / and {', '.join(FORMS)}")

    def _called(self, node: ast.Call, name: str) -> Term:
        """The function `name` applied to the arguments of `node`."""
        if name in STATED:
            raise SpecError(f"{ast.unparse(node)} is a statement, not a term")
        if name not in FORMS:
            raise SpecError(f"unknown function {name!r}: {nearest(name, (*FORMS, *STATED))}")
        terms = [self._term(argument) for argument in node.args]
        named = {option.arg: option.value for option in node.keywords}
        if name == "at" and len(terms) == 1 and named and None not in named:
            return functools.reduce(lambda term, option: self._at(term, *option), named.items(), terms[0])
        if name == "abs" and len(terms) == 1 and not named:
            return absolute(terms[0])
        chosen = self.lowest if name == "best" else name
        if name == "mean" and len(terms) > 1 and not named:
            total = functools.reduce(functools.partial(arithmetic, ast.Add()), terms)
            return arithmetic(ast.Div(), total, self._number(len(terms)))
        if name in CHOOSE and len(terms) > 1 and not named:
            return Extremum(chosen, tuple(terms))
        if chosen in OVER and len(terms) == 1 and set(named) == {"over"}:
            return self._over(chosen, terms[0], named["over"])
        raise SpecError(f"{ast.unparse(node)}: write {FORMS[name]}")

    def _at(self, term: Term, name: str, value: ast.expr) -> Term:
        axis, points = self._axis(term, name)
        try:
            wanted = ast.literal_eval(value)
        except ValueError:
            raise SpecError(f"{name}={ast.unparse(value)}: it must be a number or a quoted string") from None
        for i, point in enumerate(points):
            if _same(point, wanted):
                return at(term, axis, name, i, point)
        raise SpecError(f"{name} is never {wanted!r}: it is one of {', '.join(map(repr, points))}")

    def _over(self, function: str, term: Term, factor: ast.expr) -> Quantity:
        if not isinstance(factor, ast.Name):
            raise SpecError(f"over={ast.unparse(factor)}: it must be the name of a factor")
        axis, points = self._axis(term, factor.id)
        if len(points) < 2 and function not in CHOOSE:
            raise SpecError(f"{function} over {factor.id}, which has only one value")
        return over(function, term, axis, factor.id)

    def _axis(self, term: Term, name: str) -> tuple[int, tuple]:
        if name not in self.axes:
            raise SpecError(f"unknown factor {name!r}: {nearest(name, self.axes)}")
        if name not in term.axes:
            raise SpecError(f"{by_seed(term).text} no longer depends on {name}: it has one value for all of {name}")
        return self.axes[name]


def _same(point, wanted) -> bool:
    if isinstance(point, str) or isinstance(wanted, str):
        return point == wanted
    return isinstance(wanted, (int, float)) and math.isclose(point, wanted, rel_tol=1e-9)
