"""Attention from libraries: cuDNN on NVIDIA GPUs, splash attention on TPUs, otherwise JAX's own in plain XLA.

For TPUs see `splash.py`. Elsewhere it is `jax.nn.dot_product_attention` with a dense mask [B, 1, T, S]. Its faster
causal form needs unpacked rows without padding, which is known only at run time. Memory therefore grows with B T S on
GPU, where cuDNN reads the mask as a 16-bit bias, and with B H T S elsewhere, as for the reference. Additive score
modifications become a bias, except with cuDNN, which would round it to 16 bits and give it no gradient in batches
(jax#30593).

If these do not apply and tokamax is installed (optional), it is used: it also supports SoftCap and values whose width
differs from that of queries, and chooses among its kernels by itself.

lse is computed separately by the chunked backend, because the libraries' lse has no gradient. A compiled program that
does not use lse omits this.
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
        return f"jax.nn.dot_product_attention has no {rule.normalizer} normalizer"
    if d != e:
        return f"jax.nn.dot_product_attention needs values as wide as queries, not {e} and {d}"
    if not rule.score.additive():
        return f"{type(rule.score).__name__} cannot be written as a bias, which jax.nn.dot_product_attention requires"
    return _cudnn_refuses(rule, operands) if platform() == "gpu" else None


def _cudnn_refuses(rule: Rule, operands: Operands) -> str | None:
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


def attend(rule: Rule, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT), see `problem.py`."""
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
        mask=visible_B1TS | ~seeing_B1T1,  # libraries differ in a softmax without visible keys
        scale=1.0,  # queries are already scaled
    )
    return jnp.where(seeing_B1T1, y_BTHe.swapaxes(1, 2), 0), chunked.attend(rule, operands)[1]


def _tokamax():
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # otherwise it parses this program's command line
    return tokamax


def _splash():
    from polygpt.attention.kernels import splash  # imports Pallas, which takes a second

    return splash
