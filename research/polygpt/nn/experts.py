"""Mixtures of experts: each position is routed through a few of many feed-forward layers."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.errors import SpecError
from polygpt.nn.expert_parallel import Kernels, at_experts, at_rows, dropless
from polygpt.nn.grouping import through_buffers
from polygpt.nn.losses import Losses
from polygpt.nn.mlp import Activation, FeedForward, GatedLayer, activate
from polygpt.nn.router import Router, Routing, route
from polygpt.sharding import RESIDUAL, constrain


@dataclasses.dataclass(frozen=True)
class MixtureOfExperts(FeedForward):
    """sum of p_e(x) expert_e(x) over the top_k likeliest experts, each a gated MLP. Shazeer et al. (1701.06538), eq. 1.

    Without `capacity` the layer is dropless: choices are sorted by expert, as in MegaBlocks (2211.15841). With it, each
    expert has capacity * top_k * T / E slots per row, as in GShard (2006.16668) and Switch (2101.03961, eq. 3); a
    choice that finds no free slot is dropped, and the residual stream passes through. Slots are filled in order of
    position, and padding takes none: results never depend on later positions, but do depend on examples packed earlier
    in the same row. Only training steps drop choices. Evaluation and decoding are always dropless, so their results
    depend neither on packing nor on how the text is split into calls.

    Add the objectives `LoadBalance` and `RouterZLoss`; otherwise a few experts tend to take all positions.
    """

    routed: ClassVar[bool] = True

    experts: int = 8
    """E, the number of routed experts."""
    top_k: int = 2
    """Experts per position."""
    factor: float = 8 / 3
    """Hidden width of one expert as a multiple of the model width."""
    multiple: int = 8
    """The hidden width is rounded up to a multiple of this."""
    activation: Activation = "silu"
    """The non-linearity of the gate."""
    normalize: bool = True
    """Whether to divide the weights of the chosen experts by their sum, as in Mixtral (2401.04088), section 2.1."""
    shared: int = 0
    """Additional experts that every position uses, with weight 1: DeepSeekMoE (2401.06066), eq. 9."""
    capacity: float | None = None
    """Slots per expert, as a multiple of its fair share of a row's choices; null is dropless. Switch uses 1.25."""
    groups: tuple[int, ...] = ()
    """Number of experts reserved for each modality: text first, then the model's adapters in order. The remaining
    experts are open to all modalities. A position chooses among its modality's experts and the open ones: MoMa
    (2407.21770), section 2.2. [] opens all experts to all. In a tower every position counts as the first modality."""
    balance: Literal["row", "batch"] = "row"
    """Where the load is balanced: within each row, or over all rows that one program sees at once (a microbatch; with
    pmap, the rows of one device). "row" does not depend on how the batch is split."""

    def validate(self):
        self.require(self.experts >= 1, "experts", "at least 1")
        self.require(1 <= self.top_k <= self.experts, "top_k", f"from 1 to the {self.experts} experts")
        self.require(self.factor > 0, "factor", "above 0")
        self.require(self.multiple >= 1, "multiple", "at least 1")
        learns = self.top_k > 1 or self.experts == 1 or not self.normalize
        self.require(
            learns, "normalize", "false with top_k 1: the weight would always be 1 and the router would not learn"
        )
        self.require(self.shared >= 0, "shared", "at least 0")
        self.require(self.capacity is None or self.capacity > 0, "capacity", "null or above 0")
        self.require(min(self.groups, default=0) >= 0, "groups", "non-negative numbers")
        open_to_all = self.experts - sum(self.groups)
        self.require(open_to_all >= 0, "groups", f"at most {self.experts} experts in total")
        enough = not self.groups or min(self.groups) + open_to_all >= self.top_k
        self.require(
            enough,
            "groups",
            f"such that each modality can choose from {self.top_k} experts or more; {open_to_all} are open to all",
        )

    def check_modalities(self, names: Sequence[str]) -> None:
        if self.groups and len(self.groups) != len(names):
            raise SpecError(
                f"MixtureOfExperts.groups is {self.groups!r}: it must have one number for each of {', '.join(names)}"
            )

    def hidden_width(self, width: int) -> int:
        return -(-int(width * self.factor) // self.multiple) * self.multiple

    def idle(self, width: int) -> int:
        return (self.experts - self.top_k) * 3 * width * self.hidden_width(width)

    def slots(self, length: int) -> int:
        """C, the slots per expert in a row of `length` positions."""
        share = math.ceil(self.capacity * self.top_k * length / self.experts)
        return max(1, min(share, length))  # no position chooses an expert twice

    @property
    def in_order(self) -> bool:
        """Whether earlier positions take the slots of experts before later ones."""
        return self.capacity is not None

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: str, output_scale: float) -> nnx.Module:
        return _Mixture(self, width, rngs, dtype, output_scale)


