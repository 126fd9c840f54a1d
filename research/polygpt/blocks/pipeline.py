"""Pipeline parallelism: blocks on different devices process different microbatches at the same time.

GPipe (Huang et al., 1811.06965), section 2. The circular schedule is Megatron-LM's interleaved schedule (Narayanan et
al., 2104.04473, section 2.2). It is written as one array program, as in GSPMD (Xu et al., 2105.04663, section 3.3): a
`vmap` over the stage axis computes all stages at once, and a roll along that axis passes activations to the next stage.
If the axis is split over devices, the compiler turns the roll into a collective permute; on one device the same program
gives the same numbers.

Axis letters here: P stages, M microbatches, R repeats, K periods of blocks that a stage computes at a time, b rows per
microbatch. In repeat r, stage p computes K periods starting at (r P + p) K.

Parameters are stored in block order, one contiguous range per stage. For R = 1 they are already in place. For R > 1
they are moved once per step, and their gradients back: the compiler emits an all-to-all of (P - 1) / P of a stage's
parameters, in addition to M R + P - 1 transfers of activations.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from polygpt import sharding
from polygpt.attention.contract import Context
from polygpt.errors import SpecError
from polygpt.nn.losses import Losses
from polygpt.sharding import RESIDUAL, MeshLayout

Body = Callable[[Any, jax.Array, jax.Array, Context, jax.Array], tuple[jax.Array, Losses]]
"""One period of blocks: `(params, x_bTD, period, context, microbatch) -> (x_bTD, losses)`."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The pipeline schedule: microbatch m enters stage 0 for repeat r in iteration r M + m, and stage p p iterations
    later.

    M >= P guarantees that a repeat has finished before the next one begins; in between the microbatch waits.

    Attributes:
        stages: P.
        repeats: R, how often a microbatch passes through all stages.
        microbatches: M.
    """

    stages: int
    repeats: int
    microbatches: int

    @classmethod
    def of(cls, layout: MeshLayout) -> "Schedule | None":
        """The schedule of a layout, or None if it has no stages."""
        stages, spec = layout.size("stages"), layout.spec
        return None if stages == 1 else cls(stages, spec.repeats, spec.microbatches or stages)

    @property
    def iterations(self) -> int:
        """M R + P - 1."""
        return self.microbatches * self.repeats + self.stages - 1

    def bubble(self) -> float:
        """The fraction of iterations in which a stage is idle, (P - 1) / (M R + P - 1).

        For R = 1 see 1811.06965, section 2.3. 2104.04473, section 2.2, states the same time relative to useful work,
        (P - 1) / (M R).
        """
        return (self.stages - 1) / self.iterations

    def check(self, depth: int, pattern: int, batch_size: int, name: str = "decoder") -> None:
        """Raises SpecError unless `depth` blocks in patterns of `pattern`, and `batch_size` rows, divide evenly; `name`
        is the field of the model that describes them."""
        P, M = self.stages, self.microbatches
        parts = P * self.repeats * pattern
        if depth % parts:
            why = f"train.mesh.stage {P}, train.mesh.repeats {self.repeats}, {pattern} blocks in a pattern"
            raise SpecError(f"model.{name}.depth is {depth}: it must be a multiple of {parts} ({why})")
        if M < P:
            raise SpecError(f"train.mesh.microbatches is {M}: it must be at least train.mesh.stage, which is {P}")
        if batch_size % M:
            raise SpecError(f"train.mesh.microbatches is {M}: it must divide the {batch_size} rows of a step")


def pipeline(
    body: Body, params: Any, x_BTD: jax.Array, context: Context, schedule: Schedule, policy: Callable | None = None
) -> tuple[jax.Array, Losses]:
    """A scan of `body` over all periods, computed in stages; returns the output and the summed losses.

    Outputs and gradients equal those of the scan up to rounding, because rows are independent. Losses are summed over
    microbatches as over blocks. A loss that is not a sum over positions, such as the load balance of experts, is
    computed per microbatch.

    Args:
        body: the computation of one period.
        params: its parameters, a tree of arrays with a leading axis of R P K periods.
        x_BTD: the input. A microbatch is every M-th row, so that rows stay on their device.
        context: the context of all rows, without a cursor: pipelines do not support caches.
        schedule: a schedule that has been checked.
        policy: which values of an iteration to keep for the backward pass, one of `nn.remat.KEPT`; None keeps all that
            it needs. Required with repeats: iterations then use different parameters, and without a policy each would
            keep a copy of its own.
    """
    P, R, M = schedule.stages, schedule.repeats, schedule.microbatches
    with sharding.use_layout(_within(sharding.active())):
        params = jax.tree.map(lambda leaf: _by_stage(leaf, P, R), params)
        all_stages = jax.vmap(_stage(body, schedule, policy), spmd_axis_name=_names() or None)
        # Stage 0 reads each microbatch from the microbatch buffer and finds it there again one repeat later. The
        # buffers of the other stages are never read: that is the price of running one program on all devices.
        buffer_PMbTD = _replicate(_microbatches(x_BTD, M), P)
        context = jax.tree.map(lambda leaf: _skew(_replicate(_microbatches(leaf, M), P)), context)
        stage_P = jnp.arange(P)

        def iteration(carry, t):
            moved_PbTD, buffer_PMbTD = carry
            next_PbTD = _at(buffer_PMbTD, t % M)
            x_PbTD = _on_stages(jnp.where((stage_P == 0)[:, None, None, None], next_PbTD, moved_PbTD), *RESIDUAL)
            here = jax.tree.map(lambda leaf: _at(leaf, t % M), context)
            y_PbTD, losses_P = all_stages(params, x_PbTD, here, stage_P, t - stage_P)
            moved_PbTD = _on_stages(jnp.roll(_on_stages(y_PbTD, *RESIDUAL), 1, axis=0), *RESIDUAL)
            finished = t - (P - 1)  # the step that the last stage has just finished; negative while the pipeline fills
            index = finished % M
            stored_PbTD = jnp.where(finished >= 0, moved_PbTD, _at(buffer_PMbTD, index))
            buffer_PMbTD = jax.lax.dynamic_update_index_in_dim(buffer_PMbTD, stored_PbTD, index, 1)
            return (moved_PbTD, _on_stages(buffer_PMbTD, None, *RESIDUAL)), losses_P

        start = _on_stages(jnp.zeros_like(buffer_PMbTD[:, 0]), *RESIDUAL), buffer_PMbTD
        (_, buffer_PMbTD), losses = jax.lax.scan(iteration, start, jnp.arange(schedule.iterations))
        y_BTD = buffer_PMbTD[0].swapaxes(0, 1).reshape(x_BTD.shape)
    return sharding.constrain(y_BTD, *RESIDUAL), jax.tree.map(jnp.sum, losses)


def with_rows(tree: Any, more: int) -> Any:
    """Arrays [B, ...] with `more` rows of zeros appended: padding, whose segment is 0."""
    return tree if more == 0 else jax.tree.map(lambda x: jnp.pad(x, ((0, more), *[(0, 0)] * (x.ndim - 1))), tree)


def _stage(body: Body, schedule: Schedule, policy: Callable | None) -> Callable:
    """One iteration of one stage: `(params [R, K, ...], x_bTD, context, stage, step) -> (x_bTD, losses)`.

    `step` counts the stage's microbatches over all repeats; it is negative in the bubble.
    """
    P, R, M = schedule.stages, schedule.repeats, schedule.microbatches

    def stage(params, x_bTD, context, stage, step):
        busy = (step >= 0) & (step < M * R)
        # A constant if R = 1, so that parameters do not appear to vary by iteration.
        repeat = jnp.clip(step // M, 0, R - 1) if R > 1 else 0
        mine = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, repeat, 0, False), params)
        K = jax.tree.leaves(mine)[0].shape[0]

        def through(x_bTD, inputs):
            params, period = inputs
            return body(params, x_bTD, period, context, step % M)

        # In the bubble compute on zeros, which are safe because padding is zeros too, rather than on stale rows.
        periods_K = (repeat * P + stage) * K + jnp.arange(K)
        x_bTD, losses = jax.lax.scan(through, jnp.where(busy, x_bTD, 0), (mine, periods_K))
        return x_bTD, jax.tree.map(lambda loss_K: jnp.where(busy, jnp.sum(loss_K), 0), losses)

    return stage if policy is None else jax.checkpoint(stage, policy=policy, prevent_cse=False)


def _within(layout: MeshLayout | None) -> MeshLayout | None:
    """The layout inside the pipeline, where rows are not split over the mesh axes of the stages."""
    if layout is None:
        return None
    rules = dict(layout.spec.rules)
    rules["batch"] = tuple(axis for axis in rules["batch"] if axis not in rules["stages"])
    return dataclasses.replace(layout, spec=layout.spec.replace(rules=rules))


def _microbatches(x, M: int):
    """[B, ...] -> [M, b, ...]."""
    return x.reshape(-1, M, *x.shape[1:]).swapaxes(0, 1)


def _by_stage(x, P: int, R: int):
    """[R P K, ...] -> [P, R, K, ...]."""
    return _on_stages(x.reshape(R, P, -1, *x.shape[1:]).swapaxes(0, 1))


def _replicate(x, P: int):
    """[M, b, ...] -> [P, M, b, ...]: one copy per stage, so that stages need not exchange it."""
    return _on_stages(jnp.broadcast_to(x[None], (P, *x.shape)), None, "batch")


def _skew(x):
    """[P, M, ...] with microbatch m of stage p at index (m + p) mod M, so that all stages read the same index."""
    P, M = x.shape[:2]
    index_PM = (jnp.arange(M)[None, :] - jnp.arange(P)[:, None]) % M
    return _on_stages(jax.vmap(lambda x, index_M: x[index_M])(x, index_PM), None, "batch")


def _at(x, index):
    """[P, M, ...] -> [P, ...]."""
    return jax.lax.dynamic_index_in_dim(x, index, 1, False)


def _on_stages(x, *names: str | None):
    """[P, ...], split over stages; `names` are of the next axes, the compiler decides the rest."""
    layout = sharding.active()
    if layout is None:
        return x
    split = layout.partition_spec(("stages", *names), x.shape[: 1 + len(names)])
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(split))
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, PartitionSpec(*split, *rest)))


def _names() -> tuple[str, ...]:
    """The mesh axes that stages are split over."""
    layout = sharding.active()
    return () if layout is None else layout.names("stages")
