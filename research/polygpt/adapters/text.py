"""Text: token ids to embeddings, and hidden vectors back to logits."""

import jax
import jax.numpy as jnp
from flax import nnx


class TextEmbedding(nnx.Module):
    """A table of token embeddings, used for the logits too where the head is tied (Press and Wolf, 1608.05859)."""

    def __init__(self, vocabulary: int, width: int, *, rngs: nnx.Rngs, dtype: str):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (vocabulary, width)) * width**-0.5)
        self.dtype = dtype

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """int [B, T] -> [B, T, D]."""
        return jnp.take(self.table[...].astype(self.dtype), tokens_BT, axis=0, mode="clip")

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, V]."""
        B, T, D = x_BTD.shape
        flat = x_BTD.astype(self.dtype).reshape(B * T, D)
        table = self.table[...].astype(self.dtype)
        return jnp.einsum("td,vd->tv", flat, table, preferred_element_type=jnp.float32).reshape(B, T, -1)
