"""Stages of a pipeline: blocks that lie on different devices work on different microbatches at the same time.

GPipe (Huang et al., 1811.06965), section 2; the circular schedule is Megatron-LM's interleaving of stages (Narayanan et
al., 2104.04473, section 2.2). It is written as one array program, the form of GSPMD (Xu et al., 2105.04663, section
3.3): all stages compute at once under `vmap` over an axis of stages, and what moves from a stage to the next is a roll
along that axis. Where the axis is split over devices the compiler makes of that a message between neighbours; without
devices it is the same program, and gives the same numbers.

Axis letters here: P stages, M microbatches, R repeats, K periods of blocks that a stage computes at a time, b rows of a
microbatch. In round r stage p computes the periods from (r P + p) K on.

Parameters lie in the order of the blocks, split over stages in one run each. For R = 1 that is where they are needed.
For R > 1 it is not, and they are brought there once a step, and their gradients back: the compiler makes of it an
all-to-all of (P - 1) / P of what a stage holds, beside the M R + P - 1 messages of activations.
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
from polygpt.sharding import RESIDUAL, Layout

Body = Callable[[Any, jax.Array, jax.Array, Context, jax.Array], tuple[jax.Array, Losses]]
"""One period of blocks: `(params, x_bTD, period, context, microbatch) -> (x_bTD, losses)`."""

INPUT = "input of a block"
"""The name that blocks under recomputation give to it."""
_policies = jax.checkpoint_policies
_MOVES = ("dynamic_slice", "gather", "squeeze", "transpose", "reshape", "broadcast_in_dim", "convert_element_type")
KEPT = {
    # All that is computed. What is only moved or cast may be parameters.
    "none": lambda primitive, *_, **__: primitive.name not in _MOVES,
    "dots": _policies.save_from_both_policies(_policies.dots_saveable, _policies.save_only_these_names(INPUT)),
    "full": _policies.save_only_these_names(INPUT),
}
"""By `StackSpec.remat`, what the backward pass is left of an iteration, whose parameters are never among it."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who computes what when: microbatch m enters stage 0 for its r-th round in iteration r M + m.

    Stage p has it p iterations later. With M >= P its round is over before the next begins; until then it waits.

    Attributes:
        stages: P.
        repeats: R, the rounds that a microbatch makes through the stages.
        microbatches: M.
    """

    stages: int
    repeats: int
    microbatches: int

    @classmethod
    def of(cls, layout: Layout) -> "Schedule | None":
        """That of a layout, or None where it has no stages."""
        stages, spec = layout.size("stages"), layout.spec
        return None if stages == 1 else cls(stages, spec.repeats, spec.microbatches or stages)

    @property
    def iterations(self) -> int:
        """M R + P - 1."""
        return self.microbatches * self.repeats + self.stages - 1

    def bubble(self) -> float:
        """The share of its iterations in which a stage has nothing to do, (P - 1) / (M R + P - 1).

        For R = 1 that is 1811.06965, section 2.3; 2104.04473, section 2.2 gives the same time as a share of the useful
        rest, (P - 1) / (M R).
        """
        return (self.stages - 1) / self.iterations

    def check(self, depth: int, pattern: int, rows: int) -> None:
        """Raises SpecError unless `depth` blocks, in patterns of so many, and `rows` rows can be cut so."""
        P, M = self.stages, self.microbatches
        parts = P * self.repeats * pattern
        if depth % parts:
            why = f"train.mesh.stage {P}, train.mesh.repeats {self.repeats}, {pattern} blocks in a pattern"
            raise SpecError(f"model.decoder.depth is {depth}: it must be a multiple of {parts} ({why})")
        if M < P:
            raise SpecError(f"train.mesh.microbatches is {M}: it must be at least train.mesh.stage, which is {P}")
        if rows % M:
            raise SpecError(f"train.mesh.microbatches is {M}: it must divide the rows of a step, which are {rows}")


def pipeline(
    body: Body, params: Any, x_BTD: jax.Array, context: Context, schedule: Schedule, policy: Callable | None = None
) -> tuple[jax.Array, Losses]:
    """What a scan of `body` over all periods gives, and the sums of its losses, computed in stages.

    Equal to rounding, gradients too, because rows do not depend on each other. Losses are added up over microbatches as
    they are over blocks. One that is not a sum over positions, such as the balance of experts, is that of microbatches.

    Args:
        body: the computation.
        params: its parameters, a tree of arrays whose first axis counts all R P K periods.
        x_BTD: what goes in. A microbatch is every M-th row, so that rows that lie on a device stay there.
        context: of all rows, without a cursor: caches do not go through pipelines.
        schedule: which has been checked.
        policy: what of an iteration is kept for the backward pass, one of `KEPT`; None for all that it needs. With
            repeats there has to be one: iterations differ in their parameters then, and all would be copies of them.
    """
    P, R, M = schedule.stages, schedule.repeats, schedule.microbatches
    with sharding.using(_within(sharding.active())):
        params = jax.tree.map(lambda leaf: _by_stage(leaf, P, R), params)
        all_stages = jax.vmap(_stage(body, schedule, policy), spmd_axis_name=_names() or None)
        # Stage 0 takes microbatches from the desk and finds them there again, a round later. Desks of other stages are
        # read by nobody: a program that is the same for all devices costs that.
        desk_PMbTD = _everywhere(_microbatches(x_BTD, M), P)
        context = jax.tree.map(lambda leaf: _skewed(_everywhere(_microbatches(leaf, M), P)), context)
        stage_P = jnp.arange(P)

        def iteration(carry, t):
            moved_PbTD, desk_PMbTD = carry
            taken_PbTD = _at(desk_PMbTD, t % M)
            x_PbTD = _on_stages(jnp.where((stage_P == 0)[:, None, None, None], taken_PbTD, moved_PbTD), *RESIDUAL)
            here = jax.tree.map(lambda leaf: _at(leaf, t % M), context)
            y_PbTD, losses_P = all_stages(params, x_PbTD, here, stage_P, t - stage_P)
            moved_PbTD = _on_stages(jnp.roll(_on_stages(y_PbTD, *RESIDUAL), 1, axis=0), *RESIDUAL)
            finished = t - (P - 1)  # by the last stage, once it has got anything
            place = finished % M
            left_PbTD = jnp.where(finished >= 0, moved_PbTD, _at(desk_PMbTD, place))
            desk_PMbTD = jax.lax.dynamic_update_index_in_dim(desk_PMbTD, left_PbTD, place, 1)
            return (moved_PbTD, _on_stages(desk_PMbTD, None, *RESIDUAL)), losses_P

        start = _on_stages(jnp.zeros_like(desk_PMbTD[:, 0]), *RESIDUAL), desk_PMbTD
        (_, desk_PMbTD), losses = jax.lax.scan(iteration, start, jnp.arange(schedule.iterations))
        y_BTD = desk_PMbTD[0].swapaxes(0, 1).reshape(x_BTD.shape)
    return sharding.constrain(y_BTD, *RESIDUAL), jax.tree.map(jnp.sum, losses)


def _stage(body: Body, schedule: Schedule, policy: Callable | None) -> Callable:
    """What one stage does in one iteration; `step` counts its microbatches in all rounds, from below 0 in the bubble.

    `(params [R, K, ...], x_bTD, context, stage, step) -> (x_bTD, losses)`.
    """
    P, R, M = schedule.stages, schedule.repeats, schedule.microbatches

    def stage(params, x_bTD, context, stage, step):
        busy = (step >= 0) & (step < M * R)
        # A number where there is one round: parameters must not look as if they differed by iteration.
        repeat = jnp.clip(step // M, 0, R - 1) if R > 1 else 0
        mine = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, repeat, 0, False), params)
        K = jax.tree.leaves(mine)[0].shape[0]

        def through(x_bTD, inputs):
            params, period = inputs
            return body(params, x_bTD, period, context, step % M)

        # In the bubble zeros, which blocks have to bear since padding is zeros, and not what is left of other rows.
        periods_K = (repeat * P + stage) * K + jnp.arange(K)
        x_bTD, losses = jax.lax.scan(through, jnp.where(busy, x_bTD, 0), (mine, periods_K))
        return x_bTD, jax.tree.map(lambda loss_K: jnp.where(busy, jnp.sum(loss_K), 0), losses)

    return stage if policy is None else jax.checkpoint(stage, policy=policy, prevent_cse=False)


def _within(layout: Layout | None) -> Layout | None:
    """The layout inside the pipeline: rows, where they are split over the stages' devices too, are not here."""
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


def _everywhere(x, P: int):
    """[M, b, ...] -> [P, M, b, ...], a copy for each stage: none has to ask another for its part."""
    return _on_stages(jnp.broadcast_to(x[None], (P, *x.shape)), None, "batch")


def _skewed(x):
    """[P, M, ...] with microbatch m of stage p at place m + p, so that in an iteration all look at the same place."""
    P, M = x.shape[:2]
    places_PM = (jnp.arange(M)[None, :] - jnp.arange(P)[:, None]) % M
    return _on_stages(jax.vmap(lambda x, places: x[places])(x, places_PM), None, "batch")


def _at(x, place):
    """[P, M, ...] -> [P, ...]."""
    return jax.lax.dynamic_index_in_dim(x, place, 1, False)


def _on_stages(x, *names: str | None):
    """[P, ...], split over stages, and further as the names of its next axes say; the others as the compiler likes."""
    layout = sharding.active()
    if layout is None:
        return x
    split = layout.axes(("stages", *names), x.shape[: 1 + len(names)])
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(split))
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, PartitionSpec(*split, *rest)))


def _names() -> tuple[str, ...]:
    """The mesh axes that stages are split over."""
    layout = sharding.active()
    return () if layout is None else layout.names("stages")
