"""The variant being checked: one layer with random parameters, and a compiled program per kind of question."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polygpt.attention.contract import Attention, Context, Dims
from polygpt.attention.kernels.dispatch import LONG
from polygpt.attention.masks import DECODER, Causal, Mask
from polygpt.attention.meta import Meta
from polygpt.lab.compiled import compiled
from polygpt.lab.layout import CALLS, LEAST, Rows, layouts
from polygpt.lab.measured import EPSILON, rounding
from polygpt.nn.positions import Position, Rope
from polygpt.parameters import traits
from polygpt.spec import hints

WIDTH = 32
"""Default model width."""
MOST = 96
"""Maximum number of positions that is chosen automatically."""
MANY, CALLS_OF_MANY = 160, (100, 30)
"""Positions of a long row, and how to fill a cache with them. Includes the second and third block of 64 positions."""
TOGETHER = 32
"""Number of queries whose gradients are computed at once."""
ROPE = Rope()
REPLACEMENTS = 2
"""How often to replace inputs, each time by other vectors."""


def suitable_length(spec: Attention) -> int:
    """A row length that exceeds the variant's integer fields and the reach of its mask, up to `MOST`."""
    sizes = [getattr(spec, name) for name in hints(type(spec))]
    sizes = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool)]
    reach = mask_of(spec).reach() if mask_of(spec) is not None else None
    sizes += [reach.first + reach.last] if reach is not None else []
    return max([LEAST, *(size + 8 for size in sizes if size + 8 <= MOST)])


def seen_by(spec: Attention) -> Mask:
    """The effective mask in a decoder: the variant's own, made causal if the variant never sees ahead."""
    mask = mask_of(spec) or DECODER
    return mask if spec.sees_ahead() else mask & Causal()


def mask_of(spec: Attention) -> Mask | None:
    """The variant's mask in a decoder; None if it defines none."""
    return spec.mask(DECODER) if hasattr(spec, "mask") else None


def embedded(x_BTD: jax.Array) -> jax.Array:
    """The input of the stack, for variants that use it: derived from the layer's input, but different from it."""
    return jnp.flip(x_BTD, axis=-1)


class Form:
    """A variant built for given dimensions; its functions take parameters, vectors [B, T, D] and metadata [B, T].

    Args:
        spec: the variant.
        dims: the model dimensions.
    """

    def __init__(self, spec: Attention, dims: Dims):
        self.spec, self.dims = spec, dims
        module = nnx.eval_shape(self.build)
        traits(module)  # a module that no model could hold is refused
        self.graphdef, self.abstract = nnx.split(module)
        self.forward, self.gradient = compiled(self.apply), compiled(self.pull_back)
        self.influence, self.through_cache = compiled(self._influence), compiled(self._through_cache, "calls")
        self.replaced = compiled(self._replaced)

    def build(self) -> nnx.Module:
        """The module, with initial parameters."""
        return self.spec.build(self.dims, nnx.Rngs(0))

    def apply(self, params: Any, x_BTD: jax.Array, meta: Meta) -> jax.Array:
        """y_BTD, without a cache."""
        context = Context(meta, meta, DECODER, inputs_BTD=embedded(x_BTD))
        return nnx.merge(self.graphdef, params)(x_BTD, context, None)[0]

    def pull_back(self, params: Any, x_BTD: jax.Array, meta: Meta, cotangent_BTD: jax.Array) -> tuple:
        """(y_BTD, gradient of the parameters, gradient of x_BTD)."""
        y_BTD, back = jax.vjp(lambda params, x_BTD: self.apply(params, x_BTD, meta), params, x_BTD)
        return y_BTD, *back(cotangent_BTD)

    def _influence(self, params, x_BTD, meta, cotangent_BTD):
        """[T, B, S]: the gradient of a random projection of the output at t by the input at s, relative to the largest.

        It is zero exactly where the output does not depend on the input, with probability one.
        """

        def of_row(row):  # one row at a time: another property checks that rows do not mix
            x_TD, meta, cotangent_TD = jax.tree.map(lambda array: array[None], row)
            _, back = jax.vjp(lambda x_1TD: self.apply(params, x_1TD, meta), x_TD)

            def of_query(t):
                here = (jnp.arange(x_TD.shape[1]) == t)[None, :, None]
                return jnp.max(jnp.abs(back(jnp.where(here, cotangent_TD, 0))[0][0]), axis=-1)

            return jax.lax.map(of_query, jnp.arange(x_TD.shape[1]), batch_size=TOGETHER)

        influence_TBS = jax.lax.map(of_row, (x_BTD, meta, cotangent_BTD)).swapaxes(0, 1)
        return influence_TBS / (jnp.max(influence_TBS) + EPSILON)  # all zero if a row alone gives nothing

    def _replaced(self, params, x_BTD, other_BTD, meta, hidden_TBS):
        """y_TBD, the output at each t when the inputs hidden from it are replaced by others."""

        def of_row(row):  # one row at a time: another property checks that rows do not mix
            x_TD, other_TD, meta, hidden_TS = row

            def of_query(now):
                t, hidden_S = now
                x_1TD = jnp.where(hidden_S[:, None], other_TD, x_TD)[None]
                return self.apply(params, x_1TD, jax.tree.map(lambda array: array[None], meta))[0, t]

            return jax.lax.map(of_query, (jnp.arange(len(x_TD)), hidden_TS))

        return jax.lax.map(of_row, (x_BTD, other_BTD, meta, hidden_TBS.swapaxes(0, 1))).swapaxes(0, 1)

    def _through_cache(self, params, x_BTD, meta, cache, seen, calls=CALLS):
        """y_BTD through a cache, filled in two calls of `calls` positions and then one position at a time.

        `seen` is the metadata of an empty cache, [B, S].
        """
        T, (prefill, chunk) = meta.index.shape[1], calls
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

        carry = cache, seen, jnp.zeros((), jnp.int32)
        carry, prompt_BTD = call(carry, *positions(0, prefill))
        carry, chunk_BTD = call(carry, *positions(prefill, prefill + chunk))
        rest = jax.tree.map(lambda array: array.swapaxes(0, 1), positions(prefill + chunk, T))
        _, steps_TB1D = jax.lax.scan(one_by_one, carry, rest)
        return jnp.concatenate([prompt_BTD, chunk_BTD, steps_TB1D[:, :, 0].swapaxes(0, 1)], axis=1)


