"""Differential attention: the difference of two softmax maps, in which common attention noise cancels."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Attention, Dims
from polygpt.attention.kernels.problem import Operands
from polygpt.attention.multi_head import MultiHead, MultiHeadModule
from polygpt.nn.norms import RMSNorm


@dataclasses.dataclass(frozen=True)
class Differential(MultiHead):
    """The difference of two softmax maps. Ye et al., Differential Transformer (2410.05258), section 2.1, eq. 1 to 3.

    (softmax(q1 k1^T) - lambda softmax(q2 k2^T)) v. A head of width d has two queries and two keys of width d/2 and one
    value of width d. lambda is exp(a b) - exp(a' b') + lambda_init, with learned vectors shared by all heads. The
    output of each head is normalised and multiplied by 1 - lambda_init. The paper uses half as many heads as a plain
    transformer of that width.
    """

    paper = "2410.05258"
    in_order = MultiHead.in_order

    lambda_init: float = 0.8
    """Initial value of lambda; in the paper it also grows with the layer l = 1, 2, ..: 0.8 - 0.6 exp(-0.3 (l - 1))."""

    def validate(self):
        super().validate()
        self.require(0 <= self.lambda_init < 1, "lambda_init", "at least 0 and below 1")

    def width_of_query(self, width: int) -> int:
        d = self.width_of_head(width)
        self.require(d % 2 == 0, "heads", f"such that the head width, {d}, is even")
        return d // 2

    def mup_scaled(self, width: int, base: Attention, base_width: int) -> Attention:
        same = self.width_of_head(width) == base.width_of_head(base_width)
        why = "that of the base model under muP, which has no rule for lambda, a sum over the channels of a head"
        self.require(same, "head_width", why)
        return self

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return DifferentialModule(self, dims, rngs)

    def backends(self) -> tuple[str, ...]:
        return tuple(name for name in super().backends() if name != "library")  # queries are narrower than values

    def score_flops(self, width: int, keys: float) -> float:
        return 6 * self.heads * self.width_of_head(width) * keys

    def cost(self) -> str:
        return "6 H d S"


class DifferentialModule(MultiHeadModule):
    def __init__(self, spec: Differential, dims: Dims, rngs: nnx.Rngs):
        super().__init__(spec, dims, rngs)
        shape = (2, 2, spec.width_of_query(dims.width))
        self.vectors = nnx.Param(jax.random.normal(rngs.params(), shape) * 0.1, decays=False)
        self.norm = RMSNorm(1e-5).build(spec.width_of_head(dims.width))

    def attend(self, rule, operands):
        first, second = _maps(operands)
        (y_BHTe, lse_BHT), (taken_BHTe, _) = super().attend(rule, first), super().attend(rule, second)
        return (y_BHTe - self._lambda() * taken_BHTe).astype(y_BHTe.dtype), lse_BHT

    def weigh(self, rule, operands):
        first, second = _maps(operands)
        return super().weigh(rule, first) - self._lambda() * super().weigh(rule, second)

    def mixed(self, y_BHTe, lse_BHT, x_BTD, context):
        return super().mixed(self.norm(y_BHTe) * (1 - self.spec.lambda_init), lse_BHT, x_BTD, context)

    def _lambda(self):
        plus, minus = jnp.exp(jnp.sum(self.vectors[:, 0] * self.vectors[:, 1], axis=-1))
        return plus - minus + self.spec.lambda_init

    def queries(self, x_BTD, context):
        """[B, 2 H, T, d/2]: queries of the first map, then of the second."""
        return self._placed(self._halves(self.query(x_BTD)), self.query_norm, context)

    def keys(self, x_BTD, context):
        """[B, 2 K, T, d/2]: keys of the first map, then of the second."""
        return self._placed(self._halves(self.key(x_BTD)), self.key_norm, context)

    def _halves(self, x_BTE):
        return x_BTE.reshape(*x_BTE.shape[:2], -1, self.spec.width_of_query(self.dims.width)).transpose(0, 2, 1, 3)


def _maps(operands: Operands) -> list[Operands]:
    """The operands of the two maps."""
    queries, keys = (jnp.split(x, 2, axis=1) for x in (operands.query_BHTd, operands.key_BKSd))
    return [
        dataclasses.replace(operands, query_BHTd=query_BHTd, key_BKSd=key_BKSd)
        for query_BHTd, key_BKSd in zip(queries, keys, strict=True)
    ]
