"""Splash attention, JAX's Pallas kernel for TPUs, for masks that depend only on the index in the row.

The kernel takes a mask of indices that is static at compile time, and dynamic segment ids. Masks have that form if they
are `SameSegment` combined with comparisons of indices, or of positions with each other: within an example, positions
are as far apart as indices. The program checks at run time that rows are laid out this way, with contiguous examples
and ascending positions; if not, the result is NaN.

This covers media towers and masks without spans. The mask of a decoder, DECODER, has spans, which depend on the data,
so splash attention cannot compute it and `flex.py` does.
"""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as patterns

from polygpt.attention.kernels import chunked
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import And, Causal, Mask, SameSegment
from polygpt.attention.meta import Meta
from polygpt.attention.scores import Score, SoftCap
from polygpt.nn.remat import COSTLY

LANES = 128
"""The number of lanes of a TPU's vector unit; block sizes are multiples of it."""


def refuses(rule: Rule, operands: Operands) -> str | None:
    """Why it cannot compute this, or None."""
    T, S, e = operands.query_BHTd.shape[2], operands.key_BKSd.shape[2], operands.value_BKSe.shape[3]
    if rule.normalizer != "softmax":
        return f"splash attention has no {rule.normalizer} normalizer"
    if type(rule.score) not in (Score, SoftCap):
        return f"splash attention supports no score modification except SoftCap, not {type(rule.score).__name__}"
    if rule.across:
        return "splash attention needs queries and keys of the same positions, unlike cross-attention"
    if T != S:
        return f"splash attention needs as many queries as keys, not {T} and {S} (as with a cache)"
    if T % LANES:
        return f"splash attention needs a length that is a multiple of {LANES}, not {T}"
    if e > LANES and e % LANES:
        return f"splash attention needs values of at most {LANES} channels or a multiple of that, not {e}"
    parts = _conjuncts(rule.mask)
    if SameSegment() not in parts:
        return "splash attention needs SameSegment in the mask to exclude padding"
    try:
        itself_T = _known_at(_within_example(parts), np.arange(T), np.arange(T))
    except _Unknowable as what:
        return f"splash attention supports only the order and distance of positions, but the mask looks at {what}"
    if not itself_T.all():
        return "splash attention needs every position to see itself"
    return None


