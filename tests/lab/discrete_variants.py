"""Variants that choose: right ones with weights of exactly zero and table lookups, wrong ones that choose ahead."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.api import MultiHead
from polygpt.attention.kernels import reference
from polygpt.attention.multi_head import MultiHeadModule
from polygpt.nn.rotary import apply_rope, frequencies

# --- right ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OfMatrices(MultiHead):
    """One that makes its weights itself, from the matrix of scores."""

    def build(self, dims, rngs):
        return OfMatricesModule(self, dims, rngs)

    def backends(self):
        return ()


class OfMatricesModule(MultiHeadModule):
    def weigh(self, rule, operands):
        raise NotImplementedError

    def attend(self, rule, operands):
        y_BHTe = reference.weighted_values(self.weigh(rule, operands), operands.value_BKSe)
        return y_BHTe, jnp.zeros(y_BHTe.shape[:3], jnp.float32)


@dataclasses.dataclass(frozen=True)
class ReLUAttention(OfMatrices):
    """Weights relu(score) / n, n how many keys the query may see: many are zero."""

    mask_is_bound = True

    def build(self, dims, rngs):
        return ReLUModule(self, dims, rngs)


class ReLUModule(OfMatricesModule):
    def weigh(self, rule, operands):
        score_BHTS, visible_B1TS = reference.masked_scores(rule, operands)
        count_B1T1 = jnp.maximum(visible_B1TS.sum(-1, keepdims=True), 1)
        return jnp.where(visible_B1TS, jax.nn.relu(score_BHTS), 0) / count_B1T1


@dataclasses.dataclass(frozen=True)
class TopKeys(OfMatrices):
    """Softmax over the keys with the highest scores."""

    mask_is_bound = True
    jumps = True

    keys: int = 4
    """How many keys a query sees."""

    def build(self, dims, rngs):
        return TopKeysModule(self, dims, rngs)


class TopKeysModule(OfMatricesModule):
    def weigh(self, rule, operands):
        score_BHTS, visible_B1TS = reference.masked_scores(rule, operands)
        least_BHT1 = jax.lax.top_k(score_BHTS, min(self.spec.keys, score_BHTS.shape[-1]))[0][..., -1:]
        seen_BHTS = visible_B1TS & (score_BHTS >= least_BHT1)
        return reference.normalized(rule, jnp.where(seen_BHTS, score_BHTS, reference.LOWEST), seen_BHTS)


@dataclasses.dataclass(frozen=True)
class TopBlocks(OfMatrices):
    """Softmax over a query's own block and the past blocks whose mean key it likes best, as MoBA (2502.13189)."""

    mask_is_bound = True
    jumps = True

    block: int = 4
    """Positions of a block."""
    chosen: int = 2
    """How many blocks are seen beside the query's own."""

    def build(self, dims, rngs):
        return TopBlocksModule(self, dims, rngs)


