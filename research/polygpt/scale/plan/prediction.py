"""Analytic estimates of a step's memory and time, without compilation. They guide a search; a plan never reports them.

Memory counts what grows with the model: sharded state, gradients, saved activations of all blocks, the working set of
one block, and logits. Time counts matrix products, memory traffic of state and activations, and the collectives that
the sharding needs. Both are coarse. `Correction` applies the errors measured on compiled candidates to the others.
"""

import dataclasses
from collections.abc import Mapping

from polygpt.objectives.blocked import automatic
from polygpt.scale.plan import links
from polygpt.scale.plan.facts import DECODER, Facts, MeshFacts
from polygpt.scale.plan.flops import causal_share, remat
from polygpt.scale.plan.predicted_collectives import block_work, predicted_collectives
from polygpt.scale.plan.roofline import Roofline
from polygpt.scale.plan.target import Target
from polygpt.training.experiment import Experiment

SAVED = {"full": (1.0, 0.0), "dots": (1.0, 1.0), "none": (5.0, 2.2)}
"""Saved activations per block and position, by remat policy: multiples of the model's width and of the total output
width of the block's matrices. Without remat, norms, rotated queries and keys, and activation functions are saved too.
"""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The estimates for one candidate.

    Attributes:
        state, gradients: bytes per device of the sharded state, and of gradients.
        activations: bytes per device of activations saved for the backward pass.
        working, head: bytes per device of the working set of one block, and of logits.
        roofline: bounds on the time of a step.
        causal_share: the decoder's attention on the busiest device relative to the mean, see `flops.causal_share`.
    """

    state: float
    gradients: float
    activations: float
    working: float
    head: float
    roofline: Roofline
    causal_share: float = 1.0

    @property
    def temporaries(self) -> float:
        """Bytes per device besides the state."""
        return self.gradients + self.activations + max(self.working, self.head)


BOUNDS = ("compute", "memory", "links", "in_turn", "network")
"""Roofline fields that a correction scales: the bounds of a step, and the time of collectives in turn."""


@dataclasses.dataclass(frozen=True)
class Correction:
    """Factors on temporaries and on each bound, the ratios of compiled to predicted values."""

    temporaries: float
    bounds: Mapping[str, float]

    def memory(self, prediction: Prediction) -> float:
        """Corrected bytes per device."""
        return prediction.state + self.temporaries * prediction.temporaries

    def roofline(self, prediction: Prediction) -> Roofline:
        """The roofline with corrected bounds."""
        r = prediction.roofline
        return dataclasses.replace(r, **{name: getattr(r, name) * self.bounds[name] for name in BOUNDS})


def predict(experiment: Experiment, known: Facts, target: Target, here: MeshFacts) -> Prediction:
    """The estimates for an experiment that differs from that of `known` only in mesh, remat, microbatches and batch.

    In a pipeline, a device applies the blocks of one stage to one microbatch in each iteration of the schedule. The
    saved activations are those of all iterations, including the bubble.
    """
    model, data, parts = experiment.model, experiment.data, experiment.optim.accumulate
    layout, schedule, own = here.layout, here.schedule, here.sharded
    rows = data.batch_size / layout.size("batch") / parts  # per device and microbatch
    positions = rows * data.layout.seq_len / layout.size("positions")
    compute = 2 if model.dtype == "bfloat16" else 4

    state = own * 4 * (1 + known.optimizer)
    gradients = own * (4 * (2 if parts > 1 else 1) + (compute if compute < 4 else 0))
    work = block_work(positions, model.decoder.depth, layout, schedule)
    stacks = {
        f"adapters/{name}/tower/": (adapter.tower, rows * adapter.items * _inner(adapter), adapter.tower.depth)
        for name, adapter in model.adapters.items()
        if hasattr(adapter, "tower")
    }
    for name, stack in model.stacks().items():
        its = block_work(positions, stack.depth, layout, schedule)
        stacks[f"{name}/"] = (stack, its.positions, its.executions)
    activations = working = traffic = 0.0
    for prefix, (stack, at, turns) in stacks.items():
        block = here.blocks[prefix]
        width = stack.width / layout.size("features")
        each = {name: compute * (a * width + b * block.outputs) for name, (a, b) in SAVED.items()}
        activations += at * turns * each[stack.remat]
        working = max(working, 2 * at * each["none"] + block.matrices * (2 * compute + 4))
        traffic += at * turns * each["none"] * (3 + (stack.remat == "full")) * parts
    if schedule.stages > 1:  # the buffer of all microbatches, and its gradient
        activations += (
            2 * work.positions * schedule.microbatches * model.decoder.width / layout.size("features") * compute
        )
    vocabulary = known.vocabulary / layout.size("vocabulary")
    logits = 4 * 3 * vocabulary  # bytes per position
    block = model.logits_block
    if block == "auto":
        block = automatic(positions, vocabulary, model.decoder.width)
    head = logits * min(positions, block or positions)
    read = here.gathered + here.blocks[DECODER].matrices * (work.executions - work.blocks)  # parameters read per pass
    traffic += 3 * (own * 4 * (2 + known.optimizer)) + read * compute * 6 * parts + 2 * logits * positions * parts

    counted = remat(known.flops, model)
    scores = sum(line.forward for line in counted.lines if line.name.endswith(", attention"))
    bubble = schedule.bubble()  # its computations are discarded
    blocks = sum(line.forward * (3 + line.again) for line in counted.lines if ", " in line.name)
    wasted = (blocks + 1.7 * scores) * bubble / (1 - bubble)
    share = causal_share(experiment, layout.mesh.shape, target.traced)
    attention = sum(line.forward * (4.7 + line.again) for line in counted.lines if line.name.endswith(", attention"))
    uneven = (share - 1) * attention  # other devices wait for the busiest
    executed = (counted.useful + counted.again + 1.7 * scores + wasted + uneven) / target.count
    expected = predicted_collectives(experiment, known, here, positions, work, compute)
    linked = links.total(expected, target, tuple(layout.mesh.devices.flat))
    roofline = Roofline(
        compute=executed / target.peak if target.peak else 0.0,
        memory=traffic / target.chip.each(target.chip.bandwidth) if target.peak else 0.0,
        links=linked.busiest,
        in_turn=linked.in_turn,
        network=linked.network,
        useful=counted.useful / target.count,
        executed=executed,
        peak=target.peak or 0.0,
    )
    return Prediction(state, gradients, activations, working, head, roofline, share)


def _inner(adapter) -> int:
    """Positions per item inside its tower."""
    return adapter.applications.get("tower", adapter.positions)
