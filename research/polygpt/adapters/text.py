"""Text: token ids to embeddings, and hidden vectors back to logits."""

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt import sharding


class TextEmbedding(nnx.Module):
    """A table of token embeddings, used for the logits too where the head is tied (Press and Wolf, 1608.05859)."""

    def __init__(self, vocabulary: int, width: int, *, rngs: nnx.Rngs, dtype: str):
        self.table = nnx.Param(
            jax.random.normal(rngs.params(), (vocabulary, width)) * width**-0.5, axes=("vocabulary", "width")
        )
        self.dtype = dtype

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """int [B, T] -> [B, T, D]."""
        return jnp.take(self.table[...].astype(self.dtype), tokens_BT, axis=0, mode="clip")

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, V]."""
        flat = x_BTD.astype(self.dtype)
        if not sharding.splits("positions"):
            flat = flat.reshape(-1, x_BTD.shape[-1])
        table = self.table[...].astype(self.dtype)
        logits = jnp.einsum("...d,vd->...v", flat, table, preferred_element_type=jnp.float32)
        return logits.reshape(*x_BTD.shape[:2], -1)
