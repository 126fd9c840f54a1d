"""The adapter contract: from the features of one modality to embeddings for the decoder."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
from flax import nnx

from polygpt.data.media.features import Features
from polygpt.errors import SpecError
from polygpt.nn.linear import Linear
from polygpt.nn.mlp import activate
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Adapter(Spec):
    """An adapter for one modality. A new one derives from this class and is listed in the model's `adapters`."""

    features: Features
    """How to turn raw media into features, in training, evaluation and generation alike."""
    items: int = 1
    """N, the maximum number of items per row. Rows with fewer items need no recompilation."""

    @property
    def positions(self) -> int:
        """P, the maximum number of positions per item."""
        raise NotImplementedError

    @property
    def grid(self) -> tuple[int, int, int]:
        """(times, rows, columns) of the P positions; a shorter item fills the first of them."""
        return self.positions, 1, 1

    def length(self, frames: int) -> int:
        """The number of positions that an item with `frames` real feature frames fills."""
        return self.positions

    @property
    def applications(self) -> Mapping[str, int]:
        """Number of positions per item that each part of the module processes, by name; P for parts not listed."""
        return {}

    @property
    def idle(self) -> Mapping[str, int]:
        """Kernel elements that a given position does not use, by part of the module; 0 for parts not listed."""
        return {}

    @property
    def score_flops(self) -> float:
        """FLOPs of attention scores and weighted values inside the adapter, for one item."""
        return 0.0

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: str) -> nnx.Module:
        """A module `(media: Media, key) -> [B, N, P, D]` for a decoder of `width`, or `-> ([B, N, P, D], losses)`.

        The losses are those of routed layers, see `nn/losses.py`.

        Outputs and gradients must be finite whatever the features of unused items contain.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Connector(Spec):
    """Maps the tower width to the decoder width: one projection, or two with a GELU between.

    Liu et al., LLaVA-1.5 (2310.03744), section 3.3, find two projections slightly better.
    """

    kind: Literal["linear", "mlp", "none"] = "linear"
    """One projection, two, or none; with none, the tower must already have the target width."""

    def build(self, inputs: int, width: int, *, rngs: nnx.Rngs, dtype: str) -> nnx.Module:
        """A module [..., inputs] -> [..., width].

        Raises:
            SpecError: if `kind` is "none" and the widths differ.
        """
        if self.kind == "none" and inputs != width:
            raise SpecError(
                f"connector.kind is 'none', but the tower gives width {inputs} and the target width is {width}: change "
                "the width of the adapter's tower (and fold for audio), or the kind"
            )
        return _Connector(self, inputs, width, rngs, dtype)


@dataclasses.dataclass(frozen=True)
class SharedConnector(Connector):
    """One connector shared by all adapters, whose outputs have a common width."""

    width: int = 64
    """Width of the adapters' outputs."""

    def validate(self):
        self.require(self.width >= 1, "width", "at least 1")


class _Connector(nnx.Module):
    def __init__(self, spec: Connector, inputs: int, width: int, rngs: nnx.Rngs, dtype: str):
        if spec.kind == "none":
            self.hidden = self.output = None
            return
        hidden = spec.kind == "mlp"
        self.hidden = Linear(inputs, width, rngs=rngs, bias=True, dtype=dtype) if hidden else None
        self.output = Linear(width if hidden else inputs, width, rngs=rngs, bias=True, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.hidden is not None:
            x = activate("gelu", self.hidden(x))
        return x if self.output is None else self.output(x)
