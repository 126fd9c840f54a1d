"""The variant under examination: one layer, lively parameters, and a compiled program for each kind of question."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polygpt.attention.contract import Attention, Context, Dims
from polygpt.attention.kernels.dispatch import LONG
from polygpt.attention.masks import DECODER, Causal, Mask, Meta
from polygpt.lab.compiled import compiled
from polygpt.lab.layout import CHUNK, LEAST, PREFILL, Layout, layouts
from polygpt.lab.measured import EPSILON, rounding
from polygpt.nn.positions import Rope
from polygpt.spec import hints

WIDTH = 32
"""The model width unless it is given."""
MOST = 96
"""The most positions that are chosen by themselves."""
REPLACEMENTS = 2
"""How often inputs are replaced: by other vectors each time."""


def suitable_length(spec: Attention) -> int:
    """Positions enough to go beyond what the variant's whole-number fields and its mask's reach name, up to `MOST`."""
    sizes = [getattr(spec, name) for name in hints(type(spec))]
    sizes = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool)]
    reach = mask_of(spec).reach() if mask_of(spec) is not None else None
    sizes += [reach.first + reach.last] if reach is not None else []
    return max([LEAST, *(size + 8 for size in sizes if size + 8 <= MOST)])


def seen_by(spec: Attention) -> Mask:
    """What queries see in a decoder: what the variant says of it, and nothing ahead where it sees nothing ahead."""
    mask = mask_of(spec) or DECODER
    return mask if spec.sees_ahead() else mask & Causal()


def mask_of(spec: Attention) -> Mask | None:
    """What queries see in a decoder, as the variant says; None where it says nothing."""
    return spec.mask(DECODER) if hasattr(spec, "mask") else None


def embedded(x_BTD: jax.Array) -> jax.Array:
    """What the stack was given, for variants that look at it: made of the same inputs, and other than they."""
    return jnp.flip(x_BTD, axis=-1)


class Form:
    """A specification built in one way; its functions take the parameters, vectors [B, T, D] and metadata [B, T].

    Args:
        spec: what to build.
        dims: for which model.
    """

    def __init__(self, spec: Attention, dims: Dims):
        self.spec, self.dims = spec, dims
        self.graphdef, self.abstract = nnx.split(nnx.eval_shape(self.build))
        self.forward, self.gradient = compiled(self.apply), compiled(self.pull_back)
        self.influence, self.through_cache = compiled(self._influence), compiled(self._through_cache)
        self.replaced = compiled(self._replaced)

    def build(self) -> nnx.Module:
        """The module, with initial parameters."""
        return self.spec.build(self.dims, nnx.Rngs(0))

    def apply(self, params: Any, x_BTD: jax.Array, meta: Meta) -> jax.Array:
        """y_BTD, without a cache."""
        context = Context(meta, meta, DECODER, inputs_BTD=embedded(x_BTD))
        return nnx.merge(self.graphdef, params)(x_BTD, context, None)[0]

    def pull_back(self, params: Any, x_BTD: jax.Array, meta: Meta, cotangent_BTD: jax.Array) -> tuple:
        """(y_BTD, gradient of the parameters, of x_BTD)."""
        y_BTD, back = jax.vjp(lambda params, x_BTD: self.apply(params, x_BTD, meta), params, x_BTD)
        return y_BTD, *back(cotangent_BTD)

    def _influence(self, params, x_BTD, meta, cotangent_BTD):
        """[T, B, S]: how much a random projection of the output at t moves with the input at s, relative to the most.

        Zero where the output does not depend on the input, and, but by an accident of probability zero, only there.
        """
        _, back = jax.vjp(lambda x_BTD: self.apply(params, x_BTD, meta), x_BTD)
        B, T = meta.index.shape

        def of_query(t, b):
            here = (jnp.arange(T) == t)[None, :, None] & (jnp.arange(B) == b)[:, None, None]
            (dx_BSD,) = back(jnp.where(here, cotangent_BTD, 0))
            return jnp.max(jnp.abs(dx_BSD[b]), axis=-1)

        def of_row(b):  # alone: that rows do not mix is another property
            return jax.vmap(lambda t: of_query(t, b))(jnp.arange(T))

        influence_TBS = jax.lax.map(of_row, jnp.arange(B)).swapaxes(0, 1)
        return influence_TBS / jnp.max(influence_TBS)

    def _replaced(self, params, x_BTD, other_BTD, meta, hidden_TBS):
        """y_TBD, the output at each t computed with the inputs s that are hidden from it replaced by others."""

        def of_row(row):  # alone: that rows do not mix is another property
            x_TD, other_TD, meta, hidden_TS = row

            def of_query(now):
                t, hidden_S = now
                x_1TD = jnp.where(hidden_S[:, None], other_TD, x_TD)[None]
                return self.apply(params, x_1TD, jax.tree.map(lambda array: array[None], meta))[0, t]

            return jax.lax.map(of_query, (jnp.arange(len(x_TD)), hidden_TS))

        return jax.lax.map(of_row, (x_BTD, other_BTD, meta, hidden_TBS.swapaxes(0, 1))).swapaxes(0, 1)

    def _through_cache(self, params, x_BTD, meta, cache):
        """y_BTD: `PREFILL` positions at once, `CHUNK` more, the others one by one."""
        B, T = meta.index.shape
        module = nnx.merge(self.graphdef, params)

        def call(carry, x_BTD, query):
            cache, seen, cursor = carry
            seen = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, cursor, axis=1), seen, query
            )
            context = Context(query, seen, DECODER, cursor, inputs_BTD=embedded(x_BTD))
            y_BTD, cache = module(x_BTD, context, cache)
            return (cache, seen, cursor + x_BTD.shape[1]), y_BTD

        def positions(start, stop):
            return jax.tree.map(lambda array: array[:, start:stop], (x_BTD, meta))

        def one_by_one(carry, columns):
            return call(carry, *jax.tree.map(lambda array: array[:, None], columns))

        carry = cache, Meta(*[jnp.zeros((B, T), jnp.int32)] * 5), jnp.zeros((), jnp.int32)
        carry, prompt_BTD = call(carry, *positions(0, PREFILL))
        carry, chunk_BTD = call(carry, *positions(PREFILL, PREFILL + CHUNK))
        rest = jax.tree.map(lambda array: array.swapaxes(0, 1), positions(PREFILL + CHUNK, T))
        _, steps_TB1D = jax.lax.scan(one_by_one, carry, rest)
        return jnp.concatenate([prompt_BTD, chunk_BTD, steps_TB1D[:, :, 0].swapaxes(0, 1)], axis=1)


class Subject:
    """A variant, and the rows and programs with which its properties are measured.

    Args:
        spec: the variant, as it is used.
        width: D, the width of the model that it is built into.
        length: T, positions a row; None chooses.

    Attributes:
        rows: `layout.Layouts`.
        form: the variant in float32.
        params: what forms are called with: initial values and as much noise as makes gates act that begin closed.
        cotangent_BTD: random, of the shape of a layout.
        bound: what rounding explains of a relative difference.
    """

    def __init__(self, spec: Attention, width: int = WIDTH, length: int | None = None):
        self.spec, self.width = spec, width
        self.length = suitable_length(spec) if length is None else length
        self.rows = layouts(self.length, width)
        self.form = self.other(spec)
        rng = np.random.default_rng(0)
        leaves, tree = jax.tree.flatten(nnx.state(self.form.build()))
        # Arrays of jax: a module may index a table by traced positions, also where its parameters are closed over.
        self.params = tree.unflatten([jnp.asarray(x + rng.normal(0, 0.2, x.shape), jnp.float32) for x in leaves])
        self.cotangent_BTD = np.float32(rng.normal(size=self.rows.packed.x_BTD.shape))
        self.bound = rounding(self.length, width)

    @functools.cached_property
    def differentiable(self) -> Form:
        """The variant with no gradient stopped on purpose."""
        spec = self.spec.differentiable()
        return self.form if spec == self.spec else self.other(spec)

    @functools.cached_property
    def reference(self) -> Form:
        """The variant with the materialised backend: what others are compared with."""
        chosen = self.spec.backend
        return (
            self.form if chosen == "auto" and self.length < LONG else self.other(self.spec.replace(backend="reference"))
        )

    def other(self, spec: Attention, dtype: str = "float32", scale: int = 1) -> Form:
        """A specification for a model `scale` times as wide that computes in `dtype`."""
        return Form(spec, Dims(self.width * scale, dtype, Rope()))

    def y_BTD(self, layout: Layout, form: Form | None = None) -> np.ndarray:
        """What the variant computes without a cache."""
        return np.asarray((form or self.form).forward(self.params, layout.x_BTD, layout.meta))

    @functools.cached_property
    def influence_TBS(self) -> np.ndarray:
        """How much the output at t moves with the input at s, in packed rows without padding."""
        rows = self.rows.packed
        return np.asarray(self.differentiable.influence(self.params, rows.x_BTD, rows.meta, self.cotangent_BTD))

    def moved_TB(self, hidden_TBS: np.ndarray) -> np.ndarray:
        """By how much the output at t changes when the inputs that `hidden_TBS` hides from it are replaced by others.

        Relative to the largest output, in packed rows; NaN counts as infinite. A gradient does not show what goes by
        way of a comparison, a choice of the largest or a stopped gradient: this does.
        """
        rows, error_TB = self.rows.packed, np.zeros(hidden_TBS.shape[:2])

        def outputs(seed, hidden_TBS):
            other_BTD = np.float32(3 * np.random.default_rng(70 + seed).normal(size=rows.x_BTD.shape))
            return np.asarray(self.form.replaced(self.params, rows.x_BTD, other_BTD, rows.meta, hidden_TBS))

        y_TBD = outputs(0, np.zeros_like(hidden_TBS))
        for seed in range(REPLACEMENTS):
            change_TB = np.abs(outputs(seed, hidden_TBS) - y_TBD).max(-1) / (np.abs(y_TBD).max() + EPSILON)
            error_TB = np.maximum(error_TB, np.nan_to_num(change_TB, nan=np.inf))
        return error_TB