class TopBlocksModule(OfMatricesModule):
    ahead = False
    """Whether blocks that have not ended compete for a place."""

    def weigh(self, rule, operands):
        score_BHTS, visible_B1TS = reference.masked_scores(rule, operands)
        query, key, block = operands.query, operands.key, self.spec.block
        # A block has a mean for each query: of its keys in the query's example. Later ones are not looked at.
        same_BTS = (query.segment[:, :, None] == key.segment[:, None]) & (key.segment > 0)[:, None]
        block_BS = key.position // block
        blocks = -(-score_BHTS.shape[-1] // block)
        member_BSN = block_BS[..., None] == jnp.arange(blocks)[None, None]
        counted_BTSN = same_BTS[..., None] & member_BSN[:, None]
        own_BT = query.position // block
        before_BTN = jnp.arange(blocks)[None, None] < own_BT[..., None]
        compete_BTN = counted_BTSN.any(2) & (before_BTN | self.ahead)
        counted = counted_BTSN.astype(jnp.float32)
        liked_BHTN = jnp.einsum("bhts,btsn->bhtn", jnp.where(same_BTS[:, None], self._raw(operands), 0), counted)
        liked_BHTN = jnp.where(compete_BTN[:, None], liked_BHTN / jnp.maximum(counted.sum(2), 1)[:, None], -jnp.inf)
        least_BHT1 = jax.lax.top_k(liked_BHTN, min(self.spec.chosen, blocks))[0][..., -1:]
        chosen_BHTN = (liked_BHTN >= least_BHT1) & compete_BTN[:, None] & (before_BTN[:, None] | self.ahead)
        open_BHTS = jnp.einsum("bhtn,bsn->bhts", chosen_BHTN.astype(jnp.float32), member_BSN.astype(jnp.float32)) > 0
        near_B1TS = (own_BT[:, :, None] <= block_BS[:, None])[:, None]  # its own block, and a span ahead of it
        seen_BHTS = visible_B1TS & (open_BHTS | near_B1TS)
        return reference.normalized(rule, jnp.where(seen_BHTS, score_BHTS, reference.LOWEST), seen_BHTS)

    def _raw(self, operands):
        H, K = operands.query_BHTd.shape[1], operands.key_BKSd.shape[1]
        key_BHSd = jnp.repeat(operands.key_BKSd, H // K, axis=1)
        return jax.lax.stop_gradient(jnp.einsum("bhtd,bhsd->bhts", operands.query_BHTd, key_BHSd))


@dataclasses.dataclass(frozen=True)
class TableLookup(MultiHead):
    """Adds to values a learned vector for the position, looked up in a table."""

    length: int = 1024
    """Positions that the table has."""

    def build(self, dims, rngs):
        return TableLookupModule(self, dims, rngs)


class TableLookupModule(MultiHeadModule):
    def project(self, rngs):
        super().project(rngs)
        size = self.spec.length, self.spec.key_heads() * self.spec.width_of_head(self.dims.width)
        self.table = nnx.Param(jax.random.normal(rngs.params(), size))

    def values(self, x_BTD, context):
        row_BTE = self.table[...][context.query.position].astype(x_BTD.dtype)
        return super().values(x_BTD, context) + self.heads(row_BTE)


# --- wrong ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RouterAhead(TopBlocks):
    """Blocks that lie ahead compete for a place among those that are chosen."""

    def build(self, dims, rngs):
        return RouterAheadModule(self, dims, rngs)


class RouterAheadModule(TopBlocksModule):
    ahead = True


@dataclasses.dataclass(frozen=True)
class ThroughStoppedGradient(MultiHead):
    """Outputs are scaled by what the whole example holds, without a gradient."""

    def build(self, dims, rngs):
        return ThroughStoppedGradientModule(self, dims, rngs)


class ThroughStoppedGradientModule(MultiHeadModule):
    def __call__(self, x_BTD, context, cache=None):
        y_BTD, cache = super().__call__(x_BTD, context, cache)
        segment_BT = context.query.segment
        same_BTT = (segment_BT[:, :, None] == segment_BT[:, None]).astype(x_BTD.dtype)
        size_BT = jax.lax.stop_gradient(jnp.einsum("bts,bsd->bt", same_BTT, abs(x_BTD)) / same_BTT.sum(-1))
        return y_BTD * (1 + 0.01 * size_BT)[..., None].astype(y_BTD.dtype), cache


@dataclasses.dataclass(frozen=True)
class ComparesAhead(MultiHead):
    """The output changes its sign where the next input of the example is larger in its first channel."""

    def build(self, dims, rngs):
        return ComparesAheadModule(self, dims, rngs)


class ComparesAheadModule(MultiHeadModule):
    def __call__(self, x_BTD, context, cache=None):
        y_BTD, cache = super().__call__(x_BTD, context, cache)
        ahead_BTD, ahead_BT = jnp.roll(x_BTD, -1, axis=1), jnp.roll(context.query.segment, -1, axis=1)
        last_BT = jnp.arange(x_BTD.shape[1])[None] == x_BTD.shape[1] - 1
        larger_BT = (ahead_BTD[..., 0] > x_BTD[..., 0]) & (ahead_BT == context.query.segment) & ~last_BT
        return jnp.where(larger_BT[..., None], -y_BTD, y_BTD), cache


@dataclasses.dataclass(frozen=True)
class ExpertChoice(MultiHead):
    """The positions of an example that score highest, of all its positions, are let through: a choice over time."""

    jumps = True

    share: float = 0.5
    """Of the positions of the row."""

    def build(self, dims, rngs):
        return ExpertChoiceModule(self, dims, rngs)


class ExpertChoiceModule(MultiHeadModule):
    def __call__(self, x_BTD, context, cache=None):
        y_BTD, cache = super().__call__(x_BTD, context, cache)
        score_BT = jnp.where(context.query.segment > 0, x_BTD.mean(-1), -jnp.inf)
        count = max(1, int(self.spec.share * x_BTD.shape[1]))
        least_B1 = jax.lax.top_k(score_BT, count)[0][:, -1:]
        return jnp.where((score_BT >= least_B1)[..., None], y_BTD, 0), cache


@dataclasses.dataclass(frozen=True)
class RotaryByIndex(MultiHead):
    """Queries and keys turn by their place in the row, padding included."""

    def build(self, dims, rngs):
        return RotaryByIndexModule(self, dims, rngs)


class RotaryByIndexModule(MultiHeadModule):
    def _placed(self, x_BHTd, norm, context):
        pairs = x_BHTd.shape[-1] // 2
        angle_BTf = context.query.index[..., None].astype(jnp.float32) * frequencies(100.0, pairs)[None, None]
        return apply_rope(x_BHTd, angle_BTf, 1.0)
