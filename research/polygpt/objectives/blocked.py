"""Losses of the next token without the logits of a whole batch.

Logits [B, T, V] of a large vocabulary often take more memory than everything else in a training step. Here they exist
for a block of positions at a time. The backward pass does not compute them again: a loss that depends on the scores of
each position alone has a gradient that is known as soon as the scores are, so the forward pass sums the gradients of
the hidden vectors and of the head block by block (Hsu et al., Liger Kernel, 2410.10989, section 3.2). All products have
operands of the compute dtype and float32 sums.

On a mesh every device handles its own rows, positions and part of the vocabulary; sums over the vocabulary are
exchanged per block, the gradient of the head once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from polygpt import sharding
from polygpt.objectives.base import TokenObjective, TokenScores
from polygpt.sequence import Batch
from polygpt.sharding import LOGITS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """What turns hidden vectors into logits: `multiplier` times the product with the weight, computed in `dtype`.

    Attributes:
        weight: float32 [V, D], or [D, V] if `axes` is ("width", "vocabulary").
        axes: its logical axes.
        multiplier: factor on the logits.
        dtype: compute dtype; products are summed in float32.
    """

    weight: jax.Array
    axes: tuple[str, str] = dataclasses.field(metadata={"static": True})
    multiplier: float = dataclasses.field(default=1.0, metadata={"static": True})
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight.shape[self.axes.index("vocabulary")]

    @property
    def width(self) -> int:
        """D."""
        return self.weight.shape[self.axes.index("width")]

    @property
    def letters(self) -> str:
        """The axes of the weight in an einsum."""
        return "vd" if self.axes[0] == "vocabulary" else "dv"


def token_losses(
    objectives: Mapping[str, TokenObjective],
    coefficients: Mapping[str, jax.Array],
    hidden_BTD: jax.Array,
    head: Head,
    batch: Batch,
    block: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of coefficient times total of all objectives, and the totals by name, all float32 scalars.

    Only the first result has a gradient, with respect to `hidden_BTD` and the head's weight.

    Args:
        objectives: by name.
        coefficients: float32 scalars by name.
        hidden_BTD: the decoder's output.
        head: the output head.
        batch: targets and loss weights. Positions without weight reach neither result nor gradient.
        block: number of positions whose logits exist at a time, per device; at least one of every row.
    """
    names = tuple(objectives)
    plan = _Plan(head, tuple(objectives[name] for name in names), block, *hidden_BTD.shape[:2], sharding.active())

    @jax.custom_vjp
    def losses(hidden_BTD, weight, target_BT, weight_BT, coefficients_K):
        return plan.run(False, hidden_BTD, weight, target_BT, weight_BT, coefficients_K)[:2]

    def forward(*arguments):
        value, totals_K, *gradients = plan.run(True, *arguments)
        return (value, totals_K), gradients

    def backward(gradients, cotangents):
        hidden, weight = (cotangents[0] * gradient for gradient in gradients)
        return hidden.astype(hidden_BTD.dtype), weight.astype(head.weight.dtype), None, None, None

    losses.defvjp(forward, backward)
    given = jnp.stack([jnp.asarray(coefficients[name], jnp.float32) for name in names])
    value, totals_K = losses(hidden_BTD, head.weight, batch.target_BT, batch.weight_BT, given)
    return value, dict(zip(names, totals_K, strict=True))


def token_scores(hidden_BTD: jax.Array, head: Head, target_BT: jax.Array, block: int) -> tuple[TokenScores, jax.Array]:
    """The scores of all positions [B, T], without means, and the most likely token, int32 [B, T]. Has no gradient."""
    plan = _Plan(head, (), block, *hidden_BTD.shape[:2], sharding.active())
    return plan.scores(hidden_BTD, head.weight, target_BT)


Block = int | Literal["auto"] | None
"""How many positions' logits may exist at a time: that many per device, as many as fit AUTOMATIC, or all."""
AUTOMATIC = 2**24
"""Number of logits that may exist at a time per device with "auto", in a model of small width: 64 MiB of float32,
enough to keep matrix units busy."""


def block_size(block: Block, B: int, T: int, vocabulary: int, width: int) -> int | None:
    """The number of positions per device whose logits may exist at a time, at least 1; None for all.

    Args:
        block: an explicit number, "auto", or None.
        B: rows of the batch, of all devices of the active layout.
        T: positions of a row.
        vocabulary: V.
        width: D. Each block reads the whole head and adds to its gradient in float32, as much memory and traffic as the
            logits of D positions. With "auto", blocks therefore have at least D positions and spare the logits of more.
    """
    if block != "auto":
        return block
    layout, shape = sharding.active(), (B, T, vocabulary)
    if layout is not None:
        shape = layout.local_shape(LOGITS, shape)
    return automatic(shape[0] * shape[1], shape[2], width)


