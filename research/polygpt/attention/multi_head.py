"""Multi-head attention (Vaswani et al., 1706.03762, section 3.2), including multi-query (Shazeer, 1911.02150) and
grouped-query attention (Ainslie et al., 2305.13245).

Most variants of the softmax family derive from these classes. They override methods of the specification (`mask`,
`score`, `normalizer`) or of the module (`queries`, `keys`, `values`, `mixed`; for larger changes `own_terms`,
`pair_terms`, `project`, `attend` and `weigh`), and inherit positions, cache, backends, packing and weights for plots.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polygpt.attention import cache as memory
from polygpt.attention.contract import INSIDE, KEY, OUTPUT, QUERY, Attention, Context, Dims, blank_context
from polygpt.attention.kernels import dispatch, reference
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import DECODER, ENCODER, Mask, allowed
from polygpt.attention.meta import Meta
from polygpt.attention.running import accumulated
from polygpt.attention.scores import Score, Terms
from polygpt.attention.zigzag import needs_order
from polygpt.errors import SpecError
from polygpt.nn.linear import Linear
from polygpt.nn.norms import Norm
from polygpt.nn.positions import Position
from polygpt.sharding import constrain

PROBED = 128
"""Positions on which a mask is tried."""


@dataclasses.dataclass(frozen=True)
class MultiHead(Attention):
    """Softmax attention with H query heads and K key and value heads."""

    paper = "1706.03762"

    normalizer: ClassVar[Literal["softmax", "sigmoid"]] = "softmax"
    """How to turn scores into weights."""

    heads: int = 4
    """H, the number of query heads."""
    kv_heads: int | None = None
    """K, the number of key and value heads, a divisor of `heads`; null for as many as `heads`, 1 is multi-query."""
    head_width: int | None = None
    """d, the head width; null for the model width divided by `heads`."""
    bias: bool = False
    """Whether the projections have a bias."""
    key_bias: bool | None = None
    """Whether the key projection has a bias; null for that of `bias`. It does not affect softmax; Whisper omits it."""
    scale: float | None = None
    """Factor on queries; null for 1 / sqrt(d)."""
    qk_norm: Norm | None = None
    """Normalisation of each query and key before the position encoding. Dehghani et al., ViT-22B (2302.05442)."""
    scores: tuple[Score, ...] = ()
    """Score modifications, applied in order after that of the position encoding."""
    position: Position | None = None
    """The position encoding of this layer; null for that of the stack."""
    backend: Literal["auto", "reference", "chunked", "library", "flex"] = "auto"
    """The implementation of softmax(q k^T) v: see `polygpt attention list`."""
    strict: bool = False
    """Whether it is an error if the backend cannot compute this; otherwise the reason is logged and another is used."""

    def __post_init__(self):
        super().__post_init__()
        for name, start, kind in (("mask", DECODER, Mask), ("score", Score(), Score)):
            given = getattr(self, name)(start)
            if not isinstance(given, kind):
                raise SpecError(f"{type(self).__name__}.{name}() returned {given!r}: it must return a {kind.__name__}")

    def validate(self):
        self.require(self.heads >= 1, "heads", "at least 1")
        kv_heads = self.key_heads()
        self.require(kv_heads >= 1 and self.heads % kv_heads == 0, "kv_heads", f"a divisor of heads ({self.heads})")
        self.require(self.head_width is None or self.head_width >= 1, "head_width", "null or at least 1")
        self.require(self.position is None or not self.position.adds(), "position", INSIDE)

    def key_heads(self) -> int:
        """K."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def width_of_head(self, width: int) -> int:
        """d at model width `width`. Raises SpecError if the heads do not divide it."""
        if self.head_width is not None:
            return self.head_width
        self.require(width % self.heads == 0, "heads", f"a divisor of the model width ({width}), or set head_width")
        return width // self.heads

    def width_of_query(self, width: int) -> int:
        """The width of the query and key vectors, for scale and norm; d unless a variant overrides it."""
        return self.width_of_head(width)

    def mask(self, mask: Mask) -> Mask:
        """The mask, given the model's own `mask`. A variant narrows it: `mask & Window(64)`."""
        return mask

    def labels(self) -> frozenset[str]:
        return self.mask(DECODER).labels()

    def mixes_modalities(self) -> bool:
        # Pairs of modalities at all distances, in one example and one span: whatever a mask of the decoder shows.
        rng, index_1T, one_1T = np.random.default_rng(0), np.arange(PROBED)[None], np.ones((1, PROBED), int)
        modality_1T = rng.integers(0, 4, (1, PROBED))
        labels = {name: rng.integers(-1, 4, (1, PROBED)) for name in sorted(self.labels())}
        probe = Meta(index_1T, index_1T, one_1T, one_1T, modality_1T, labels)
        visible_1TT = np.asarray(allowed(self.mask(ENCODER), probe, probe))
        return bool((visible_1TT & (modality_1T[:, :, None] != modality_1T[:, None])).any())

    def score(self, score: Score) -> Score:
        """The score modification, given that of the position encoding. A variant extends it: `score.then(...)`."""
        for modification in self.scores:
            score = score.then(modification)
        return score

    def rule(self, mask: Mask, dims: Dims) -> Rule:
        """The static half of the backend's input."""
        return Rule(self.mask(mask), self.score(self.encoding(dims).score() or Score()), self.normalizer)

    def encoding(self, dims: Dims) -> Position:
        """The position encoding that acts in this layer."""
        return dims.position if self.position is None else self.position

    @property
    def in_order(self) -> bool:
        """Whether a score modification reads neighbours: the module itself does not."""
        own = Score() if self.position is None else self.position.score() or Score()
        return needs_order(self.score(own))

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return MultiHeadModule(self, dims, rngs)

    def init_cache(self, dims: Dims, batch_size: int, size: int, ring: bool = True) -> Any:
        def one_position():
            module = self.build(dims, nnx.Rngs(0))
            return module.remembered(jnp.zeros((batch_size, 1, dims.width), dims.dtype), blank_context(batch_size))

        return memory.empty(nnx.eval_shape(one_position), size, self.mask(DECODER), ring)

    def score_flops(self, width: int, keys: float) -> float:
        reach = self.mask(DECODER).reach()
        seen = keys if reach is None else min(keys, reach.first + reach.last)
        return 4 * self.heads * self.width_of_head(width) * seen

    def mup_scaled(self, width: int, base: Attention, base_width: int) -> Attention:
        d, of_base = self.width_of_query(width), base.width_of_query(base_width)
        if d == of_base:
            return self
        scale = of_base**-0.5 if self.scale is None else self.scale
        return self.replace(scale=scale * of_base / d)

    def backends(self) -> tuple[str, ...]:
        return dispatch.BACKENDS

    def cost(self) -> str:
        return "4 H d S"


