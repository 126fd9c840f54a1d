"""A media tower: a bidirectional stack of blocks over the real positions of one item."""

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Context
from polygpt.attention.masks import ENCODER
from polygpt.attention.meta import Meta
from polygpt.blocks.stack import Stack, StackSpec
from polygpt.errors import SpecError
from polygpt.nn.dropout import dropout
from polygpt.nn.losses import Losses
from polygpt.sequence import coordinates


class Tower(Stack):
    """Position embeddings, bidirectional blocks, and the final norm."""

    def __init__(self, spec: StackSpec, *, rngs: nnx.Rngs, dtype: str, grid: tuple[int, int, int] | None = None):
        """Args: grid: (times, rows, columns) of an item's positions; None for a sequence in time."""
        super().__init__(spec, rngs=rngs, dtype=dtype)
        self.grid = grid
        for layer in spec.period():
            layer.mlp.check_modalities(("the tower's one modality",))
        self.position = spec.position.build(spec.width, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, length_B: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, Losses]:
        """Encodes B items of T positions, the first `length_B` of which are real; also returns routed layers' losses.

        No position attends to positions beyond the item's length.

        Raises:
            SpecError: if the position encoding supports fewer than T positions.
        """
        B, T, _ = x_BTD.shape
        limit = self.spec.position.limit()
        if limit is not None and T > limit:
            raise SpecError(f"tower.position has {limit} positions, but an item fills {T}: raise its length to {T}")
        index_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        real_BT = (index_BT < length_B[:, None]).astype(jnp.int32)
        zeros_BT = jnp.zeros_like(index_BT)
        meta = Meta(index_BT, index_BT, real_BT, zeros_BT, zeros_BT)
        if self.position is not None:
            x_BTD = x_BTD + self.position(index_BT).astype(x_BTD.dtype)
        embedding_key, stack_key = (None, None) if key is None else jax.random.split(key)
        x_BTD = dropout(x_BTD, self.spec.dropout, embedding_key)
        place_BT3 = None if self.grid is None else jnp.broadcast_to(coordinates(self.grid)[None], (B, T, 3))
        context = Context(meta, meta, ENCODER, coordinate_BT3=place_BT3, training=key is not None)
        x_BTD, _, losses = super().__call__(x_BTD, context, key=stack_key)
        return x_BTD, losses
