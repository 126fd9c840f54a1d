"""Recomputation in the backward pass: which values the policies of `StackSpec.remat` keep."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

INPUT = "input of a block"
"""The checkpoint name of a block's input."""
COSTLY = "costly"
"""The checkpoint name of results that "dots" keeps although they are no plain matrix product."""

_saved = jax.checkpoint_policies
_MOVES = ("dynamic_slice", "gather", "squeeze", "transpose", "reshape", "broadcast_in_dim", "convert_element_type")


def _product(primitive, *_, **parameters) -> bool:
    """Whether it multiplies with the matrix of a layer. That has at most one batch axis: experts, or pipeline stages.
    The products of attention have two, rows and heads, and are not kept: scores take T x S per row and head."""
    return primitive.name == "dot_general" and len(parameters["dimension_numbers"][1][0]) <= 1


KEPT = {
    # Keep all computed values, but none that were only moved or cast: those may be parameters.
    "none": lambda primitive, *_, **__: primitive.name not in _MOVES,
    "dots": _saved.save_from_both_policies(_product, _saved.save_only_these_names(INPUT, COSTLY)),
    "full": _saved.save_only_these_names(INPUT),
}
"""By `StackSpec.remat`: the values of a block kept for the backward pass. They never include parameters."""


def costly(results: Any) -> Any:
    """The results, a pytree of arrays, marked so that the policy "dots" keeps them.

    In a function with a custom gradient, mark what the forward rule keeps for the backward rule, not the final results:
    they are different variables to the policy.
    """
    return jax.tree.map(lambda x: checkpoint_name(x, COSTLY), results)