class Subject:
    """A variant, with the rows and programs that measure its properties.

    Args:
        spec: the variant.
        width: D, the model width.
        length: T, positions per row; None chooses it automatically.
        position: the position encoding of the model.
        calls: how to fill a cache.

    Attributes:
        rows: `layout.Layouts`.
        form: the variant in float32.
        params: the parameters: initial values plus noise, which opens gates that are initially closed.
        cotangent_BTD: random, of the shape of a layout.
        bound: the largest relative difference that rounding explains.
    """

    def __init__(
        self,
        spec: Attention,
        width: int = WIDTH,
        length: int | None = None,
        position: Position = ROPE,
        calls: tuple[int, int] = CALLS,
    ):
        self.spec, self.width, self.position, self.calls = spec, width, position, calls
        self.length = suitable_length(spec) if length is None else length
        self.rows = layouts(self.length, width, spec.labels())
        self.form = self.other(spec)
        rng = np.random.default_rng(0)
        leaves, tree = jax.tree.flatten(nnx.state(self.form.build()))
        # JAX arrays, because a module may index a table by traced positions even if its parameters are closed over.
        self.params = tree.unflatten([jnp.asarray(x + rng.normal(0, 0.2, x.shape), jnp.float32) for x in leaves])
        self.cotangent_BTD = np.float32(rng.normal(size=self.rows.packed.x_BTD.shape))
        self.bound = rounding(self.length, width)

    @functools.cached_property
    def differentiable(self) -> Form:
        """The variant without deliberate stop-gradients."""
        spec = self.spec.differentiable()
        return self.form if spec == self.spec else self.other(spec)

    @functools.cached_property
    def reference(self) -> Form:
        """The variant with the materialised backend, which other backends are compared with."""
        chosen = self.spec.backend
        return (
            self.form if chosen == "auto" and self.length < LONG else self.other(self.spec.replace(backend="reference"))
        )

    def other(self, spec: Attention, dtype: str = "float32", scale: int = 1) -> Form:
        """A specification for a model `scale` times as wide that computes in `dtype`."""
        return Form(spec, Dims(self.width * scale, dtype, self.position))

    @functools.cached_property
    def long(self) -> "Subject":
        """The variant in long rows, which span several blocks."""
        if self.length >= MANY:
            return self
        return Subject(self.spec, self.width, MANY, self.position, CALLS_OF_MANY)

    def changed(self, position: Position | None = None, **fields) -> "Subject":
        """The variant with other fields, or with another position encoding around it."""
        return Subject(self.spec.replace(**fields), self.width, self.length, position or self.position, self.calls)

    def cached_BTD(
        self, layout: Rows, ring: bool = False, size: int | None = None, form: Form | None = None
    ) -> np.ndarray:
        """The variant's output through a cache for `size` positions, by default the row length."""
        form, (B, T) = form or self.form, layout.seed_BT.shape
        cache = self.spec.init_cache(form.dims, B, size or T, ring)
        seen = Meta.empty(B, size or T, self.spec.labels())
        x_BTD = layout.x_BTD.astype(form.dims.dtype)
        return np.asarray(form.through_cache(self.params, x_BTD, layout.meta, cache, seen, calls=self.calls))

    def y_BTD(self, layout: Rows, form: Form | None = None) -> np.ndarray:
        """The variant's output without a cache."""
        return np.asarray((form or self.form).forward(self.params, layout.x_BTD, layout.meta))

    @functools.cached_property
    def influence_TBS(self) -> np.ndarray:
        """The influence of the input at s on the output at t, in packed rows without padding."""
        rows = self.rows.packed
        return np.asarray(self.differentiable.influence(self.params, rows.x_BTD, rows.meta, self.cotangent_BTD))

    def moved_TB(self, hidden_TBS: np.ndarray) -> np.ndarray:
        """The change of the output at t when the inputs hidden from it by `hidden_TBS` are replaced by others.

        Relative to the largest output, in packed rows; NaN counts as infinite. Unlike gradients, this detects
        dependencies through comparisons, argmax or stop-gradients.
        """
        rows, error_TB = self.rows.packed, np.zeros(hidden_TBS.shape[:2])
        if not hidden_TBS.any():
            return error_TB

        def outputs(seed, hidden_TBS):
            other_BTD = np.float32(3 * np.random.default_rng(70 + seed).normal(size=rows.x_BTD.shape))
            return np.asarray(self.form.replaced(self.params, rows.x_BTD, other_BTD, rows.meta, hidden_TBS))

        y_TBD = outputs(0, np.zeros_like(hidden_TBS))
        for seed in range(REPLACEMENTS):
            change_TB = np.abs(outputs(seed, hidden_TBS) - y_TBD).max(-1) / (np.abs(y_TBD).max() + EPSILON)
            error_TB = np.maximum(error_TB, np.nan_to_num(change_TB, nan=np.inf))
        return error_TB
