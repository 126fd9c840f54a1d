"""cuDNN's fused attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

cuDNN knows causality, windows to the left and lengths of rows. It skips what they exclude and then needs memory
O(T + S). That is all that masks mean in rows of one example each, padded at their end and without bidirectional spans
(`Form`). Whether rows are like that depends on the data, so the program has several ways and chooses at run time:

1. the fused form, for such rows;
2. otherwise, as for packed rows, the mask as an array of B T S 16-bit numbers. Queries in `STEPS` parts, each with the
   keys up to its end, if nobody sees later ones: 5/8 of the work;
3. all keys at once, if somebody does.

Where the array would have more than `dispatch.DENSE` elements, the second and third way is the chunked backend, which
skips empty blocks. The backward pass makes the array of the mask again instead of keeping it.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from polygpt.attention.kernels import chunked
from polygpt.attention.kernels.block_map import EMPTY, block_map
from polygpt.attention.kernels.dispatch import DENSE
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import And, Causal, Mask, SameSegment, SameSpan, Window
from polygpt.attention.meta import Meta
from polygpt.attention.scores import Score, Terms

Implementation = Literal["cudnn", "xla"]

STEPS = 4
"""Parts of the queries of packed rows."""
SHORTEST = 512
"""Minimum number of queries of such a part."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A mask in cuDNN's terms, for rows of one example each.

    Attributes:
        causal: whether no position sees later ones.
        window: how many positions each sees, itself included; None for all.
        spans: whether that holds only in rows without bidirectional spans.
    """

    causal: bool = False
    window: int | None = None
    spans: bool = False


def form_of(mask: Mask) -> Form | None:
    """The form of a mask; None if it has none, as where it looks at modalities."""
    parts, form = _conjuncts(mask), Form()
    for part in parts:
        if part in (Causal(), Causal() | SameSpan()):
            form = dataclasses.replace(form, causal=True, spans=form.spans or part != Causal())
        elif isinstance(part, Window):
            form = dataclasses.replace(form, window=min(part.size, form.window or part.size))
        elif part != SameSegment():
            return None
    # cuDNN's windows are causal; and without SameSegment, the keys of padding are not told from those of an example.
    return form if SameSegment() in parts and (form.causal or form.window is None) else None


def refuses(rule: Rule, operands: Operands) -> str | None:
    """Why cuDNN cannot compute this, or None."""
    T, S, d = operands.query_BHTd.shape[2], operands.key_BKSd.shape[2], operands.query_BHTd.shape[3]
    dtypes = {x.dtype for x in (operands.query_BHTd, operands.key_BKSd, operands.value_BKSe)}
    if dtypes not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float16")}):
        return f"cuDNN computes in bfloat16 or float16, not {' and '.join(sorted(map(str, dtypes)))}"
    if type(rule.score) is not Score:
        return f"cuDNN would round the bias of {type(rule.score).__name__} to 16 bits and give it no gradient"
    if d > 128 or d % 8:
        return f"cuDNN needs a head width that is a multiple of 8 up to 128, not {d}"
    if T % 2 or S % 2:
        return f"cuDNN needs even lengths with a mask, not {T} and {S}"
    return None


def fits(rule: Rule, operands: Operands) -> bool:
    """Whether cuDNN is worth choosing: some rows have its fused form, or the array of the mask is small enough."""
    return _form(rule, operands) is not None or _elements(operands) <= DENSE


def attend(rule: Rule, operands: Operands, implementation: Implementation = "cudnn") -> jax.Array:
    """y_BHTe, see `problem.py`; `implementation` "xla" computes the same without a GPU."""
    form, other = _form(rule, operands), _other_ways(rule, operands)
    ways = [functools.partial(way, rule, implementation=implementation) for way in other]
    chosen = sees_later_parts(rule, operands) if in_steps in other else jnp.int32(0)
    if form is not None:
        ways = [functools.partial(fused, form, implementation=implementation), *ways]
        chosen = jnp.where(plain(form, operands.query, operands.key), 0, chosen + 1)
    return ways[0](operands) if len(ways) == 1 else jax.lax.switch(chosen, ways, operands)


def plain(form: Form, query: Meta, key: Meta) -> jax.Array:
    """Whether all rows have the form: bool scalar. Queries and keys are the same positions, as many of each."""
    index_1T = jnp.arange(query.segment.shape[1], dtype=jnp.int32)[None]
    real_BT = query.segment > 0
    fits_BT = (query.segment == key.segment) & (real_BT == (index_1T < _lengths(query)[:, None]))
    own_BT = query.segment == query.segment[:, :1]
    if form.spans:
        own_BT &= query.span == 0
    for name in ["index"] * form.causal + ["position"] * (form.window is not None):
        queries, keys = getattr(query, name), getattr(key, name)
        own_BT &= (queries == keys) & (queries - index_1T == queries[:, :1])
    return jnp.all(fits_BT & (own_BT | ~real_BT))


def fused(form: Form, operands: Operands, implementation: Implementation = "cudnn") -> jax.Array:
    """y_BHTe of rows that are `plain`."""
    lengths_B = jnp.maximum(_lengths(operands.query), 1)
    if form.window is None:
        options = {"query_seq_lengths": lengths_B, "key_value_seq_lengths": lengths_B}
    else:  # what a query sees within its window is no padding: no lengths, which cuDNN may not take with a window
        options = {"local_window_size": (form.window - 1, 0)}
    y_BHTe = _attention(operands, implementation, is_causal=form.causal, **options)
    return jnp.where(operands.query.segment[:, None, :, None] > 0, y_BHTe, 0)


def in_steps(rule: Rule, operands: Operands, implementation: Implementation = "cudnn") -> jax.Array:
    """y_BHTe, if no query sees keys after its part of the row."""
    size = operands.query_BHTd.shape[2] // STEPS
    parts = [_part(operands, i * size, (i + 1) * size) for i in range(STEPS)]
    return jnp.concatenate([dense(rule, part, implementation) for part in parts], axis=2)


def in_blocks(rule: Rule, operands: Operands, implementation: Implementation = "cudnn") -> jax.Array:
    """y_BHTe by the chunked backend, which needs no array of the mask."""
    return chunked.attend(rule, operands)[0]


def dense(rule: Rule, operands: Operands, implementation: Implementation = "cudnn") -> jax.Array:
    """y_BHTe, with the mask as an array."""
    return _dense(rule, implementation, dataclasses.replace(operands, terms=Terms()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dense(rule, implementation, operands):
    return _dense_forward(rule, implementation, operands)[0]


def _dense_forward(rule, implementation, operands):
    bias_B1TS, seeing_B1T1 = _bias(rule, operands)

    def compute(query_BHTd, key_BKSd, value_BKSe):
        given = Operands(query_BHTd, key_BKSd, value_BKSe, operands.query, operands.key)
        return jnp.where(seeing_B1T1, _attention(given, implementation, bias=bias_B1TS), 0)

    y_BHTe, pull_back = jax.vjp(compute, operands.query_BHTd, operands.key_BKSd, operands.value_BKSe)
    leaves, structure = jax.tree.flatten(pull_back)
    alike = (bias_B1TS.shape, bias_B1TS.dtype)
    kept = [None if (leaf.shape, leaf.dtype) == alike else leaf for leaf in leaves]
    return y_BHTe, (kept, _Static(structure), operands.query, operands.key)


def _dense_backward(rule, implementation, kept, dy_BHTe):
    leaves, structure, query, key = kept
    bias_B1TS, _ = _bias(rule, Operands(dy_BHTe, None, None, query, key))
    pull_back = jax.tree.unflatten(structure.value, [bias_B1TS if leaf is None else leaf for leaf in leaves])
    return (Operands(*pull_back(dy_BHTe), None, None),)


_dense.defvjp(_dense_forward, _dense_backward)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    value: jax.tree_util.PyTreeDef


def _bias(rule, operands):
    """0 where a pair is visible and a very negative number elsewhere; and whether a query sees anything."""
    query, key, _ = operands.views()
    visible_B1TS = rule.visible(query, key)
    seeing_B1T1 = jnp.any(visible_B1TS, axis=-1, keepdims=True)
    dtype = operands.query_BHTd.dtype
    # A query that sees nothing sees everything here: libraries differ in a softmax without visible keys. JAX gives
    # cuDNN the same numbers, because it may fail at the difference of two larger ones.
    lowest = jnp.asarray(-(2.0**15) if dtype == jnp.float16 else -(2.0**41), dtype)
    return jnp.where(visible_B1TS | ~seeing_B1T1, jnp.zeros((), dtype), lowest), seeing_B1T1


def _attention(operands: Operands, implementation: str, **options) -> jax.Array:
    """y_BHTe. Queries are already scaled."""
    arrays = (x.swapaxes(1, 2) for x in (operands.query_BHTd, operands.key_BKSd, operands.value_BKSe))
    y_BTHe = jax.nn.dot_product_attention(*arrays, scale=1.0, implementation=implementation, **options)
    return y_BTHe.swapaxes(1, 2)


def _lengths(meta: Meta) -> jax.Array:
    """int32 [B], the numbers of positions that are no padding."""
    return jnp.sum(meta.segment > 0, axis=1, dtype=jnp.int32)


def _form(rule: Rule, operands: Operands) -> Form | None:
    same = not rule.across and operands.query_BHTd.shape[2] == operands.key_BKSd.shape[2]
    return form_of(rule.mask) if same and not rule.staged else None


def _other_ways(rule: Rule, operands: Operands) -> list:
    """The ways for rows that do not have the form."""
    if _elements(operands) > DENSE:
        return [in_blocks]
    T, S = operands.query_BHTd.shape[2], operands.key_BKSd.shape[2]
    steps = T == S and T % (2 * STEPS) == 0 and T >= STEPS * SHORTEST and not rule.staged
    return [in_steps, dense] if steps else [dense]


def sees_later_parts(rule, operands) -> jax.Array:
    """int32 scalar: 0 if no query sees keys after its part of the row, else 1."""
    size = operands.query_BHTd.shape[2] // STEPS
    blocks_BQK = block_map(rule.mask, operands.query, operands.key, size, size)
    later_1QK = jnp.triu(jnp.ones((STEPS, STEPS), bool), 1)[None]
    return jnp.any(later_1QK & (blocks_BQK != EMPTY)).astype(jnp.int32)


def _part(operands: Operands, begin: int, end: int) -> Operands:
    """These queries and the keys up to their end. Without terms, which cuDNN has none of."""
    query = jax.tree.map(lambda x: x[:, begin:end], operands.query)
    key = jax.tree.map(lambda x: x[:, :end], operands.key)
    arrays = operands.query_BHTd[:, :, begin:end], operands.key_BKSd[:, :, :end], operands.value_BKSe[:, :, :end]
    return Operands(*arrays, query, key)


def _elements(operands: Operands) -> int:
    B, _, T, _ = operands.query_BHTd.shape
    return B * T * operands.key_BKSd.shape[2]


def _conjuncts(mask: Mask) -> list[Mask]:
    return [*_conjuncts(mask.left), *_conjuncts(mask.right)] if isinstance(mask, And) else [mask]
