"""Estimates how many seeds can be trained together in a device's memory."""

import jax

from polygpt.training import automatic
from polygpt.training.experiment import Experiment
from polygpt.training.program import assemble


def most(experiment: Experiment) -> int:
    """Number of seeds to train together: as many as fit into a device's memory by estimate, at least one."""
    return max(1, int(fitting(experiment)))


def fitting(experiment: Experiment) -> float:
    """Estimated number of seeds that fit into a device's memory; below 1 if not even one does.

    Each needs its state, a gradient and updates, activations of T B D (34 + 5 H T / D) bytes per layer at 16 bits
    (Korthikanti et al., 2205.05198, eq. 1), and the logits with their gradient.
    """
    vocabulary, decoder = experiment.tokenizer.build().vocabulary, experiment.model.decoder
    depth = sum(stack.depth for stack in experiment.model.stacks().values())
    program = assemble(experiment, vocabulary, jax.devices()[:1])
    seq_len, batch_size = experiment.data.layout.seq_len, experiment.data.batch_size // experiment.optim.accumulate
    heads = getattr(decoder.attention, "heads", 1)
    layer = (
        decoder.width * (34 + 5 * heads * seq_len / decoder.width) * (2 if experiment.model.dtype == "float32" else 1)
    )
    activations = batch_size * seq_len * (depth * layer + 3 * 4 * vocabulary)
    state = automatic.bytes_of(jax.eval_shape(program.initial)) + 2 * automatic.bytes_of(program.shapes)
    return automatic.SPLIT * automatic.memory_of_all() / (state + activations)
