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
    """An adapter for one modality. A new one derives from this class and is named in the model's `adapters`."""

    features: Features
    """How raw media become features. Training, evaluation and generation all use this one description."""
    items: int = 1
    """N, the maximum number of items per row. Rows with fewer need no recompilation."""

    @property
    def positions(self) -> int:
        """P, the maximum number of positions per item."""
        raise NotImplementedError

    @property
    def grid(self) -> tuple[int, int, int]:
        """(times, rows, columns) of the positions, P in all; an item that fills fewer fills the first of them."""
        return self.positions, 1, 1

    def length(self, frames: int) -> int:
        """The number of positions that an item with `frames` real feature frames fills."""
        return self.positions

    @property
    def applications(self) -> Mapping[str, int]:
        """By part of the module, to how many positions its matrices are applied for an item; P for a part not named."""
        return {}

    @property
    def idle(self) -> Mapping[str, int]:
        """By part of the module, elements of its matrices that a position is not multiplied with; 0 if not named."""
        return {}

    @property
    def score_flops(self) -> float:
        """FLOPs of attention scores and weighted values inside the adapter, for one item."""
        return 0.0

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: str) -> nnx.Module:
        """A module `(media: Media, key) -> [B, N, P, D]` for a decoder of `width`, or `-> ([B, N, P, D], losses)`.

        The losses, if there are any, are those of routed layers: see `nn/losses.py`.

        Output and gradient must be finite whatever the features of unused items contain.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Connector(Spec):
    """From the width of a tower to the width of the decoder: one projection, or two with a GELU between.

    Liu et al., LLaVA-1.5 (2310.03744), section 3.3, find the second form a little better.
    """

    kind: Literal["linear", "mlp", "none"] = "linear"
    """One projection, two, or none: the tower is then as wide as what it is to give."""

    def build(self, inputs: int, width: int, *, rngs: nnx.Rngs, dtype: str) -> nnx.Module:
        """A module [..., inputs] -> [..., width].

        Raises:
            SpecError: if there is to be none, and the widths differ.
        """
        if self.kind == "none" and inputs != width:
            raise SpecError(
                f"a connector of kind 'none' is given vectors of width {inputs} and must give {width}: change the "
                "width of the adapter's tower (and fold of audio), or the kind"
            )
        return _Connector(self, inputs, width, rngs, dtype)


@dataclasses.dataclass(frozen=True)
class SharedConnector(Connector):
    """One connector for the media of all adapters, which give it vectors of one width."""

    width: int = 64
    """Of the vectors that adapters give it."""

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
