"""Mamba-2: a state space model whose recurrence is linear attention with one decay per head and position."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polygpt.attention.contract import OUTPUT, Dims
from polygpt.attention.kernels.recurrence import linear_recurrence
from polygpt.attention.multi_head import joined
from polygpt.attention.recurrent import Stateful, StatefulModule
from polygpt.attention.short_convolution import ShortConvolution
from polygpt.nn.linear import Linear, broadcast_to_rank


@dataclasses.dataclass(frozen=True)
class Mamba2(Stateful):
    """S_t = exp(A dt_t) S_{t-1} + B_t (dt_t x_t)^T, y_t = S_t^T C_t + D x_t. Dao and Gu (2405.21060).

    Chunkwise form (SSD) in section 6, block in section 7.1 and figure 6: one projection to the gate z, x, B, C and dt,
    a short convolution and silu on x, B and C, dt = softplus(dt + bias), and norm(y silu(z)) projected back. C, B and x
    are queries, keys and values; the G groups are key heads. The decay encodes positions; there is no other encoding.
    """

    paper = "2405.21060"

    expand: int = 2
    """Width of x over all heads, as a multiple of the model width."""
    state_width: int = 64
    """N, the width of B and C."""
    groups: int = 1
    """G, the number of B and C: a divisor of `heads`."""
    convolution: int = 4
    """Kernel size of the causal convolution over x, B and C; 0 for none."""
    convolution_bias: bool = True
    """Whether the convolution has a bias."""
    epsilon: float = 1e-5
    """Added to the mean square in the normalisation of the output."""

    def validate(self):
        super().validate()
        self.require(self.expand >= 1, "expand", "at least 1")
        self.require(self.state_width >= 1, "state_width", "at least 1")
        self.require(self.groups >= 1 and self.heads % self.groups == 0, "groups", f"a divisor of heads ({self.heads})")

    def width_of_head(self, width: int) -> int:
        """P, the head width of x at model width `width`."""
        whole = self.expand * width
        P = self.head_width or self.part(whole, "expand")
        self.require(P * self.heads == whole, "heads", f"{whole} (expand times model width) over head_width ({P})")
        return P

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return Mamba2Module(self, dims, rngs)

    def score_flops(self, width: int, keys: float) -> float:
        return 4 * self.heads * self.state_width * self.width_of_head(width)

    def cost(self) -> str:
        return "4 H N P"


class Mamba2Module(StatefulModule):
    def __init__(self, spec: Mamba2, dims: Dims, rngs: nnx.Rngs):
        self.spec, self.dims, self.encoding = spec, dims, spec.encoding(dims)
        H, inner, shared = spec.heads, spec.heads * spec.width_of_head(dims.width), spec.groups * spec.state_width
        self.widths = (inner, inner + 2 * shared, H)  # of z, of the convolved channels, of dt
        options = {"rngs": rngs, "dtype": dims.dtype, "bias": spec.bias}
        self.input = Linear(dims.width, sum(self.widths), **options)
        self.output = Linear(inner, dims.width, scale=dims.output_scale, axes=OUTPUT, **options)
        if spec.convolution:
            self.convolve = ShortConvolution(
                spec.convolution, inner + 2 * shared, rngs=rngs, bias=spec.convolution_bias
            )
        # Initialised as in the authors' code: decay rates from 1 to 16, time steps from 0.001 to 0.1.
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (H,), minval=1, maxval=16)))
        dt_H = jnp.exp(jax.random.uniform(rngs.params(), (H,), minval=np.log(1e-3), maxval=np.log(1e-1)))
        self.dt_bias = nnx.Param(dt_H + jnp.log(-jnp.expm1(-dt_H)))  # softplus of it is dt
        self.D = nnx.Param(jnp.ones(H))
        self.norm_scale = nnx.Param(jnp.ones(inner))

    def read(self, x_BTD, context, starts, state, past):
        spec, inner = self.spec, self.widths[0]
        z_BTE, mixed_BTE, dt_BTH = jnp.split(self.input(x_BTD), np.cumsum(self.widths[:-1]), axis=-1)
        if self.convolve is not None:
            mixed_BTE, past = self.convolve(mixed_BTE, context.query.segment, past)
        x_BTE, B_BTE, C_BTE = jnp.split(
            jax.nn.silu(mixed_BTE), [inner, inner + spec.groups * spec.state_width], axis=-1
        )
        x_BHTP = _heads(x_BTE, spec.heads).astype(jnp.float32)
        B_BGTN, C_BGTN = _heads(B_BTE, spec.groups), _heads(C_BTE, spec.groups)
        dt_BTH = jax.nn.softplus(dt_BTH.astype(jnp.float32) + broadcast_to_rank(self.dt_bias[...], 3))
        dt_BHT1 = _heads(dt_BTH, spec.heads)
        log_decay = -jnp.exp(self.A_log[...])[None, :, None, None] * dt_BHT1
        y_BHTP, state = linear_recurrence(starts, C_BGTN, B_BGTN, x_BHTP * dt_BHT1, log_decay, state, spec.chunk)
        y_BHTP += self.D[...][None, :, None, None] * x_BHTP
        return self.output(self._normed(joined(y_BHTP), z_BTE)), state, past

    def _normed(self, y_BTE, z_BTE):
        """Gated RMS normalisation, separately for each group of channels."""
        y_BTE = y_BTE * jax.nn.silu(z_BTE.astype(jnp.float32))
        y_BTGE = y_BTE.reshape(*y_BTE.shape[:2], self.spec.groups, -1)
        mean_square = jnp.mean(y_BTGE * y_BTGE, axis=-1, keepdims=True)
        y_BTGE = y_BTGE * jax.lax.rsqrt(mean_square + self.spec.epsilon)
        return y_BTGE.reshape(y_BTE.shape) * broadcast_to_rank(self.norm_scale[...], 3)

    def empty_state(self, rows):
        shape = (rows, self.spec.heads, self.spec.state_width, self.spec.width_of_head(self.dims.width))
        return jnp.zeros(shape, jnp.float32)


def _heads(x_BTE, heads):
    """[B, T, heads * c] -> [B, heads, T, c]."""
    return x_BTE.reshape(*x_BTE.shape[:2], heads, -1).transpose(0, 2, 1, 3)
