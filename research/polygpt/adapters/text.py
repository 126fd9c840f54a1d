"""Text: token ids to embeddings, and hidden vectors back to logits."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

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
        # Gathered over the width first: rows of a table are looked up whole.
        table_VD = sharding.constrain(self.table[...].astype(self.dtype), "vocabulary", None)
        if not sharding.splits("vocabulary"):
            return jnp.take(table_VD, tokens_BT, axis=0, mode="clip")
        return _looked_up(table_VD, tokens_BT, sharding.active())

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, V]."""
        flat = x_BTD.astype(self.dtype)
        if not sharding.splits("positions"):
            flat = flat.reshape(-1, x_BTD.shape[-1])
        table = self.table[...].astype(self.dtype)
        logits = jnp.einsum("...d,vd->...v", flat, table, preferred_element_type=jnp.float32)
        return logits.reshape(*x_BTD.shape[:2], -1)


def _looked_up(table_VD: jax.Array, tokens_BT: jax.Array, layout: sharding.Layout) -> jax.Array:
    """[B, T, D]: each device looks up the tokens of its own part of the vocabulary, and the parts are summed.

    Megatron-LM (1909.08053), section 3. The compiler by itself would gather the table.
    """
    vocabulary = layout.axes(("vocabulary", None), table_VD.shape)
    rows = layout.axes(("rows", "positions", None), (*tokens_BT.shape, 1))

    def here(table_VD, tokens_BT):
        if vocabulary[0] is None:  # the devices do not divide it
            return jnp.take(table_VD, tokens_BT, axis=0, mode="clip")
        local_BT = tokens_BT - jax.lax.axis_index(vocabulary[0]) * len(table_VD)
        mine_BT = (0 <= local_BT) & (local_BT < len(table_VD))
        x_BTD = jnp.take(table_VD, jnp.where(mine_BT, local_BT, 0), axis=0, mode="clip")
        return jax.lax.psum(jnp.where(mine_BT[..., None], x_BTD, 0), vocabulary[0])

    specs = {"in_specs": (vocabulary, PartitionSpec(*rows[:2])), "out_specs": rows}
    return jax.shard_map(here, mesh=layout.mesh, **specs)(table_VD, tokens_BT)
