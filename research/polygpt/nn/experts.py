"""Mixtures of experts: feed-forward layers of which each position goes through a few."""

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
from polygpt.nn.router import Choice, Router, route
from polygpt.sharding import RESIDUAL, constrain


@dataclasses.dataclass(frozen=True)
class MixtureOfExperts(FeedForward):
    """sum of p_e(x) expert_e(x) over the top_k likeliest experts, each a gated MLP. Shazeer et al. (1701.06538), eq. 1.

    Without `capacity` no choice is dropped: choices are sorted by expert, as in MegaBlocks (2211.15841). With it each
    expert has a fixed number of places in each row, capacity * top_k * T / E, as in GShard (2006.16668) and Switch
    (2101.03961, eq. 3); a choice that finds none is dropped, and the position keeps its residual. Places are given away
    from the first position on, padding takes none: nothing depends on what comes later, but an example does depend on
    the examples packed before it in the row. Only training steps drop choices. Evaluation and decoding drop none,
    whatever the capacity: a text depends neither on what it is packed with nor on how it is cut into calls.

    Add the objectives `LoadBalance` and `RouterZLoss`, or a few experts will take all.
    """

    routed: ClassVar[bool] = True

    experts: int = 8
    """E, the number of routed experts."""
    top_k: int = 2
    """Experts that a position goes through."""
    factor: float = 8 / 3
    """Hidden width of one expert as a multiple of the model width."""
    multiple: int = 8
    """The hidden width is rounded up to a multiple of this."""
    activation: Activation = "silu"
    """The non-linearity of the gate."""
    normalize: bool = True
    """Whether the weights of the chosen experts are divided by their sum, as in Mixtral (2401.04088), section 2.1."""
    shared: int = 0
    """Further experts that every position goes through, with the weight 1: DeepSeekMoE (2401.06066), eq. 9."""
    capacity: float | None = None
    """Places of an expert, as a multiple of its fair share of a row's choices; null drops none. Switch uses 1.25."""
    groups: tuple[int, ...] = ()
    """Experts of each modality's own, text first, then the model's adapters in their order; the rest of the experts are
    open to all. Positions choose among their modality's and the open ones: MoMa (2407.21770), section 2.2. [] is all
    open. In a tower all positions count as the first."""
    balance: Literal["row", "batch"] = "row"
    """Over which positions the load is to be balanced: those of each row, or of all rows that one program sees at once
    (a microbatch; with pmap, of one device). The first is the same however the batch is split."""

    def validate(self):
        self.require(self.experts >= 1, "experts", "at least 1")
        self.require(1 <= self.top_k <= self.experts, "top_k", f"from 1 to the {self.experts} experts")
        self.require(self.factor > 0, "factor", "above 0")
        self.require(self.multiple >= 1, "multiple", "at least 1")
        learns = self.top_k > 1 or self.experts == 1 or not self.normalize
        self.require(
            learns, "normalize", "false with top_k 1: the weight would be 1 always, and the router learn nothing"
        )
        self.require(self.shared >= 0, "shared", "at least 0")
        self.require(self.capacity is None or self.capacity > 0, "capacity", "null or above 0")
        self.require(min(self.groups, default=0) >= 0, "groups", "numbers of at least 0")
        open_to_all = self.experts - sum(self.groups)
        self.require(open_to_all >= 0, "groups", f"at most {self.experts} experts together")
        enough = not self.groups or min(self.groups) + open_to_all >= self.top_k
        self.require(
            enough, "groups", f"such that each modality has {self.top_k} experts to choose, {open_to_all} of them open"
        )

    def check_modalities(self, names: Sequence[str]) -> None:
        if self.groups and len(self.groups) != len(names):
            raise SpecError(
                f"MixtureOfExperts.groups is {self.groups!r}: it must have a number for each of {', '.join(names)}"
            )

    def hidden_width(self, width: int) -> int:
        return -(-int(width * self.factor) // self.multiple) * self.multiple

    def idle(self, width: int) -> int:
        return (self.experts - self.top_k) * 3 * width * self.hidden_width(width)

    def places(self, length: int) -> int:
        """C, the places of an expert in a row of `length` positions."""
        share = math.ceil(self.capacity * self.top_k * length / self.experts)
        return max(1, min(share, length))  # nobody chooses an expert twice

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: str, output_scale: float) -> nnx.Module:
        return _Mixture(self, width, rngs, dtype, output_scale)


class _Mixture(nnx.Module):
    def __init__(self, spec: MixtureOfExperts, width: int, rngs: nnx.Rngs, dtype: str, output_scale: float):
        self.spec, self.dtype = spec, dtype
        hidden = spec.hidden_width(width)
        self.router = Router(width, spec.experts, rngs=rngs)
        self.experts = _Experts(spec, width, rngs, output_scale)
        options = {"activation": spec.activation, "bias": False, "rngs": rngs, "dtype": dtype}
        shared = spec.shared * hidden  # several gated layers side by side are one wide one
        self.shared = GatedLayer(width, shared, output_scale=output_scale, **options) if shared else None

    def __call__(self, x_BTD: jax.Array, context: Any) -> tuple[jax.Array, Losses]:
        """[B, T, D] -> ([B, T, D], losses). `context.query` knows segments and modalities; choices are dropped if
        `context.training`."""
        spec, query = self.spec, context.query
        real_BT = query.segment > 0
        logits_BTE = constrain(self.router(x_BTD), "batch", "positions", None)
        options = {"top_k": spec.top_k, "normalize": spec.normalize, "groups": spec.groups, "balance": spec.balance}
        choice, losses = route(logits_BTE, real_BT, query.modality, **options)
        x_BTD = x_BTD.astype(self.dtype)
        kernels = self.experts.kernels(self.dtype)
        if spec.capacity is not None:
            losses["dropped"] = jnp.zeros((), jnp.float32)
        if spec.capacity is not None and context.training:
            y_BTD, dropped = self._in_buffers(x_BTD, choice, kernels)
            losses["dropped"] = dropped / spec.top_k
        else:
            y_BTD = dropless(x_BTD, choice, kernels, lambda own, x, grouped: self._apply(own, x, grouped, grouped))
        y_BTD = constrain(y_BTD, *RESIDUAL)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD), losses

    def _in_buffers(self, x_BTD: jax.Array, choice: Choice, kernels: Kernels) -> tuple[jax.Array, jax.Array]:
        def inward(x_BECD, kernel_EDF):
            return at_experts(jnp.einsum("becd,edf->becf", x_BECD, kernel_EDF), "hidden")

        def outward(x_BECF, kernel_EFD):
            return at_experts(jnp.einsum("becf,efd->becd", x_BECF, kernel_EFD))

        def function(x_BECD):
            y_BECD = self._apply(kernels, at_experts(at_rows(x_BECD)), inward, outward)
            return constrain(at_rows(y_BECD), "batch", None, None, None)

        # The places of a row are counted from its beginning: its positions have to be together.
        x_BTD, choice = jax.tree.map(lambda x: constrain(x, "batch", None, None), (x_BTD, choice))
        places = self.spec.places(x_BTD.shape[1])
        y_BTD, dropped = through_buffers(x_BTD, choice, self.spec.experts, places, function)
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
        """gate, up and down in the dtype to compute in."""
        return tuple(layer.kernel[...].astype(dtype) for layer in (self.gate, self.up, self.down))


class _Kernel(nnx.Module):
    """Normal with standard deviation `scale / sqrt(inputs)`, as of `Linear`."""

    def __init__(self, shape: tuple[int, int, int], axes: tuple[str, str, str], scale: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * (scale * shape[1] ** -0.5), axes=axes)
