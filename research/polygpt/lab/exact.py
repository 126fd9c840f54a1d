"""Evaluates a program in float64, whatever dtypes it uses.

Finite differences need more digits than float32 has, but models deliberately use float32 in many places. The program is
therefore traced as it is, and the trace is evaluated with every floating-point number in float64.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

INLINED = {"jaxpr", "call_jaxpr", "fun_jaxpr"}
"""Names of the parameters in which call operations hold the called program."""
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
"""Operations that only call another program."""


class Unsupported(Exception):
    """An operation with an inner program, or one that reads the bits of a number."""


def widened(function: Callable, *arguments: Any) -> Callable:
    """`function`, for pytrees like the arguments, evaluated in float64; call it under `jax.enable_x64(True)`.

    Raises:
        Unsupported: if it contains an operation that cannot be evaluated in float64.
    """
    traced, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    _refuse(traced.jaxpr)
    tree = jax.tree.structure(shape)

    def run(*arguments):
        return tree.unflatten(_evaluate(traced.jaxpr, traced.consts, jax.tree.leaves(arguments)))

    return run


def _refuse(jaxpr: core.Jaxpr) -> None:
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, list(_programs(equation.params))
        known = name in CALLS or name in ("scan", "while", "cond") or name.startswith("scatter")
        if (inner and not known) or name in ("bitcast_convert_type", "pure_callback", "io_callback"):
            raise Unsupported(name)
        for program in inner:
            _refuse(program)


def _programs(params: dict):
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _wide(x):
    return jnp.asarray(x, jnp.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence, arguments: Sequence) -> list:
    known = dict(zip(jaxpr.constvars, map(_wide, consts), strict=True))
    known |= dict(zip(jaxpr.invars, map(_wide, arguments), strict=True))

    def read(atom):
        return _wide(np.asarray(atom.val, atom.aval.dtype)) if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        results = _bind(equation, [read(atom) for atom in equation.invars])
        known |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _closed(program: core.ClosedJaxpr | core.Jaxpr, arguments: Sequence) -> list:
    if isinstance(program, core.ClosedJaxpr):
        return _evaluate(program.jaxpr, program.consts, arguments)
    return _evaluate(program, (), arguments)


def _bind(equation, arguments: list) -> list:
    name, params = equation.primitive.name, dict(equation.params)
    if name in CALLS:
        return _closed(next(params[key] for key in params if key in INLINED), arguments)
    if name == "scan":
        return _scan(params, arguments)
    if name == "while":
        return _while(params, arguments)
    if name == "cond":
        index, *operands = arguments
        branches = [lambda *operands, branch=branch: _closed(branch, operands) for branch in params["branches"]]
        return jax.lax.switch(index, branches, *operands)
    if name == "reduce_precision":
        return arguments
    for key, value in params.items():
        is_dtype = isinstance(value, (np.dtype, type)) and key != "index_dtype"
        if is_dtype and jnp.issubdtype(value, jnp.floating):
            params[key] = np.dtype("float64")
    results = equation.primitive.bind(*arguments, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def _scan(params: dict, arguments: list) -> list:
    if "num_consts" in params:
        constants, carried = params["num_consts"], params["num_carry"]
    else:  # from JAX 0.12 on: flat trees of constants, carry and columns
        constants, carried, _ = map(len, params["ft_in"].unpack())
    fixed, start, columns = (
        arguments[:constants],
        arguments[constants : constants + carried],
        arguments[constants + carried :],
    )

    def body(carry, column):
        results = _closed(params["jaxpr"], [*fixed, *carry, *column])
        return results[:carried], results[carried:]

    end, collected = jax.lax.scan(body, start, columns, length=params["length"], reverse=params["reverse"])
    return [*end, *collected]


def _while(params: dict, arguments: list) -> list:
    n, m = params["cond_nconsts"], params["body_nconsts"]
    of_condition, of_body, start = arguments[:n], arguments[n : n + m], arguments[n + m :]
    return jax.lax.while_loop(
        lambda carry: _closed(params["cond_jaxpr"], [*of_condition, *carry])[0],
        lambda carry: _closed(params["body_jaxpr"], [*of_body, *carry]),
        start,
    )
