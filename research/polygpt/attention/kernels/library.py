"""Attention as libraries have it: cuDNN on NVIDIA GPUs and splash attention on TPUs, else jax's own in plain XLA.

On a TPU see `splash.py`. Elsewhere it is `jax.nn.dot_product_attention` with the mask as a dense array of [B, 1, T, S]:
that rows are not packed and have no padding, which its faster causal form would need, is known as the program runs and
not when it is compiled. So memory grows with B T S on a GPU, where cuDNN reads the mask as a bias of 16 bits, and with
B H T S elsewhere, as the reference's. A score modification is a bias where it adds what does not depend on the score;
not to cuDNN, which would round it to 16 bits and give it no gradient in batches (jax#30593).

Where those refuse and tokamax is installed, which is optional, it computes: it takes values of another width than
queries and SoftCap too, and chooses among its kernels by itself.

lse is computed a second time by the chunked backend, since that of libraries has no gradient. A compiled program that
does not use lse leaves that out.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from polygpt.attention.kernels import chunked
from polygpt.attention.kernels.dispatch import platform
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.scores import Score, SoftCap


def refuses(rule: Rule, operands: Operands) -> str | None:
    """Why it cannot compute this, or None."""
    if platform() == "tpu":
        return _splash().refuses(rule, operands)
    reason = _jax_refuses(rule, operands)
    return None if reason is None or _tokamax_takes(rule) else reason


def _tokamax_takes(rule: Rule) -> bool:
    takes = rule.normalizer == "softmax" and (rule.score.additive() or type(rule.score) is SoftCap)
    return takes and importlib.util.find_spec("tokamax") is not None


def _jax_refuses(rule: Rule, operands: Operands) -> str | None:
    d, e = operands.query_BHTd.shape[3], operands.value_BKSe.shape[3]
    if rule.normalizer != "softmax":
        return f"jax.nn.dot_product_attention knows no {rule.normalizer} normalizer"
    if d != e:
        return f"jax.nn.dot_product_attention needs values as wide as queries, not {e} and {d}"
    if not rule.score.additive():
        return f"{type(rule.score).__name__} cannot be written as a bias, all that jax.nn.dot_product_attention takes"
    return _cudnn_refuses(rule, operands) if platform() == "gpu" else None


def _cudnn_refuses(rule: Rule, operands: Operands) -> str | None:
    T, S, d = operands.query_BHTd.shape[2], operands.key_BKSd.shape[2], operands.query_BHTd.shape[3]
    dtypes = {x.dtype for x in (operands.query_BHTd, operands.key_BKSd, operands.value_BKSe)}
    if dtypes not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float16")}):
        return f"cuDNN computes in bfloat16 or float16, not {' and '.join(sorted(map(str, dtypes)))}"
    if type(rule.score) is not Score:
        return f"cuDNN would round the bias of {type(rule.score).__name__} to 16 bits and give it no gradient"
    if d > 128 or d % 8:
        return f"cuDNN needs heads whose width is a multiple of 8 up to 128, not {d}"
    if T % 2 or S % 2:
        return f"cuDNN needs even lengths beside a mask, not {T} and {S}"
    return None


def attend(rule: Rule, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT), as the folder's `problem.py` says."""
    if platform() == "tpu":
        return _splash().attend(rule, operands)
    query, key, terms = operands.views()
    visible_B1TS = rule.visible(query, key)
    seeing_B1T1 = jnp.any(visible_B1TS, axis=-1, keepdims=True)
    bias_BHTS = None
    if type(rule.score) not in (Score, SoftCap):
        zeros_BHTS = jnp.zeros((*operands.query_BHTd.shape[:3], operands.key_BKSd.shape[2]), jnp.float32)
        bias_BHTS = rule.score(zeros_BHTS, query, key, terms)
    if _jax_refuses(rule, operands) is None:
        implementation = "cudnn" if platform() == "gpu" else "xla"
        compute = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    else:
        cap = rule.score.cap if type(rule.score) is SoftCap else None
        compute = functools.partial(_tokamax().dot_product_attention, logits_soft_cap=cap)
    y_BTHe = compute(
        *(x.swapaxes(1, 2) for x in (operands.query_BHTd, operands.key_BKSd, operands.value_BKSe)),
        bias=bias_BHTS,
        mask=visible_B1TS | ~seeing_B1T1,  # a softmax over nothing is left to no library
        scale=1.0,  # queries are scaled already
    )
    return jnp.where(seeing_B1T1, y_BTHe.swapaxes(1, 2), 0), chunked.attend(rule, operands)[1]


def _tokamax():
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # else it takes the command line of this program for its own
    return tokamax


def _splash():
    from polygpt.attention.kernels import splash  # imports Pallas, which takes a second

    return splash