class MultiHeadModule(nnx.Module):
    """The module of a `MultiHead`; a variant overrides some of its methods."""

    prefix: ClassVar[Any] = None
    """Trained keys and values, a `prefix.PrefixKeys`; None for most models."""

    def __init__(self, spec: MultiHead, dims: Dims, rngs: nnx.Rngs):
        self.spec, self.dims = spec, dims
        self.project(rngs)
        self.query_norm, self.key_norm = (
            spec.qk_norm and spec.qk_norm.build(spec.width_of_query(dims.width)) for _ in range(2)
        )
        self.terms = spec.rule(DECODER, dims).score.build(dims.width, spec.heads, rngs=rngs)

    def project(self, rngs: nnx.Rngs) -> None:
        """Creates the projections."""
        spec, dims, d = self.spec, self.dims, self.spec.width_of_head(self.dims.width)
        key_bias = spec.bias if spec.key_bias is None else spec.key_bias
        options = {"rngs": rngs, "dtype": dims.dtype}
        self.query = Linear(dims.width, spec.heads * d, bias=spec.bias, axes=QUERY, **options)
        self.key = Linear(dims.width, spec.key_heads() * d, bias=key_bias, axes=KEY, **options)
        self.value = Linear(dims.width, spec.key_heads() * d, bias=spec.bias, axes=KEY, **options)
        scale = dims.output_scale
        self.output = Linear(spec.heads * d, dims.width, bias=spec.bias, scale=scale, axes=OUTPUT, **options)

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        context = dataclasses.replace(context, before=memory.last(cache, context, "terms"))
        seen, key, cache = memory.extend(cache, self.remembered(x_BTD, context), context)
        operands = self.operands(x_BTD, context, seen, key)
        y_BHTe, lse_BHT = self.with_prefix(self.spec.rule(context.mask, self.dims), operands)
        return self.mixed(y_BHTe, lse_BHT, x_BTD, context), cache

    def weights(self, x_BTD: jax.Array, context: Context, chosen_R: jax.Array | None = None) -> jax.Array:
        """Attention weights of the chosen queries, float32 [B, H, R, T]; `chosen_R=None` selects all queries."""
        operands = self.operands(x_BTD, context, self.remembered(x_BTD, context), context.key)
        if chosen_R is not None:
            operands = operands.of_queries(chosen_R)
        return self.weights_with_prefix(self.spec.rule(context.mask, self.dims), operands)

    def with_prefix(self, rule: Rule, operands: Operands) -> tuple[jax.Array, jax.Array]:
        """As `attend`, with the prefix."""
        if self.prefix is None:
            return self.attend(rule, operands)
        y_BHTe, lse_BHT = self.attend(dataclasses.replace(rule, lse=True), operands)
        return self.prefix.joined(y_BHTe, lse_BHT, operands.query_BHTd)

    def weights_with_prefix(self, rule: Rule, operands: Operands) -> jax.Array:
        """As `weigh`; a prefix has the rest of the sum of the weights."""
        weights_BHTS = self.weigh(rule, operands)
        if self.prefix is None:
            return weights_BHTS
        lse_BHT = reference.attend(rule, operands)[1]
        return weights_BHTS * self.prefix.share(lse_BHT, operands.query_BHTd)[..., None]

    def attend(self, rule: Rule, operands: Operands) -> tuple[jax.Array, jax.Array]:
        """(y_BHTe, lse_BHT), computed by the backend."""
        return dispatch.attend(rule, operands, self.spec.backend, self.spec.strict)

    def weigh(self, rule: Rule, operands: Operands) -> jax.Array:
        """The attention weights of `attend`, float32 [B, H, T, S]."""
        return reference.attention_weights(rule, operands)

    def remembered(self, x_BTD: jax.Array, context: Context) -> Any:
        """The arrays to cache for later queries, a pytree of [B, ., T, ...]."""
        terms = self._terms(x_BTD, context).key
        return {"key": self.keys(x_BTD, context), "value": self.values(x_BTD, context), "terms": terms}

    def operands(self, x_BTD: jax.Array, context: Context, seen: Any, key: Meta) -> Operands:
        """The backend's arrays: queries of `x_BTD`, and all visible positions `seen` with metadata `key`."""
        d = self.spec.width_of_query(self.dims.width)
        query_BHTd = self.queries(x_BTD, context)
        scale = d**-0.5 if self.spec.scale is None else self.spec.scale
        # In float32, because a scale rounded to bfloat16 would systematically sharpen or flatten a layer's weights.
        scaled_BHTd = (query_BHTd.astype(jnp.float32) * scale).astype(query_BHTd.dtype)
        pair = self.pair_terms(x_BTD, context, seen, key)
        terms = dataclasses.replace(self._terms(x_BTD, context), key=seen["terms"], pair=pair)
        return Operands(scaled_BHTd, seen["key"], seen["value"], context.query, key, terms)

    def queries(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Queries [B, H, T, d], with positions applied."""
        return self._placed(self.heads(self.query(x_BTD)), self.query_norm, context)

    def keys(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Keys [B, K, T, d], with positions applied."""
        return self._placed(self.heads(self.key(x_BTD)), self.key_norm, context)

    def values(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Values [B, K, T, e]."""
        return self.heads(self.value(x_BTD))

    def mixed(self, y_BHTe: jax.Array, lse_BHT: jax.Array, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Projects the backend's output to [B, T, D]."""
        return self.output(joined(y_BHTe))

    def own_terms(self, x_BTD: jax.Array, context: Context) -> Terms:
        """Terms of this module, available to every score modification that has no term of the same name itself."""
        return Terms()

    def pair_terms(self, x_BTD: jax.Array, context: Context, seen: Any, key: Meta) -> dict[str, jax.Array]:
        """Pair terms, [B, H, T, S]: queries of `x_BTD`, all visible positions `seen` with metadata `key`."""
        return {}

    def heads(self, x_BTE: jax.Array) -> jax.Array:
        """[B, T, heads * d] -> [B, heads, T, d]."""
        d = self.spec.width_of_head(self.dims.width)
        x_BHTd = x_BTE.reshape(*x_BTE.shape[:2], -1, d).transpose(0, 2, 1, 3)
        # Keep heads whole on a device, even with fewer key heads than devices: split heads would need communication.
        return constrain(x_BHTd, "batch", "heads", "positions", None)

    def _placed(self, x_BHTd, norm, context):
        x_BHTd = x_BHTd if norm is None else norm(x_BHTd)
        return self.spec.encoding(self.dims).rotate(x_BHTd, context.query.position, context.coordinate_BT3)

    def _terms(self, x_BTD, context) -> Terms:
        terms = Terms() if self.terms is None else self.terms(x_BTD, context.query)
        return accumulated(terms.merged(self.own_terms(x_BTD, context)), context.query.segment, context.before)


def joined(y_BHTe: jax.Array) -> jax.Array:
    """[B, H, T, e] -> [B, T, H * e]."""
    B, H, T, e = y_BHTe.shape
    return y_BHTe.transpose(0, 2, 1, 3).reshape(B, T, H * e)