def attend(rule: Rule, operands: Operands, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT), see `problem.py`; `interpret` runs the kernel on any device, slowly."""
    H, T = operands.query_BHTd.shape[1:3]
    inner = _within_example(_conjuncts(rule.mask))
    kernel = splash.make_splash_mha(
        patterns.MultiHeadMask([_pattern(inner, T)] * H),
        block_sizes=_blocks(T),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=rule.score.cap if isinstance(rule.score, SoftCap) else None,
        interpret=interpret,
        residual_checkpoint_name=COSTLY,
    )
    segments = splash.SegmentIds(operands.query.segment, operands.key.segment)
    y_BHTe = jax.vmap(kernel)(operands.query_BHTd, operands.key_BKSd, operands.value_BKSe, segments)

    # If rows have the required layout, every query that is not padding sees at least itself.
    y_BHTe = jnp.where(operands.query.segment[:, None, :, None] > 0, y_BHTe, 0).astype(operands.value_BKSe.dtype)
    laid_out_B = laid_out(rule.mask, operands.query, operands.key)
    y_BHTe = jnp.where(laid_out_B[:, None, None, None], y_BHTe, jnp.nan)
    # The kernel's own lse has no gradient. If lse is unused, this is not computed.
    return y_BHTe, chunked.attend(rule, operands)[1]


def laid_out(mask: Mask, query: Meta, key: Meta) -> jax.Array:
    """Whether the kernel's result matches the mask, given each row's layout, bool [B]; padding may contain anything.

    Queries and keys must have the same metadata. If the mask uses indices, they must count from 0; if it uses
    positions, they must equal the indices minus a constant within each example. Costs a sort of [B, T].
    """
    inner = _within_example(_conjuncts(mask))
    index_1T, padding_BT = jnp.arange(query.index.shape[1], dtype=jnp.int32)[None], query.segment == 0
    as_key_BT = query.segment == key.segment
    if _looks_at("index", inner):
        as_key_BT &= padding_BT | (query.index == index_1T) & (key.index == index_1T)
    if not _looks_at("position", inner):
        return jnp.all(as_key_BT, axis=1)
    as_key_BT &= padding_BT | (query.position == key.position)
    # Sorting brings the constants of an example together, wherever its pieces are in the row.
    segment_BT, constant_BT = jax.lax.sort((query.segment, query.position - index_1T), dimension=1, num_keys=2)
    same_BU = (segment_BT[:, 1:] == segment_BT[:, :-1]) & (segment_BT[:, 1:] > 0)
    two_BU = same_BU & (constant_BT[:, 1:] != constant_BT[:, :-1])
    return jnp.all(as_key_BT, axis=1) & ~jnp.any(two_BU, axis=1)


def _blocks(T: int) -> splash.BlockSizes:
    """The same block size for everything: the largest up to 512 that divides the length."""
    size = next(size for size in (512, 384, 256, LANES) if T % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return splash.BlockSizes(**dict.fromkeys(names, size))


# --- from predicates to patterns of indices ---------------------------------------------------------------------------


def _conjuncts(mask: Mask) -> list[Mask]:
    return [*_conjuncts(mask.left), *_conjuncts(mask.right)] if isinstance(mask, And) else [mask]


def _within_example(parts: list[Mask]) -> list[Mask]:
    return [part for part in parts if part != SameSegment()]


def _at_indices(parts: list[Mask], query_index: Any, key_index: Any, hidden: str = "") -> Any:
    """Whether all parts hold for these indices in one example. Raises _Unknowable naming any other dependency.

    The field `hidden`, "index" or "position", is treated as unknown too.
    """

    def meta(index):
        known = {"index": index, "position": _Position(index)}
        known[hidden] = _Unknown(hidden)
        unknown = map(_Unknown, ("segments", "spans", "modalities"))
        labels = frozenset().union(*(part.labels() for part in parts))
        extra = {name: _Unknown(f"the label {name!r}") for name in labels}
        return Meta(known["index"], known["position"], *unknown, extra)

    query, key = meta(query_index), meta(key_index)
    seen = (query_index >= 0) & (key_index >= 0)  # of the broadcast shape
    for part in parts:
        try:
            seen = seen & part(query, key)
        except TypeError as error:  # it called a function instead of using an operator
            raise _Unknowable(f"metadata other than by operators: {error}") from error
    return seen


def _looks_at(field: str, parts: list[Mask]) -> bool:
    """Whether the parts depend on the field "index" or "position"."""
    try:
        with jax.ensure_compile_time_eval():
            _at_indices(parts, np.zeros(1, np.int32), np.zeros(1, np.int32), hidden=field)
    except _Unknowable:
        return True
    return False


def _known_at(parts: list[Mask], query_index: np.ndarray, key_index: np.ndarray) -> np.ndarray:
    """`_at_indices` at compile time: a mask may call JAX functions on differences of positions."""
    with jax.ensure_compile_time_eval():
        return np.asarray(_at_indices(parts, query_index, key_index))


def _pattern(parts: list[Mask], T: int) -> patterns.Mask:
    if parts == [Causal()]:
        return patterns.CausalMask((T, T))  # computed by the kernel, which loads the tiles of other masks
    return _Pattern(parts, T)


class _Pattern(patterns.Mask):
    def __init__(self, parts: list[Mask], T: int):
        self.parts, self.index_T = parts, np.arange(T)

    @property
    def shape(self) -> tuple[int, int]:
        return self.index_T.size, self.index_T.size

    def __getitem__(self, slices: tuple[slice, slice]) -> np.ndarray:
        rows, columns = slices
        return _known_at(self.parts, self.index_T[rows][:, None], self.index_T[columns][None, :])


class _Unknowable(Exception):
    """A mask uses values that are unknown at compile time."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Unknown:
    """Metadata that supports no operator."""

    name: str
    __array_ufunc__ = None  # NumPy arrays defer operators to this class


@dataclasses.dataclass(frozen=True, eq=False)
class _Position:
    """Positions of one example, known up to a constant: their differences and order equal those of indices."""

    index: Any
    __array_ufunc__ = None


def _refuse(self, *others):
    raise _Unknowable(getattr(self, "name", "positions by themselves"))


def _relative(name: str):
    """The operator on two positions; raises _Unknowable for any other operand."""

    def operate(self, other):
        if not isinstance(other, _Position):
            _refuse(self)
        return getattr(operator, name)(self.index, other.index)

    return operate


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor"):
    for _class in (_Unknown, _Position):
        setattr(_class, f"__{_name}__", _refuse)
        setattr(_class, f"__r{_name}__", _refuse)
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "abs", "invert"):
    for _class in (_Unknown, _Position):
        setattr(_class, f"__{_name}__", _refuse)
for _name in ("sub", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(_Position, f"__{_name}__", _relative(_name))
