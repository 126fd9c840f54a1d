"""Interval arithmetic: evaluates a mask predicate once for all pairs of a block of queries and a block of keys.

Given ranges instead of numbers, comparisons have three outcomes: surely true, possibly true, surely false. Moore,
Interval Analysis (1966), for integers, with Kleene's three-valued logic. Results are sound but ignore dependencies
between numbers: for x in [0, 3], `x - x` is [-3, 3].

Operations that are undefined for ranges (`jnp` functions, `if`, attributes of arrays) raise; `block_map.py` handles
this case.
"""

import dataclasses
import numbers

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Ternary:
    """A three-valued truth value. `surely` implies `possibly`; if they differ, both values may occur."""

    surely: jax.Array
    possibly: jax.Array

    __array_ufunc__ = None  # NumPy's arrays leave operators to this class

    def __and__(self, other):
        other = _ternary(other)
        return Ternary(self.surely & other.surely, self.possibly & other.possibly)

    def __or__(self, other):
        other = _ternary(other)
        return Ternary(self.surely | other.surely, self.possibly | other.possibly)

    def __xor__(self, other):
        other = _ternary(other)
        return (self & ~other) | (~self & other)

    def __invert__(self):
        return Ternary(~self.possibly, ~self.surely)

    def __eq__(self, other):
        return ~(self ^ other)

    def __ne__(self, other):
        return self ^ other

    def __bool__(self):
        raise TypeError("the truth value of a whole block is ambiguous")

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__
    __hash__ = None


@dataclasses.dataclass(frozen=True, eq=False)
class Interval:
    """Integers from `low` to `high`, both included; arrays that broadcast against each other."""

    low: jax.Array
    high: jax.Array

    __array_ufunc__ = None

    def __add__(self, other):
        other = _interval(other)
        return Interval(self.low + other.low, self.high + other.high)

    def __neg__(self):
        return Interval(-self.high, -self.low)

    def __pos__(self):
        return self

    def __sub__(self, other):
        return self + -_interval(other)

    def __rsub__(self, other):
        return -self + other

    def __mul__(self, other):
        other = _interval(other)
        corners = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return Interval(_least(*corners), _greatest(*corners))

    def __abs__(self):
        return Interval(_greatest(self.low, -self.high, 0), _greatest(-self.low, self.high))

    def __floordiv__(self, divisor):
        if _divisor(divisor) < 0:
            return -self // -divisor
        return Interval(self.low // divisor, self.high // divisor)

    def __mod__(self, divisor):
        if _divisor(divisor) < 0:
            return -(-self % -divisor)
        within = self.low // divisor == self.high // divisor
        return Interval(jnp.where(within, self.low % divisor, 0), jnp.where(within, self.high % divisor, divisor - 1))

    def __lt__(self, other):
        other = _interval(other)
        return Ternary(self.high < other.low, self.low < other.high)

    def __le__(self, other):
        other = _interval(other)
        return Ternary(self.high <= other.low, self.low <= other.high)

    def __gt__(self, other):
        return ~(self <= other)

    def __ge__(self, other):
        return ~(self < other)

    def __eq__(self, other):
        other = _interval(other)
        known = (self.low == self.high) & (other.low == other.high)
        return Ternary(known & (self.low == other.low), (self.low <= other.high) & (other.low <= self.high))

    def __ne__(self, other):
        return ~(self == other)

    def __bool__(self):
        raise TypeError("the truth value of a range is ambiguous")

    __radd__, __rmul__ = __add__, __mul__
    __hash__ = None


# Unknown operands raise, because with NotImplemented `==` would fall back to identity.


def _interval(value) -> Interval:
    if isinstance(value, Interval):
        return value
    if isinstance(value, (numbers.Real, np.ndarray, jax.Array)):
        return Interval(value, value)
    raise TypeError(f"cannot combine a range of numbers with a {type(value).__name__}")


def _ternary(value) -> Ternary:
    if isinstance(value, Ternary):
        return value
    if isinstance(value, (bool, np.bool_, np.ndarray, jax.Array)) and jnp.asarray(value).dtype == bool:
        value = jnp.asarray(value)  # ~True is -2
        return Ternary(value, value)
    raise TypeError(f"cannot combine a truth value with a {type(value).__name__}")


def _divisor(value) -> int:
    if isinstance(value, numbers.Integral) and value != 0:
        return value
    raise TypeError(f"a range of numbers divided by {value!r}: the divisor must be a constant")


def _least(first, *others):
    for other in others:
        first = jnp.minimum(first, other)
    return first


def _greatest(first, *others):
    for other in others:
        first = jnp.maximum(first, other)
    return first
