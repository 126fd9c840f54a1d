"""Probes for data-dependent masking: visible pairs that have no influence in a module with random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polygpt.attention.contract import Attention, Context, Dims
from polygpt.attention.masks import DECODER, Mask, allowed
from polygpt.lab.blame import told
from polygpt.lab.drawing import DENSE, Row
from polygpt.lab.subject import mask_of
from polygpt.nn.positions import Rope

QUERIES = 32
"""Maximum number of queries to probe."""
SILENT = 0.01
"""Fraction of visible pairs that may be without influence, because weights can underflow."""


def remark(spec: Attention, mask: Mask, row: Row) -> str | None:
    """A note for readers of the picture of `mask`; None if the picture is complete."""
    name = type(spec).__name__
    if mask_of(spec) is None:
        return f"{name} has no mask: the picture shows the earlier positions of each example, which its state can carry"
    if spec.mask_is_bound:
        return f"visibility depends on data: the picture shows the mask of {name}, an upper bound (mask_is_bound)"
    if row.length > DENSE:
        return (
            f"rows of more than {DENSE:,} positions are not probed: data-dependent selection by {name} would not show"
        )
    try:
        share = silent(spec, mask, row)
    except Exception as error:  # the picture of the mask needs no module
        return f"the module was not probed: {told(error, type(spec))}"
    if share <= SILENT:
        return None
    seen = f"with random inputs {share:.0%} of the pairs shown have no influence"
    return (
        f"visibility depends on data: {seen}; the picture shows the mask of {name}, an upper bound: set mask_is_bound"
    )


def silent(spec: Attention, mask: Mask, row: Row) -> float:
    """The fraction of visible pairs (query, another key) whose key input does not influence the query's output.

    Args:
        spec: the variant, built in float32 with random parameters and rotary positions.
        mask: the mask.
        row: a row of at most `DENSE` positions; `QUERIES` of its queries are probed.
    """
    dims = Dims(16 * getattr(spec, "heads", 2), position=Rope())
    module = spec.build(dims, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x_1TD = jnp.asarray(rng.normal(size=(1, row.length, dims.width)), jnp.float32)
    cotangent_D = jnp.asarray(rng.normal(size=dims.width), jnp.float32)
    shown = np.array(allowed(mask, row.meta, row.meta))[0]
    np.fill_diagonal(shown, False)
    asked = np.flatnonzero(shown.any(axis=1))
    asked = asked[np.linspace(0, len(asked) - 1, min(QUERIES, len(asked))).astype(int)]
    if not len(asked):
        return 0.0
    graphdef, params = nnx.split(module)

    @jax.jit
    def moves(params, x_1TD):
        def forward(x_1TD):
            return nnx.merge(graphdef, params)(x_1TD, Context(row.meta, row.meta, DECODER, inputs_BTD=x_1TD))[0]

        back = jax.vjp(forward, x_1TD)[1]

        def of_query(t):
            return jnp.any(back(jnp.zeros_like(x_1TD).at[0, t].set(cotangent_D))[0][0] != 0, axis=-1)

        return jax.lax.map(of_query, jnp.asarray(asked))

    moved = np.asarray(moves(params, x_1TD))
    return float((shown[asked] & ~moved).sum() / shown[asked].sum())
