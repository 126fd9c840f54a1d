"""Text: token ids to embeddings, and hidden vectors back to logits."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from polygpt import sharding


class TextEmbedding(nnx.Module):
    """A table of token embeddings, also used for the logits if the head is tied (Press and Wolf, 1608.05859).

    Under muP (`optim/mup.py`) the table is initialised like that of the base model, whose width is `base_width`, and
    logits are multiplied by base_width / width.
    """

    def __init__(self, vocabulary: int, width: int, *, rngs: nnx.Rngs, dtype: str, base_width: int | None = None):
        base_width = base_width or width
        self.table = nnx.Param(
            jax.random.normal(rngs.params(), (vocabulary, width)) * base_width**-0.5,
            axes=("vocabulary", "width"),
            decays=False,
        )
        self.dtype, self.multiplier = dtype, base_width / width

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """int [B, T] -> [B, T, D]."""
        # Look up in float32 and round afterwards, so that gradients are summed over occurrences in float32.
        layout = sharding.active()
        if layout is None or layout.size("vocabulary") * layout.size("width") == 1:
            return jnp.take(self.table[...], tokens_BT, axis=0, mode="clip").astype(self.dtype)
        return _sharded_lookup(self.table[...], tokens_BT, layout, self.dtype)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, V]."""
        flat = x_BTD.astype(self.dtype)
        if not sharding.is_split("positions"):
            flat = flat.reshape(-1, x_BTD.shape[-1])
        table = self.table[...].astype(self.dtype)
        logits = jnp.einsum("...d,vd->...v", flat, table, preferred_element_type=jnp.float32)
        if self.multiplier != 1:
            logits = logits * self.multiplier
        return logits.reshape(*x_BTD.shape[:2], -1)


def _sharded_lookup(table_VD: jax.Array, tokens_BT: jax.Array, layout: sharding.MeshLayout, dtype: str) -> jax.Array:
    """[B, T, D] in `dtype`: each device looks up the tokens of its own vocabulary shard; an all-reduce sums results.

    Megatron-LM (1909.08053), section 3. Left to itself, the compiler would all-gather the whole table and all-reduce
    the whole gradient. The table is gathered in `dtype`; the gradients of a token's occurrences are summed in float32.
    """
    table = layout.partition_spec(("vocabulary", "width"), table_VD.shape)
    rows = layout.partition_spec(("batch", "positions", None), (*tokens_BT.shape, 1))

    own = jax.ShapeDtypeStruct(layout.local_shape(("vocabulary", "width"), table_VD.shape), table_VD.dtype)

    def own_lookup(table_VD, tokens_BT):
        if table[1] is not None:  # a lookup reads whole rows of the table
            table_VD = jax.lax.all_gather(table_VD, table[1], axis=1, tiled=True)
        if table[0] is None:
            return jnp.take(table_VD, tokens_BT, axis=0, mode="clip")
        local_BT = tokens_BT - jax.lax.axis_index(table[0]) * len(table_VD)
        mine_BT = (0 <= local_BT) & (local_BT < len(table_VD))
        x_BTD = jnp.take(table_VD, jnp.where(mine_BT, local_BT, 0), axis=0, mode="clip")
        return jax.lax.psum(jnp.where(mine_BT[..., None], x_BTD, 0), table[0])

    @jax.custom_vjp
    def per_device(table_VD, tokens_BT):
        return own_lookup(table_VD.astype(dtype), tokens_BT)

    def forward(table_VD, tokens_BT):
        return per_device(table_VD, tokens_BT), tokens_BT

    def backward(tokens_BT, dx_BTD):
        transpose = jax.linear_transpose(lambda table_VD: own_lookup(table_VD, tokens_BT), own)
        return *transpose(dx_BTD.astype(jnp.float32)), None

    per_device.defvjp(forward, backward)
    specs = {"in_specs": (table, PartitionSpec(*rows[:2])), "out_specs": rows}
    return jax.shard_map(per_device, mesh=layout.mesh, check_vma=False, **specs)(table_VD, tokens_BT)