def automatic(positions: float, vocabulary: float, width: int) -> int | None:
    """`block_size` with "auto", given the positions of a device and its part of the vocabulary."""
    size = max(width, int(AUTOMATIC // vocabulary))
    return size if positions > size + width else None


def blocks(B: int, T: int, block: int) -> tuple[int, int]:
    """The number of blocks of at most `block` positions, and the positions of each row in a block, at least one."""
    count = -(-T // max(1, block // B))
    return count, -(-T // count)


class _Plan:
    """How a computation is cut into blocks, and over the devices of a layout."""

    def __init__(self, head: Head, objectives: Sequence[TokenObjective], block: int, B: int, T: int, layout):
        self.head, self.objectives, self.layout = head, objectives, layout
        self.vocabulary = head.vocabulary
        self.rows = self.columns = self.split = ()
        if layout is not None:
            place = layout.partition_spec(("batch", "positions"), (B, T))
            self.rows, self.columns = map(sharding.mesh_axes, place)
            self.place, self.weight_place = place, layout.partition_spec(head.axes, head.weight.shape)
            by_name = dict(zip(head.axes, self.weight_place, strict=True))
            self.split, self.width = (sharding.mesh_axes(by_name[name]) for name in ("vocabulary", "width"))
            B, T = layout.local_shape(("batch", "positions"), (B, T))
        self.length = T
        self.count, self.size = blocks(B, T, block)

    def run(self, gradients: bool, hidden_BTD, weight, target_BT, weight_BT, coefficients_K):
        """(value, totals), and with `gradients` also those of hidden vectors, in their dtype, and of the weight."""

        def on_device(hidden_BTD, weight, target_BT, weight_BT, coefficients_K):
            weight = self._whole_width(weight)
            rows = self._blocks(hidden_BTD), self._blocks(target_BT), self._blocks(weight_BT)
            begin = jnp.zeros(len(self.objectives)), jnp.zeros(weight.shape if gradients else ())

            def body(sums, rows):
                totals_K, hidden, own = self._block(gradients, weight, coefficients_K, *rows)
                return (sums[0] + totals_K, sums[1] + own), hidden

            (totals_K, of_weight), of_hidden = jax.lax.scan(body, begin, rows)
            totals_K = self._sum(totals_K, (*self.rows, *self.columns))
            value = jnp.dot(coefficients_K, totals_K)
            return (
                (value, totals_K, self._joined(of_hidden), self._own_width(of_weight))
                if gradients
                else (value, totals_K)
            )

        arguments = hidden_BTD, weight, target_BT, weight_BT, coefficients_K
        if self.layout is None:
            return on_device(*arguments)
        hidden, none = PartitionSpec(*self.place, None), PartitionSpec()
        inputs = hidden, self.weight_place, self.place, self.place, none
        outputs = (none, none, hidden, self._weight_result()) if gradients else (none, none)
        return self._on_mesh(on_device, inputs, outputs)(*arguments)

    def scores(self, hidden_BTD, weight, target_BT):
        """See `token_scores`."""

        def on_device(hidden_BTD, weight, target_BT):
            weight = self._whole_width(weight)

            def body(_, rows):
                logits_NV, found, _ = self._scores(rows[0], weight, rows[1])
                best_N = self._most_likely(logits_NV)
                return None, (found, best_N)

            rows = self._blocks(hidden_BTD), self._blocks(target_BT)
            flat = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), rows)
            found = jax.lax.scan(body, None, flat)[1]
            return jax.tree.map(lambda x: self._joined(x.reshape(rows[1].shape)), found)

        if self.layout is None:
            return on_device(hidden_BTD, weight, target_BT)
        inputs = PartitionSpec(*self.place, None), self.weight_place, self.place
        outputs = TokenScores(self.place, self.place, None), self.place
        return self._on_mesh(on_device, inputs, outputs)(hidden_BTD, weight, target_BT)

    # --- one block ----------------------------------------------------------------------------------------------------

    def _block(self, gradients: bool, weight, coefficients_K, hidden_BCD, target_BC, weight_BC):
        """Totals, and gradients of hidden vectors and weight, of a block of C positions of each row."""
        weight_N, used_N = weight_BC.reshape(-1), weight_BC.reshape(-1) != 0
        hidden_ND = jnp.where(used_N[:, None], hidden_BCD.reshape(len(weight_N), -1), 0)
        logits_NV, scores, at_target_NV = self._scores(hidden_ND, weight, target_BC.reshape(-1))

        def value(scores):
            totals = [jnp.sum(weight_N * objective.per_token(scores)) for objective in self.objectives]
            return jnp.dot(coefficients_K, jnp.stack(totals)), jnp.stack(totals)

        if not gradients:
            return value(scores)[1], None, 0.0
        (_, totals_K), own = jax.value_and_grad(value, has_aux=True)(scores)
        of_logits_NV = own.log_z[:, None] * jnp.exp(logits_NV - scores.log_z[:, None])
        of_logits_NV += jnp.where(at_target_NV, own.target[:, None], 0)
        if scores.mean is not None:
            of_logits_NV += own.mean[:, None] / self.vocabulary
        letters, dtype = self.head.letters, self.head.dtype
        of_logits_NV = (of_logits_NV * self.head.multiplier).astype(dtype)
        sums = {"preferred_element_type": jnp.float32}
        of_hidden_ND = jnp.einsum(f"nv,{letters}->nd", of_logits_NV, weight, **sums)
        of_weight = jnp.einsum(f"nv,nd->{letters}", of_logits_NV, hidden_ND.astype(dtype), **sums)
        of_hidden_BCD = self._sum(of_hidden_ND, self.split).reshape(hidden_BCD.shape)
        return totals_K, of_hidden_BCD.astype(hidden_BCD.dtype), of_weight

    def _scores(self, hidden_ND, weight, target_N) -> tuple[jax.Array, TokenScores, jax.Array]:
        """This device's logits, the scores over the whole vocabulary, and where the logits are those of the targets."""
        head, dtype = self.head, self.head.dtype
        logits_NV = jnp.einsum(
            f"nd,{head.letters}->nv", hidden_ND.astype(dtype), weight, preferred_element_type=jnp.float32
        )
        logits_NV *= head.multiplier
        ids_V = self._first_id(logits_NV.shape[1]) + jnp.arange(logits_NV.shape[1])
        at_target_NV = ids_V[None] == target_N[:, None]
        top_N = jnp.max(logits_NV, axis=1)
        top_N = jax.lax.pmax(top_N, self.split) if self.split else top_N
        top_N = jnp.where(jnp.isfinite(top_N), top_N, 0)
        sum_N = self._sum(jnp.sum(jnp.exp(logits_NV - top_N[:, None]), axis=1), self.split)
        target_N = self._sum(jnp.sum(jnp.where(at_target_NV, logits_NV, 0), axis=1), self.split)
        mean_N = None
        if any(objective.uses_mean for objective in self.objectives):
            mean_N = self._sum(jnp.sum(logits_NV, axis=1), self.split) / self.vocabulary
        return logits_NV, TokenScores(top_N + jnp.log(sum_N), target_N, mean_N), at_target_NV

    def _most_likely(self, logits_NV) -> jax.Array:
        """int32 [N]: the token with the largest logit, the first in a tie."""
        best_N = self._first_id(logits_NV.shape[1]) + jnp.argmax(logits_NV, axis=1)
        if not self.split:
            return best_N
        top_N = jnp.max(logits_NV, axis=1)
        return jax.lax.pmin(jnp.where(top_N == jax.lax.pmax(top_N, self.split), best_N, self.vocabulary), self.split)

    # --- devices ------------------------------------------------------------------------------------------------------

    def _first_id(self, size: int):
        return jax.lax.axis_index(self.split) * size if self.split else 0

    def _sum(self, x, axes):
        return jax.lax.psum(x, axes) if axes else x

    def _blocks(self, x):
        """[B, T, ...] -> [blocks, B, C, ...], with zeros, which have no weight, after the last positions."""
        x = jnp.pad(x, [(0, 0), (0, self.count * self.size - self.length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], self.count, self.size, *x.shape[2:]), 1, 0)

    def _joined(self, x):
        """[blocks, B, C, ...] -> [B, T, ...]."""
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, : self.length]

    def _whole_width(self, weight):
        """The weight in the compute dtype, with its width gathered from all devices that split it."""
        weight = weight.astype(self.head.dtype)
        if self.layout is None or not self.width:
            return weight
        return jax.lax.all_gather(weight, self.width, axis=self.head.axes.index("width"), tiled=True)

    def _own_width(self, gradient):
        """The gradient of the weight, summed over all rows; each device keeps its part of the width if it has one."""
        axes = (*self.rows, *self.columns)
        if self.layout is not None and self.width and set(self.width) <= set(axes):
            axis = self.head.axes.index("width")
            gradient = jax.lax.psum_scatter(gradient, self.width, scatter_dimension=axis, tiled=True)
            axes = tuple(name for name in axes if name not in self.width)
        return self._sum(gradient, axes)

    def _weight_result(self) -> PartitionSpec:
        if set(self.width) <= {*self.rows, *self.columns}:
            return self.weight_place
        return PartitionSpec(
            *(
                entry if name == "vocabulary" else None
                for name, entry in zip(self.head.axes, self.weight_place, strict=True)
            )
        )

    def _on_mesh(self, function, inputs: Any, outputs: Any):
        def alone(*arguments):
            with sharding.use_layout(None):
                return function(*arguments)

        return jax.shard_map(alone, mesh=self.layout.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
