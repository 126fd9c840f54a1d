"""A text GPT as an experiment, and its training step lowered as `polygpt train` builds it, without data."""

import jax

from polygpt.attention.multi_head import MultiHead
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.sources.embedded import Embedded
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.mlp import MLP
from polygpt.nn.norms import LayerNorm
from polygpt.nn.positions import Learned
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import Constant
from polygpt.scale.plan.compilation import abstract_batch
from polygpt.training.experiment import Experiment, TrainSpec
from polygpt.training.program import assemble


def experiment(
    width: int, depth: int, length: int, rows: int, vocabulary: int, dtype: str = "float32", **decoder
) -> Experiment:
    """GPT-2's form: LayerNorm, biases, tanh GELU, learned positions, a tied head, heads of 64 channels.

    Args:
        width, depth: of the decoder.
        length: T, positions per row.
        rows: B.
        vocabulary: V, above 258; the tokenizer is that of bytes, and the other ids do not occur.
        dtype: compute dtype.
        decoder: other fields of the decoder, such as `remat`.
    """
    attention = MultiHead(heads=max(1, width // 64), bias=True)
    stack = DecoderSpec(width, depth, attention, mlp=MLP(), norm=LayerNorm(), position=Learned(length), **decoder)
    return Experiment(
        name="benchmark",
        model=ModelSpec(stack, dtype=dtype),
        tokenizer=Bytes(multiple=vocabulary),
        data=DataSpec({"text": Task(Embedded("text", characters=96))}, LayoutSpec(length), batch_size=rows),
        optim=Optim(Constant(1e-3)),
        train=TrainSpec(steps=1000, parallel="single"),
    )


def lowered(experiment: Experiment) -> jax.stages.Lowered:
    """The training step for abstract arguments: allocates nothing."""
    program = assemble(experiment, experiment.tokenizer.build().vocabulary)
    state = program.parallel.abstract(program.initial)
    return program.step.lower(state, abstract_batch(experiment, program.parallel))
