"""Attention from libraries: cuDNN on NVIDIA GPUs, splash attention on TPUs, otherwise JAX's own in plain XLA.

For TPUs see `splash.py`, for GPUs `cudnn.py`. Elsewhere it is `jax.nn.dot_product_attention` with a mask [B, 1, T, S]
and memory that grows with B H T S, as for the reference. Additive score modifications become a bias, except with cuDNN,
which would round it to 16 bits and give it no gradient in batches (jax#30593).

If these do not apply and tokamax is installed (optional), it is used: it also supports SoftCap and values whose width
differs from that of queries, and chooses among its kernels by itself.

The libraries' lse has no gradient. Where it is asked for (`Rule.lse`), another backend, which computes it beside the
values, is faster; otherwise the chunked backend computes it, which a compiled program that does not use it omits.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from polygpt.attention.kernels import chunked, cudnn
from polygpt.attention.kernels.dispatch import platform
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.scores import Score, SoftCap


def refuses(rule: Rule, operands: Operands) -> str | None:
    """Why it cannot compute this, or None."""
    if rule.lse:
        return "the sum of exponentiated scores is used, which it does not compute: that would be attention twice"
    if platform() == "tpu":
        return _splash().refuses(rule, operands)
    reason = _jax_refuses(rule, operands)
    return None if reason is None or _tokamax_takes(rule) else reason


def suits(rule: Rule, operands: Operands) -> bool:
    """Whether to choose it automatically where it applies: on GPUs, not for masks that would be large arrays."""
    return platform() != "gpu" or cudnn.fits(rule, operands)


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
    return cudnn.refuses(rule, operands) if platform() == "gpu" else None


def attend(rule: Rule, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT), see `problem.py`."""
    if platform() == "tpu":
        return _splash().attend(rule, operands)
    if platform() == "gpu" and _jax_refuses(rule, operands) is None:
        return cudnn.attend(rule, operands), chunked.attend(rule, operands)[1]
    query, key, terms = operands.views()
    visible_B1TS = rule.visible(query, key)
    seeing_B1T1 = jnp.any(visible_B1TS, axis=-1, keepdims=True)
    bias_BHTS = None
    if type(rule.score) not in (Score, SoftCap):
        zeros_BHTS = jnp.zeros((*operands.query_BHTd.shape[:3], operands.key_BKSd.shape[2]), jnp.float32)
        bias_BHTS = rule.score(zeros_BHTS, query, key, terms)
    if _jax_refuses(rule, operands) is None:
        compute = functools.partial(jax.nn.dot_product_attention, implementation="xla")
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
