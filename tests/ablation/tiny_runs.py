"""Runs of a second: dropout, accumulation, a moving average and evaluations on the way, on the text of the licence."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from polygpt.attention.multi_head import MultiHead
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.sources.text_files import TextFiles
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.objectives.next_token import NextToken
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import WarmupCosine
from polygpt.overrides import replaced
from polygpt.training.experiment import Experiment, TrainSpec

TEXT = TextFiles((str(Path(__file__).parents[2] / "LICENSE"),), unit="chunk", bytes=40)


@dataclasses.dataclass(frozen=True)
class Poisoned(NextToken):
    """Not a number where the token ids of a batch add up to `sum`."""

    sum: int = -1
    """The poison."""

    def total(self, outputs, batch):
        return super().total(outputs, batch) + jnp.where(batch.tokens_BT.sum() == self.sum, jnp.nan, 0.0)


def experiment(**changes) -> Experiment:
    """With typed changes by dotted names, "__" for the dots."""
    made = Experiment(
        name="tiny",
        data=DataSpec(tasks={"text": Task(TEXT)}, layout=LayoutSpec(seq_len=48), batch_size=4),
        model=ModelSpec(decoder=DecoderSpec(width=16, depth=1, attention=MultiHead(heads=2), dropout=0.1)),
        optim=Optim(WarmupCosine(3e-3, warmup=5), accumulate=2, ema=0.9),
        evaluation=EvaluationSpec(tasks={"text": EvalTask(TEXT, limit=8)}, batch_size=8),
        train=TrainSpec(steps=12, evaluate_every=5),
    )
    return replaced(made, {name.replace("__", "."): value for name, value in changes.items()})
