"""Blockwise attention in plain XLA: works on every platform and for every rule without an array of T x S.

Uses online softmax (Milakov and Gimelshein, 1805.02867) as Rabe and Staats (2112.05682) do for attention: for each
block of queries, a loop over blocks of keys carries the largest score so far, the sum of exponentials relative to it,
and the weighted sum of values. The backward pass is FlashAttention's (2205.14135, algorithm 4; 2307.08691, section
3.1.2): y, lse and the inputs are kept, the scores of each tile are recomputed. Memory is linear in T and S.

Blocks that are empty in all rows are never visited: the loop runs over a list of the others, whose length is dynamic,
so the cost of a window is proportional to its keys. Each tile is an `Operands`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from polygpt.attention.kernels import dispatch
from polygpt.attention.kernels.block_map import EMPTY, block_map
from polygpt.attention.kernels.problem import LOWEST, Operands, Rule, padded
from polygpt.attention.scores import Terms
from polygpt.nn.remat import costly

SCORES = 2**18
"""Scores per tile, over all rows and heads, that fit into CPU caches: 1 MiB. Speed-up over the reference, forward and
backward, causal, head width 64, by block size: one head at T 4096 4.7 (128), 7.5 (256), 12 (512) and 3.4 (1024); 24
rows times heads at T 1024 3.4 (64), 5.6 (128), 2.8 (256) and 1.9 (512)."""
SMALLEST, LARGEST = 128, 512
"""Positions per block. Smaller blocks have more overhead, larger ones skip less."""
MOST = 256
"""Maximum number of blocks along an axis before blocks grow, which keeps the block map small."""


def refuses(rule: Rule, operands: Operands) -> None:
    """Never: it supports every problem."""
    return None


def attend(rule: Rule, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT), see `problem.py`. Supports first-order reverse-mode differentiation."""
    return in_blocks(rule, operands, *block_sizes(rule, operands))


