"""The equations of traced functions, for tests of what a program computes that needs no clock."""

from collections.abc import Iterator

import jax
from jax.extend.core import jaxprs_in_params


def equations(function, *arguments) -> Iterator:
    """All equations of the jaxpr of `function`, inner ones included: each once, however often a loop runs it."""

    def within(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for inner in jaxprs_in_params(equation.params):
                yield from within(inner)

    yield from within(jax.make_jaxpr(function)(*arguments).jaxpr)


def largest(function, *arguments) -> int:
    """The most numbers that one array has while `function` runs."""
    results = (variable for equation in equations(function, *arguments) for variable in equation.outvars)
    return max(variable.aval.size for variable in results if hasattr(variable.aval, "size"))
