"""A plan: memory, FLOPs, collectives and roofline of a training step, without the devices to run it on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from polygpt.scale.plan import collectives, compilation, hlo, links, work
from polygpt.scale.plan.collectives import Collective
from polygpt.scale.plan.compilation import Built
from polygpt.scale.plan.flops import Flops, causal_share, flops
from polygpt.scale.plan.memory import Exhausted, Memory
from polygpt.scale.plan.roofline import Roofline, StandIn
from polygpt.scale.plan.target import Target
from polygpt.training.experiment import Experiment

UNKNOWN = (
    "the trip count of the loop {loop} is unknown, so its body counts once: FLOPs, memory traffic, times, collectives "
    "and fused kernels of the compiled program are lower bounds; memory per device and FLOPs by the formula are exact"
)
"""Warning about a loop with an unknown trip count and the figures that it affects."""


@dataclasses.dataclass(frozen=True)
class TimedCollective:
    """A collective, and a lower bound on the seconds per step of its executions without other traffic."""

    collective: Collective
    seconds: float

    def to_json(self) -> dict:
        """As JSON data, with the size of the group instead of its members."""
        own = dataclasses.asdict(self.collective) | {
            "group": len(self.collective.group),
            "axes": list(self.collective.axes),
        }
        del own["pairs"]
        return own | {
            "sent": self.collective.sent,
            "sent_a_step": self.collective.sent_per_step,
            "seconds": self.seconds,
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """The result of `plan`.

    Attributes:
        name: name of the experiment.
        target: the target.
        settings: see `settings`: mesh, pipeline, remat, microbatches, batch_size, seq_len.
        memory: memory per device; None if the compiler ran out of memory.
        exhausted: the compiler's report in that case.
        flops: FLOPs per step.
        collectives: collectives, largest first.
        kernels: (executions, FLOPs) per step of fused kernels, by name.
        roofline: lower bound on the time of a step; None if the chip's figures are not published, or if the target's
            own compiler has not compiled the program.
        stand_in: if another platform's compiler compiled the program, the time estimates that are still possible.
        seconds: compile time.
        reason: why this mesh was chosen, if that was automatic.
        warnings: warnings to show with the plan.
    """

    name: str
    target: Target
    settings: Mapping[str, Any]
    memory: Memory | None
    exhausted: Exhausted | None
    flops: Flops
    collectives: tuple[TimedCollective, ...]
    kernels: Mapping[str, tuple[int, float]]
    roofline: Roofline | None
    stand_in: StandIn | None
    seconds: float
    reason: str | None
    warnings: tuple[str, ...]

    @property
    def sent(self) -> float:
        """Bytes that each device sends per step."""
        return sum(one.collective.sent_per_step for one in self.collectives)

    def to_json(self) -> dict:
        """As JSON data."""
        chip = dataclasses.asdict(self.target.chip)
        return {
            "experiment": self.name,
            "on": self.target.name,
            "slices": self.target.slices,
            "devices": self.target.count,
            "chip": chip,
            "links": links.describe(self.target),
            "estimated": self.target.estimated,
            "settings": dict(self.settings),
            "reason": self.reason,
            "memory": self.memory and self.memory.to_json(),
            "exhausted": self.exhausted and dataclasses.asdict(self.exhausted),
            "flops": self.flops.to_json(),
            "collectives": [one.to_json() for one in self.collectives],
            "collective_bytes": self.sent,
            "kernels": {name: {"times": n, "flops": count} for name, (n, count) in self.kernels.items()},
            "roofline": self.roofline and self.roofline.to_json(),
            "stand_in": self.stand_in and self.stand_in.to_json(),
            "compile_seconds": self.seconds,
            "versions": compilation.versions(),
            "warnings": list(self.warnings),
        }


def plan(experiment: Experiment, target: Target) -> Plan:
    """Compiles the step of an experiment for a target and analyses the compiled program.

    Raises:
        UserError: the mesh does not divide batch_size, seq_len or heads evenly, or the target's compiler is not
            installed.
    """
    target.prepare()
    built = compilation.build(experiment, target)
    counted = flops(experiment, built.vocabulary)
    if built.text is None:
        return _plan(experiment, target, built, counted)
    program = hlo.parse(built.text)
    found = collectives.collectives(program, built.mesh)
    timed = tuple(TimedCollective(one, one.times * sum(links.seconds(one, target, built.devices))) for one in found)
    share = causal_share(experiment, built.mesh, target.traced)
    times, executed = collectives.kernels(program), work.kernel_flops(program, share)
    roofline = stand_in = None
    if target.peak:
        linked = links.total(found, target, built.devices)
        times_on_links = {"links": linked.busiest, "in_turn": linked.in_turn, "network": linked.network}
        if target.has_stand_in:
            useful, again = (count / target.count / target.peak for count in (counted.useful, counted.again))
            stand_in = StandIn(useful, again, **times_on_links)
        else:
            products = work.products(program) + sum(executed.values())
            roofline = Roofline(
                compute=products / target.peak,
                memory=work.traffic(program) / target.chip.each(target.chip.bandwidth),
                **times_on_links,
                useful=counted.useful / target.count,
                executed=products,
                peak=target.peak,
            )
    kernels = {name: (count, executed[name]) for name, count in times.items()}
    warnings = [UNKNOWN.format(loop=name) for name in program.unknown]
    warnings += [f"the FLOPs of the kernel {name} are unknown and count as 0" for name, n in executed.items() if not n]
    return _plan(experiment, target, built, counted, timed, kernels, roofline, stand_in, warnings)


def _plan(
    experiment, target, built: Built, counted, timed=(), kernels=None, roofline=None, stand_in=None, warnings=()
) -> Plan:
    warnings = list(warnings)
    if built.devices and len(built.devices) < target.count:
        idle = f"{target.count - len(built.devices)} of {target.count} devices are idle"
        warnings.append(f"train.parallel is single: {idle}; try --train.parallel auto")
    if experiment.train.parallel == "pmap":
        warnings.append("train.parallel is pmap: planned as one sharded program, which computes the same")
    return Plan(
        name=experiment.name,
        target=target,
        settings=settings(experiment, built.mesh, target.traced),
        memory=built.memory,
        exhausted=built.exhausted,
        flops=counted,
        collectives=tuple(timed),
        kernels=kernels or {},
        roofline=roofline,
        stand_in=stand_in,
        seconds=built.seconds,
        reason=built.reason,
        warnings=tuple(warnings),
    )


def settings(experiment: Experiment, mesh: Mapping[str, int], platform: str) -> dict[str, Any]:
    """The settings besides the model that determine a plan: mesh, pipeline, remat, microbatches, batch and dtype."""
    model, spec = experiment.model, experiment.train.mesh
    towers = {adapter.tower.remat for adapter in model.adapters.values() if hasattr(adapter, "tower")}
    return {
        "mesh": {axis: size for axis, size in mesh.items() if size > 1},
        "features": list(spec.rules["features"]),
        "pipeline": {"microbatches": spec.microbatches or spec.stage, "repeats": spec.repeats}
        if mesh.get("stage", 1) > 1
        else None,
        "context": spec.context if mesh.get("sequence", 1) > 1 else None,
        "causal_share": causal_share(experiment, mesh, platform) if mesh.get("sequence", 1) > 1 else None,
        "remat": model.decoder.remat,
        "towers": "/".join(sorted(towers)) or None,
        "microbatches": experiment.optim.accumulate,
        "batch_size": experiment.data.batch_size,
        "seq_len": experiment.data.layout.seq_len,
        "dtype": model.dtype,
    }