def block_sizes(rule: Rule, operands: Operands) -> tuple[int, int]:
    """The numbers of queries and keys per tile."""
    B, H, T, _ = operands.query_BHTd.shape
    S = operands.key_BKSd.shape[2]
    size = LARGEST
    while size > SMALLEST and B * H * size**2 > SCORES:
        size //= 2

    def block(length):
        return rule.block(min(length, dispatch.block() or max(size, -(-length // MOST))))

    return block(T), block(S)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def in_blocks(rule: Rule, operands: Operands, block_q: int, block_k: int) -> tuple[jax.Array, jax.Array]:
    """`attend` with tiles of `block_q` queries and `block_k` keys; T and S need not be multiples."""
    return _attend(rule, (block_q, block_k), operands, _visits(rule, (block_q, block_k), operands))


def gradients(rule: Rule, operands: Operands, lse_BHT: jax.Array, dy_BHTe: jax.Array, delta_BHT: jax.Array) -> Operands:
    """The gradients' share that is due to these keys, see `problem.py`."""
    sizes = block_sizes(rule, operands)
    return _gradients(rule, sizes, operands, _visits(rule, sizes, operands), lse_BHT, dy_BHTe, delta_BHT)


def _visits(rule, sizes, operands):
    """For each block of queries, the number of key blocks to visit, and their list; the rest of the list is unused."""
    blocks_Bij = block_map(rule.mask, operands.query, operands.key, *sizes)
    seen_ij = jnp.any(blocks_Bij != EMPTY, axis=0)
    return jnp.sum(seen_ij, axis=1, dtype=jnp.int32), jnp.argsort(~seen_ij, axis=1, stable=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(rule, sizes, operands, visits):
    B, H, T, _ = operands.query_BHTd.shape
    e = operands.value_BKSe.shape[3]
    keys = _key_blocks(operands, sizes[1])

    def block_of_queries(block):
        queries, pairs, count, order = block
        b = sizes[0]

        def visit(n, state):
            top_BHt1, total_BHt1, sum_BHte = state
            tile = _tile(queries, _block(keys, order[n]), operands.terms.head, _block(pairs, order[n]))
            score_BHts = _modified(rule, tile, _products(tile.query_BHTd, tile.key_BKSd), tile.terms)
            visible_B1ts = _visible(rule, tile)
            if rule.normalizer == "sigmoid":
                weight_BHts = jnp.where(visible_B1ts, jax.nn.sigmoid(score_BHts), 0.0)
                return top_BHt1, total_BHt1, sum_BHte + _weighted(weight_BHts, tile.value_BKSe)
            score_BHts = jnp.where(visible_B1ts, score_BHts, LOWEST)
            higher_BHt1 = jnp.maximum(top_BHt1, jnp.max(score_BHts, axis=-1, keepdims=True))
            weight_BHts = jnp.where(visible_B1ts, jnp.exp(score_BHts - higher_BHt1), 0.0)
            shrink_BHt1 = jnp.exp(top_BHt1 - higher_BHt1)
            total_BHt1 = total_BHt1 * shrink_BHt1 + jnp.sum(weight_BHts, axis=-1, keepdims=True)
            return higher_BHt1, total_BHt1, sum_BHte * shrink_BHt1 + _weighted(weight_BHts, tile.value_BKSe)

        start = jnp.full((B, H, b, 1), LOWEST), jnp.zeros((B, H, b, 1)), jnp.zeros((B, H, b, e))
        top_BHt1, total_BHt1, sum_BHte = jax.lax.fori_loop(0, count, visit, start)
        if rule.normalizer == "sigmoid":
            return sum_BHte.astype(operands.value_BKSe.dtype), jnp.zeros((B, H, b))
        total_BHt1 = jnp.where(total_BHt1 > 0, total_BHt1, 1.0)  # 0 if no key is visible: y is 0 and lse is LOWEST
        y_BHte = (sum_BHte / total_BHt1).astype(operands.value_BKSe.dtype)
        return y_BHte, (top_BHt1 + jnp.log(total_BHt1))[..., 0]

    blocks = (_query_blocks(operands, sizes[0]), _pair_blocks(operands, sizes), *visits)
    y_iBHte, lse_iBHt = jax.lax.map(block_of_queries, blocks)
    return _merge(y_iBHte, T), _merge(lse_iBHt, T)


def _forward(rule, sizes, operands, visits):
    y_BHTe, lse_BHT = costly(_attend(rule, sizes, operands, visits))
    return (y_BHTe, lse_BHT), (operands, visits, y_BHTe, lse_BHT)


def _backward(rule, sizes, kept, cotangents):
    operands, visits, y_BHTe, lse_BHT = kept
    dy_BHTe, dlse_BHT = cotangents
    # The softmax subtracts this from the cotangent of each weight: d y_t / d score_s = p_s (v_s - y_t), and
    # d lse_t / d score_s = p_s.
    delta_BHT = jnp.sum(dy_BHTe.astype(jnp.float32) * y_BHTe.astype(jnp.float32), axis=-1) - dlse_BHT
    return _gradients(rule, sizes, operands, visits, lse_BHT, dy_BHTe, delta_BHT), None


_attend.defvjp(_forward, _backward)


def _gradients(rule, sizes, operands, visits, lse_BHT, dy_BHTe, delta_BHT) -> Operands:
    T, S = operands.query_BHTd.shape[2], operands.key_BKSd.shape[2]
    # Padding queries get zero weights: exp(score - lse) is 0.
    lse_iBHt = _blocks(lse_BHT, 2, sizes[0], fill=-LOWEST)
    results = _blocks(dy_BHTe, 2, sizes[0]), _blocks(delta_BHT, 2, sizes[0]), lse_iBHt
    keys = _key_blocks(operands, sizes[1])

    def block_of_queries(sums, block):
        queries, pairs, results, count, order = block

        def visit(n, state):
            of_queries, of_pairs, of_keys, of_heads = state
            tile = _tile(queries, _block(keys, order[n]), operands.terms.head, _block(pairs, order[n]))
            here = _tile_gradients(rule, tile, *results)
            of_keys, of_pairs = _add_block(of_keys, here[1], order[n]), _add_block(of_pairs, here[3], order[n])
            of_heads = jax.tree.map(jnp.add, of_heads, here[2])
            return jax.tree.map(jnp.add, of_queries, here[0]), of_pairs, of_keys, of_heads

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), ((queries[0], queries[2]), pairs))
        of_queries, of_pairs, of_keys, of_heads = jax.lax.fori_loop(0, count, visit, (*zeros, *sums))
        return (of_keys, of_heads), (of_queries, of_pairs)

    # Gradients of keys and values are accumulated transposed, [.., d, s], the layout of the products.
    transposed = (keys[0].swapaxes(3, 4), keys[1].swapaxes(3, 4), keys[3])
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (transposed, operands.terms.head))
    blocks = (_query_blocks(operands, sizes[0]), _pair_blocks(operands, sizes), results, *visits)
    (of_keys, head), (of_queries, of_pairs) = jax.lax.scan(block_of_queries, sums, blocks)
    dquery_BHTd, query = jax.tree.map(lambda x: _merge(x, T), of_queries)
    dkey_BKSd, dvalue_BKSe = (_merge(x.swapaxes(-1, -2), S) for x in of_keys[:2])
    key = jax.tree.map(lambda x: _merge(x, S), of_keys[2])
    pair = jax.tree.map(lambda x: _merge_pairs(x, T, S), of_pairs)
    return Operands(
        dquery_BHTd.astype(operands.query_BHTd.dtype),
        dkey_BKSd.astype(operands.key_BKSd.dtype),
        dvalue_BKSe.astype(operands.value_BKSe.dtype),
        None,
        None,
        jax.tree.map(lambda x, like: x.astype(like.dtype), Terms(head, query, key, pair), operands.terms),
    )


def _tile_gradients(rule, tile: Operands, dy_BHte, delta_BHt, lse_BHt):
    """Gradients of a tile: ((query, terms), (key transposed, value transposed, terms), head terms, pair terms)."""
    score_BHts, pullback = jax.vjp(
        functools.partial(_modified, rule, tile), _products(tile.query_BHTd, tile.key_BKSd), tile.terms
    )
    visible_B1ts = _visible(rule, tile)
    dweight_BHts = _products(dy_BHte, tile.value_BKSe)
    if rule.normalizer == "sigmoid":
        weight_BHts = jnp.where(visible_B1ts, jax.nn.sigmoid(score_BHts), 0.0)
        dscore_BHts = weight_BHts * (1 - weight_BHts) * dweight_BHts
    else:
        weight_BHts = jnp.where(visible_B1ts, jnp.exp(score_BHts - lse_BHt[..., None]), 0.0)
        dscore_BHts = weight_BHts * (dweight_BHts - delta_BHt[..., None])
    dproduct_BHts, terms = pullback(dscore_BHts)
    K = tile.key_BKSd.shape[1]
    of_query = _weighted(dproduct_BHts, tile.key_BKSd), terms.query
    of_key = _summed(tile.query_BHTd, dproduct_BHts, K), _summed(dy_BHte, weight_BHts, K), terms.key
    return of_query, of_key, terms.head, terms.pair


def _modified(rule, tile: Operands, product_BHts, terms: Terms):
    """Modified scores of the products of queries and keys."""
    query, key, terms = dataclasses.replace(tile, terms=terms).views()
    return rule.score(product_BHts, query, key, terms)


def _visible(rule, tile: Operands):
    """bool [B, 1, t, s]."""
    query, key, _ = tile.views()
    return rule.visible(query, key)


# Products as in `reference.py`: the large operand is never contracted over its first matrix axis; groups fold into t.


def _fold_groups(x_BHtn, K: int):
    B, H, t, n = x_BHtn.shape
    return x_BHtn.reshape(B, K, H // K * t, n)


def _products(left_BHtn, right_BKsn):
    """left right^T, float32 [B, H, t, s]."""
    B, H, t, _ = left_BHtn.shape
    K, s = right_BKsn.shape[1:3]
    left = _fold_groups(left_BHtn, K)
    product = jnp.einsum("bktn,bkns->bkts", left, right_BKsn.swapaxes(2, 3), preferred_element_type=jnp.float32)
    return product.reshape(B, H, t, s)


def _weighted(weight_BHts, right_BKsn):
    """weight right, float32 [B, H, t, n]."""
    B, H, t, _ = weight_BHts.shape
    K, n = right_BKsn.shape[1], right_BKsn.shape[3]
    weight = _fold_groups(weight_BHts.astype(right_BKsn.dtype), K)
    product = jnp.einsum("bkts,bkns->bktn", weight, right_BKsn.swapaxes(2, 3), preferred_element_type=jnp.float32)
    return product.reshape(B, H, t, n)


def _summed(left_BHtn, weight_BHts, K: int):
    """left^T weight over the queries of all heads of a group, float32 [B, K, n, s]."""
    left, weight = _fold_groups(left_BHtn, K), _fold_groups(weight_BHts.astype(left_BHtn.dtype), K)
    return jnp.einsum("bktn,bkts->bkns", left, weight, preferred_element_type=jnp.float32)


def _tile(queries, keys, head, pair) -> Operands:
    """The problem of one block of queries and one of keys."""
    (query_BHtd, query, query_terms), (key_BKsd, value_BKse, key, key_terms) = queries, keys
    return Operands(query_BHtd, key_BKsd, value_BKse, query, key, Terms(head, query_terms, key_terms, pair))


def _query_blocks(operands: Operands, size: int):
    """(queries, metadata, terms), each [i, B, ..., size, ...]."""
    query = jax.tree.map(lambda x: _blocks(x, 1, size), operands.query)
    terms = jax.tree.map(lambda x: _blocks(x, 2, size, None), operands.terms.query)
    return _blocks(operands.query_BHTd, 2, size), query, terms


def _key_blocks(operands: Operands, size: int):
    """(keys, values, metadata, terms), each [j, B, ..., size, ...]; positions after the last key are padding."""
    key, value = (_blocks(x, 2, size) for x in (operands.key_BKSd, operands.value_BKSe))
    meta = jax.tree.map(lambda x: _blocks(x, 1, size), operands.key)
    return key, value, meta, jax.tree.map(lambda x: _blocks(x, 2, size, None), operands.terms.key)


def _pair_blocks(operands: Operands, sizes: tuple[int, int]):
    """Pair terms, each [i, j, B, H, block_q, block_k]."""

    def blocks(x_BHTS):
        return _blocks(_blocks(x_BHTS, 3, sizes[1], None), 3, sizes[0], None)

    return jax.tree.map(blocks, operands.terms.pair)


def _merge_pairs(x_ijBHts, T: int, S: int):
    """The inverse of `_pair_blocks` for one array."""
    i, j, B, H, t, s = x_ijBHts.shape
    return x_ijBHts.transpose(2, 3, 0, 4, 1, 5).reshape(B, H, i * t, j * s)[:, :, :T, :S]


def _blocks(x, axis: int, size: int, fill: float | None = 0.0):
    """Splits an axis into blocks of `size`, filled up as by `padded`; blocks come first."""
    x = padded(x, axis, -x.shape[axis] % size, fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _block(blocks, index):
    """One block of each array."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), blocks)


def _add_block(blocks, new, index):
    """Adds `new` to one block. Unlike `.at[index].add`, which is a scatter, this is in place on every platform."""
    sums = jax.tree.map(jnp.add, _block(blocks, index), new)
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, 0), blocks, sums)


def _merge(x, length: int):
    """The inverse of `_blocks` on axis 2."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :length]
