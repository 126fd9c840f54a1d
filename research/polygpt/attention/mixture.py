"""Attention with separate projections per modality."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt import sharding
from polygpt.attention.contract import Context, Dims
from polygpt.attention.multi_head import MultiHead, MultiHeadModule, joined
from polygpt.nn.linear import Linear
from polygpt.parameters import stack


@dataclasses.dataclass(frozen=True)
class MixtureOfTransformers(MultiHead):
    """Projections per modality, joint attention. Liang et al., Mixture-of-Transformers (2411.04996), section 2.2.

    Eq. 2 and 3, without the paper's separate feed-forward layers and norms. Parameters are [sets, D, E]. Every position
    is multiplied by all sets, with zeros for sets other than its own: this keeps shapes static, but projections cost
    `sets` times the FLOPs of multi-head attention.
    """

    paper = "2411.04996"
    in_order = MultiHead.in_order

    sets: int = 2
    """Number of sets of projections: text uses the first, modality m the set min(m, sets - 1)."""

    def validate(self):
        super().validate()
        self.require(self.sets >= 1, "sets", "at least 1")

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return MixtureOfTransformersModule(self, dims, rngs)


class MixtureOfTransformersModule(MultiHeadModule):
    def project(self, rngs):
        def one_set(key):
            one = MultiHeadModule(self.spec, self.dims, nnx.Rngs(key))
            return one.query, one.key, one.value, one.output

        keys = jax.random.split(rngs.params(), self.spec.sets)
        self.query, self.key, self.value, self.output = stack(one_set, keys)

    def queries(self, x_BTD, context):
        return self._placed(self.heads(_by_set(self.query, x_BTD, context)), self.query_norm, context)

    def keys(self, x_BTD, context):
        return self._placed(self.heads(_by_set(self.key, x_BTD, context)), self.key_norm, context)

    def values(self, x_BTD, context):
        return self.heads(_by_set(self.value, x_BTD, context))

    def mixed(self, y_BHTe, lse_BHT, x_BTD, context):
        return _by_set(self.output, joined(y_BHTe), context)


def _by_set(linear: Linear, x_BTD: jax.Array, context: Context) -> jax.Array:
    """[B, T, D] -> [B, T, E], each position with the set of its modality: kernel [sets, D, E], bias [sets, E].

    A single product with all sets: x in the block of its own set, zeros in the others.
    """
    B, T, D = x_BTD.shape
    sets = linear.kernel.shape[0]
    own_BTs = jax.nn.one_hot(jnp.clip(context.query.modality, 0, sets - 1), sets, dtype=bool)
    wide_BTE = jnp.where(own_BTs[..., None], x_BTD[:, :, None, :], 0).astype(linear.dtype)
    # Flatten the leading axes as in `Linear`, unless positions are split over devices.
    rows = (B, T) if sharding.is_split("positions") else (B * T,)
    kernel = linear.kernel[...].astype(linear.dtype).reshape(sets * D, -1)
    y_BTE = (wide_BTE.reshape(*rows, sets * D) @ kernel).reshape(B, T, -1)
    if linear.bias is None:
        return y_BTE
    return y_BTE + own_BTs.astype(linear.dtype) @ linear.bias[...].astype(linear.dtype)