class _Mixture(nnx.Module):
    def __init__(self, spec: MixtureOfExperts, width: int, rngs: nnx.Rngs, dtype: str, output_scale: float):
        self.spec, self.dtype = spec, dtype
        hidden = spec.hidden_width(width)
        self.router = Router(width, spec.experts, rngs=rngs)
        self.experts = _Experts(spec, width, rngs, output_scale)
        options = {"activation": spec.activation, "bias": False, "rngs": rngs, "dtype": dtype}
        shared = spec.shared * hidden  # a sum of gated layers is one wide gated layer
        self.shared = GatedLayer(width, shared, output_scale=output_scale, **options) if shared else None

    def __call__(self, x_BTD: jax.Array, context: Any) -> tuple[jax.Array, Losses]:
        """[B, T, D] -> ([B, T, D], losses). `context.query` holds segments and modalities; choices are dropped only if
        `context.training`."""
        spec, query = self.spec, context.query
        real_BT = query.segment > 0
        logits_BTE = constrain(self.router(x_BTD), "batch", "positions", None)
        options = {"top_k": spec.top_k, "normalize": spec.normalize, "groups": spec.groups, "balance": spec.balance}
        routing, losses = route(logits_BTE, real_BT, query.modality, **options)
        x_BTD = x_BTD.astype(self.dtype)
        kernels = self.experts.kernels(self.dtype)
        if spec.capacity is not None:
            losses["dropped"] = jnp.zeros((), jnp.float32)
        if spec.capacity is not None and context.training:
            y_BTD, dropped = self._in_buffers(x_BTD, routing, kernels)
            losses["dropped"] = dropped / spec.top_k
        else:
            y_BTD = dropless(x_BTD, routing, kernels, lambda own, x, grouped: self._apply(own, x, grouped, grouped))
        y_BTD = constrain(y_BTD, *RESIDUAL)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD), losses

    def _in_buffers(self, x_BTD: jax.Array, routing: Routing, kernels: Kernels) -> tuple[jax.Array, jax.Array]:
        def inward(x_BECD, kernel_EDF):
            return at_experts(jnp.einsum("becd,edf->becf", x_BECD, kernel_EDF), "hidden")

        def outward(x_BECF, kernel_EFD):
            return at_experts(jnp.einsum("becf,efd->becd", x_BECF, kernel_EFD))

        def function(x_BECD):
            y_BECD = self._apply(kernels, at_experts(at_rows(x_BECD)), inward, outward)
            return constrain(at_rows(y_BECD), "batch", None, None, None)

        # Slots are counted from the start of a row, so each device needs whole rows.
        x_BTD, routing = jax.tree.map(lambda x: constrain(x, "batch", None, None), (x_BTD, routing))
        slots = self.spec.slots(x_BTD.shape[1])
        y_BTD, dropped = through_buffers(x_BTD, routing, self.spec.experts, slots, function)
        return y_BTD.astype(self.dtype), dropped

    def _apply(self, kernels: Kernels, x: jax.Array, inward: Callable, outward: Callable) -> jax.Array:
        gate, up, down = kernels
        return outward(activate(self.spec.activation, inward(x, gate)) * inward(x, up), down)


class _Experts(nnx.Module):
    """The matrices of all experts: `gate/kernel` and `up/kernel` [E, D, F], `down/kernel` [E, F, D]."""

    def __init__(self, spec: MixtureOfExperts, width: int, rngs: nnx.Rngs, output_scale: float):
        E, F = spec.experts, spec.hidden_width(width)
        self.gate = _Kernel((E, width, F), ("experts", "width", "hidden"), 1.0, rngs)
        self.up = _Kernel((E, width, F), ("experts", "width", "hidden"), 1.0, rngs)
        self.down = _Kernel((E, F, width), ("experts", "hidden", "width"), output_scale, rngs)

    def kernels(self, dtype: str) -> Kernels:
        """gate, up and down, cast to the compute dtype."""
        return tuple(layer.kernel[...].astype(dtype) for layer in (self.gate, self.up, self.down))


class _Kernel(nnx.Module):
    """Initialised from a normal distribution with standard deviation `scale / sqrt(inputs)`, as in `Linear`."""

    def __init__(self, shape: tuple[int, int, int], axes: tuple[str, str, str], scale: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * (scale * shape[1] ** -0.5), axes=axes)
