"""Position-wise feed-forward layers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import jax
from flax import nnx

from polygpt.nn.linear import Linear
from polygpt.sharding import constrain
from polygpt.spec import Spec

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "sigmoid", "identity"]

INWARD, OUTWARD = ("width", "hidden"), ("hidden", "width")
"""The axes of the kernels of a feed-forward layer."""
HIDDEN = ("batch", "positions", "hidden")
"""The axes of the hidden activations between them."""

_ACTIVATIONS: dict[str, Callable] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda x: x,
}


def activate(name: Activation, x: jax.Array) -> jax.Array:
    """Applies the activation `name` to x. `gelu_tanh` is the approximation that GPT-2 uses (1606.08415, section 2)."""
    return _ACTIVATIONS[name](x)


@dataclasses.dataclass(frozen=True)
class FeedForward(Spec):
    """A feed-forward layer. A new one derives from this class and builds a module `[B, T, D] -> [B, T, D]`.

    A routed layer also takes the context and returns its losses (`nn/losses.py`): `(x_BTD, context) -> (y_BTD,
    losses)`.
    """

    routed: ClassVar[bool] = False
    """Whether different positions use different parameters."""
    in_order: ClassVar[bool] = True
    """Whether it reads neighbouring positions in its input, or depends on their order. A class that defines `build`
    declares it again."""

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: str, output_scale: float) -> nnx.Module:
        """The module for vectors of `width`; `output_scale` scales the initial output kernel."""
        raise NotImplementedError

    def hidden_width(self, width: int) -> int:
        """F, the hidden width at the model width `width`."""
        raise NotImplementedError

    def idle(self, width: int) -> int:
        """Number of kernel elements that a given position does not use, such as those of experts not chosen."""
        return 0

    def check_modalities(self, names: Sequence[str]) -> None:
        """Raises SpecError if the layer does not fit a model with these modalities, text first."""


@dataclasses.dataclass(frozen=True)
class MLP(FeedForward):
    """activation(x W1 + b1) W2 + b2. Vaswani et al. (1706.03762), eq. 2."""

    in_order = False

    factor: float = 4.0
    """Hidden width as a multiple of the model width."""
    activation: Activation = "gelu_tanh"
    """The non-linearity."""
    bias: bool = True
    """Whether both projections have a bias."""

    def validate(self):
        self.require(self.factor > 0, "factor", "above 0")

    def hidden_width(self, width: int) -> int:
        return round(width * self.factor)

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: str, output_scale: float) -> nnx.Module:
        return _MLP(self, width, rngs, dtype, output_scale)


@dataclasses.dataclass(frozen=True)
class GatedMLP(FeedForward):
    """(activation(x Wg) * (x W1)) W2: SwiGLU with "silu", GEGLU "gelu", ReGLU "relu". Shazeer (2002.05202), eq. 6.

    The default hidden width is two thirds of the ungated one, which keeps the number of parameters equal (section 3.1).
    """

    in_order = False

    factor: float = 8 / 3
    """Hidden width as a multiple of the model width."""
    multiple: int = 8
    """The hidden width is rounded up to a multiple of this."""
    activation: Activation = "silu"
    """The non-linearity of the gate."""
    bias: bool = False
    """Whether the projections have a bias."""

    def validate(self):
        self.require(self.factor > 0, "factor", "above 0")
        self.require(self.multiple >= 1, "multiple", "at least 1")

    def hidden_width(self, width: int) -> int:
        return -(-int(width * self.factor) // self.multiple) * self.multiple

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: str, output_scale: float) -> nnx.Module:
        options = {"activation": self.activation, "bias": self.bias, "rngs": rngs, "dtype": dtype}
        return GatedLayer(width, self.hidden_width(width), output_scale=output_scale, **options)


class _MLP(nnx.Module):
    def __init__(self, spec: MLP, width: int, rngs: nnx.Rngs, dtype: str, output_scale: float):
        hidden = spec.hidden_width(width)
        self.activation = spec.activation
        self.up = Linear(width, hidden, rngs=rngs, bias=spec.bias, dtype=dtype, axes=INWARD)
        self.down = Linear(hidden, width, rngs=rngs, bias=spec.bias, dtype=dtype, scale=output_scale, axes=OUTWARD)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        hidden_BTF = activate(self.activation, self.up(x_BTD))
        return self.down(constrain(hidden_BTF, *HIDDEN))


class GatedLayer(nnx.Module):
    """The module of `GatedMLP`, with any hidden width."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation,
        bias: bool,
        rngs: nnx.Rngs,
        dtype: str,
        output_scale: float,
    ):
        self.activation = activation
        self.gate = Linear(width, hidden, rngs=rngs, bias=bias, dtype=dtype, axes=INWARD)
        self.up = Linear(width, hidden, rngs=rngs, bias=bias, dtype=dtype, axes=INWARD)
        self.down = Linear(hidden, width, rngs=rngs, bias=bias, dtype=dtype, scale=output_scale, axes=OUTWARD)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        hidden_BTF = activate(self.activation, self.gate(x_BTD)) * self.up(x_BTD)
        return self.down(constrain(hidden_BTF, *HIDDEN))
