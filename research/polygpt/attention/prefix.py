"""Trained keys and values in front of the sequence: prefix tuning (Li & Liang, 2101.00190)."""

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.multi_head import MultiHeadModule
from polygpt.attention.recurrent import StatefulModule

LAYERS = MultiHeadModule, StatefulModule
"""The modules of attention variants."""
OWN = "__call__", "attend", "weigh", "weights", "operands"
"""Methods of `MultiHeadModule` without which a prefix is not known to be exact."""


class PrefixKeys(nnx.Module):
    """P keys and values that every query sees, whatever its position, its example and the mask.

    Softmax over them and the sequence is the mean of both attentions, weighted by the exponentials of their
    log-sum-exps, so that every backend computes it. Prefix keys have no position: they are not rotated, and score
    modifications do not apply to them. They are no part of caches.

    Args:
        key_PE: the keys of all heads, [..., P, K d].
        value_PE: the values, [..., P, K e].
        heads: K.
        axis: the logical name of a leading axis of layers.
    """

    def __init__(self, key_PE: jax.Array, value_PE: jax.Array, heads: int, axis: str | None = None):
        axes = (*[axis] * (key_PE.ndim - 2), None, "kv_heads")
        self.key, self.value = (nnx.Param(x_PE, axes=axes, decays=False) for x_PE in (key_PE, value_PE))
        self.heads = heads

    def joined(self, y_BHTe: jax.Array, lse_BHT: jax.Array, query_BHTd: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(y_BHTe, lse_BHT) with the prefix, given those of the sequence and its scaled queries."""
        B, H, T, _ = query_BHTd.shape
        score_BKTP = self._scores(query_BHTd)
        value_KPe = self._by_head(self.value).astype(y_BHTe.dtype)
        weights_BKTP = jax.nn.softmax(score_BKTP, axis=-1).astype(y_BHTe.dtype)
        prefix_BHTe = jnp.einsum("bktp,kpe->bkte", weights_BKTP, value_KPe).reshape(B, H, T, -1)
        prefix_BHT = jax.nn.logsumexp(score_BKTP, axis=-1).reshape(B, H, T)
        share_BHT1 = jax.nn.sigmoid(lse_BHT - prefix_BHT)[..., None]
        y_BHTe = (y_BHTe * share_BHT1 + prefix_BHTe * (1 - share_BHT1)).astype(y_BHTe.dtype)
        return y_BHTe, jnp.logaddexp(lse_BHT, prefix_BHT)

    def share(self, lse_BHT: jax.Array, query_BHTd: jax.Array) -> jax.Array:
        """The sum of the weights of the sequence, [B, H, T]; the rest is that of the prefix."""
        prefix_BHT = jax.nn.logsumexp(self._scores(query_BHTd), axis=-1).reshape(lse_BHT.shape)
        return jax.nn.sigmoid(lse_BHT - prefix_BHT)

    def _scores(self, query_BHTd):
        """float32 [B, K, H / K * T, P]."""
        B, H, T, d = query_BHTd.shape
        key_KPd = self._by_head(self.key).astype(query_BHTd.dtype)
        query_BKTd = query_BHTd.reshape(B, self.heads, H // self.heads * T, d)
        return jnp.einsum("bktd,kpd->bktp", query_BKTd, key_KPd, preferred_element_type=jnp.float32)

    def _by_head(self, parameter):
        """[P, K d] -> [K, P, d]."""
        x_PE = parameter[...]
        return x_PE.reshape(x_PE.shape[0], self.heads, -1).swapaxes(0, 1)


def refusal(module: nnx.Module) -> str:
    """Why an attention module cannot have a prefix; "" if it can."""
    if not isinstance(module, MultiHeadModule) or module.spec.normalizer != "softmax":
        return "has no softmax over keys"
    if any(getattr(type(module), name) is not getattr(MultiHeadModule, name) for name in OWN):
        return "computes more than one softmax of its scores"
    return ""


def attach(module: MultiHeadModule, length: int, layers: tuple[int, ...], axis: str | None, key: jax.Array) -> None:
    """Gives a module, or as many stacked ones as `layers` says, a prefix.

    Keys are normal with variance 1, as those of normalised inputs are at first, and values 0. The paper computes both
    by an MLP, because training was unstable without it, or begins with those of real words.
    """
    spec, width, heads = module.spec, module.dims.width, module.spec.key_heads()
    key_PE = jax.random.normal(key, (*layers, length, heads * spec.width_of_query(width)))
    module.prefix = PrefixKeys(key_PE, jnp.zeros((*layers, length, heads * spec.width_of_head(width))), heads, axis)
