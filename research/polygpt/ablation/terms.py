"""Terms of claims: numbers per seed along the factors of an ablation, and extrema of several terms."""

import ast
import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from polygpt.errors import SpecError


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number per seed.

    Attributes:
        node: the expression.
        values: float64 [S, n_axis1, ...], NaN where missing; S is 1 for a constant, and so is the axis of a factor that
            was reduced.
        axes: the remaining factors.
    """

    node: ast.expr
    values: np.ndarray
    axes: frozenset[str] = frozenset()

    @property
    def text(self) -> str:
        """The expression as text."""
        return ast.unparse(self.node)

    @property
    def constant(self) -> bool:
        """Whether it consists of numbers and `noise` only."""
        return all(node.id == "noise" for node in ast.walk(self.node) if isinstance(node, ast.Name))


@dataclasses.dataclass(frozen=True)
class Extremum:
    """The smallest (`kind` "min") or largest ("max") of several terms, by their means over seeds."""

    kind: str
    options: tuple["Term", ...]

    @property
    def axes(self) -> frozenset[str]:
        """The factors that remain in any option."""
        return frozenset().union(*(option.axes for option in self.options))


Term = Quantity | Extremum

ARITHMETIC = {ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.divide}


def negative(term: Term) -> Term:
    """-term."""
    if isinstance(term, Extremum):
        return Extremum(_other(term.kind), tuple(map(negative, term.options)))
    return Quantity(ast.UnaryOp(ast.USub(), term.node), -term.values, term.axes)


def absolute(term: Term) -> Extremum:
    """abs(term): the larger of the term and its negative."""
    return Extremum("max", (term, negative(term)))


def arithmetic(op: ast.operator, left: Term, right: Term) -> Term:
    """`left op right`; for an extremum, the extremum of the results.

    Raises:
        SpecError: division by 0, or an extremum multiplied or divided by a term that differs between seeds, whose sign
            would decide whether min becomes max.
    """
    if isinstance(left, Quantity) and isinstance(right, Quantity):
        if isinstance(op, ast.Div) and right.constant and not right.values.any():
            raise SpecError(f"{left.text} is divided by 0")
        with np.errstate(all="ignore"):  # division by zero gives a missing value
            values = ARITHMETIC[type(op)](left.values, right.values)
        node = ast.BinOp(left.node, op, right.node)
        return Quantity(node, np.where(np.isfinite(values), values, np.nan), left.axes | right.axes)
    flips = isinstance(op, ast.Sub) and isinstance(right, Extremum) and not isinstance(left, Extremum)
    if isinstance(op, (ast.Mult, ast.Div)):
        factor = left if isinstance(op, ast.Mult) and isinstance(right, Extremum) else right
        if not (isinstance(factor, Quantity) and factor.constant):
            raise SpecError("a min, max or abs of terms can only be multiplied or divided by numbers: move it outwards")
        flips = factor.values.item() < 0
    if isinstance(left, Extremum):
        kind, options = left.kind, [arithmetic(op, option, right) for option in left.options]
    else:
        kind, options = right.kind, [arithmetic(op, left, option) for option in right.options]
    return Extremum(_other(kind) if flips else kind, tuple(options))


def by_seed(term: Term) -> Quantity:
    """The term with its extrema taken within each seed and point."""
    if isinstance(term, Quantity):
        return term
    options = list(map(by_seed, term.options))
    values = functools.reduce(np.minimum if term.kind == "min" else np.maximum, [option.values for option in options])
    call = ast.Call(ast.Name(term.kind), [option.node for option in options], [])
    return Quantity(call, values, term.axes)


def _other(kind: str) -> str:
    return "max" if kind == "min" else "min"


# --- over a factor ----------------------------------------------------------------------------------------------------


def _rise(values: np.ndarray, axis: int, keepdims: bool) -> np.ndarray:
    return values.take([-1], axis=axis) - values.take([0], axis=axis)


def _argmin(values: np.ndarray, axis: int, keepdims: bool) -> np.ndarray:
    lowest = values == values.min(axis=axis, keepdims=True)
    steps = np.arange(values.shape[axis]).reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    count = np.maximum(lowest.sum(axis=axis, keepdims=True), 1)  # no value equals the minimum if one is missing
    return (lowest * steps).sum(axis=axis, keepdims=True) / count


OVER: dict[str, Callable[..., np.ndarray]] = {
    "min": np.min,
    "max": np.max,
    "mean": np.mean,
    "rise": _rise,
    "spread": np.ptp,
    "argmin": _argmin,
}
"""Reductions over an axis, which is kept with size 1."""


def over(function: str, term: Term, axis: int, name: str) -> Quantity:
    """Applies a function of OVER within each seed over the factor `name`; missing where any value is missing."""
    term = by_seed(term)
    call = ast.Call(ast.Name(function), [term.node], [ast.keyword("over", ast.Name(name))])
    missing = np.isnan(term.values).any(axis=axis, keepdims=True)
    values = np.where(missing, np.nan, OVER[function](term.values, axis=axis, keepdims=True))
    return Quantity(call, values, term.axes - {name})


def at(term: Term, axis: int, name: str, index: int, point) -> Term:
    """The term at `point`, the value with index `index` of the factor `name`."""
    if name not in term.axes:  # an option that does not depend on the factor
        return term
    if isinstance(term, Extremum):
        return Extremum(term.kind, tuple(at(option, axis, name, index, point) for option in term.options))
    before = term.node if isinstance(term.node, ast.Call) and term.node.func.id == "at" else None
    keyword = ast.keyword(name, ast.Constant(point))
    call = ast.Call(ast.Name("at"), [term.node], [keyword])
    if before:  # at(at(a, width=64), length=256)
        call = ast.Call(before.func, before.args, [*before.keywords, keyword])
    return Quantity(call, term.values.take([index], axis=axis), term.axes - {name})
