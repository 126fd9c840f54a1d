"""Small experiments that ablations change: each trains within a minute on a core."""

import math
from typing import Any

from polygpt.attention.multi_head import MultiHead
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.sources.corpus import Corpus
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.optim.optim import Optim
from polygpt.optim.optimizers import AdamW
from polygpt.optim.schedules import WarmupCosine
from polygpt.training.experiment import Experiment, TrainSpec

UNIFORM = math.log(Bytes().build().vocabulary)
"""Nats a byte of what learned nothing, for which all bytes are equally likely: what may count as that of a run that
diverged."""


def text(
    name: str,
    *,
    steps: int = 600,
    length: int = 128,
    rows: int = 16,
    width: int = 96,
    depth: int = 3,
    peak: float = 3e-3,
    held_out: int = 400,
    **decoder: Any,
) -> Experiment:
    """A GPT that reads speeches byte by byte: `polygpt data fetch state-of-the-union` gets them first.

    Args:
        name: of the experiment.
        steps: batches.
        length: T.
        rows: B.
        width: D.
        depth: L.
        peak: of the learning rate, which rises for a tenth of the steps and falls to a tenth.
        held_out: pieces of held-out speeches that are evaluated.
        decoder: further fields of the decoder; attention has heads of 32 channels unless it says otherwise.
    """
    fields = {"attention": MultiHead(heads=max(1, width // 32)), "scan": False} | decoder
    corpus = {"name": "state-of-the-union", "characters": length - 2}
    return Experiment(
        name=name,
        data=DataSpec({"text": Task(Corpus(**corpus))}, LayoutSpec(length), rows),
        model=ModelSpec(DecoderSpec(width, depth, **fields)),
        optim=Optim(WarmupCosine(peak, warmup=steps // 10), AdamW(weight_decay=0.1, beta2=0.98)),
        train=TrainSpec(steps),
        evaluation=EvaluationSpec({"text": EvalTask(Corpus(split="test", **corpus), limit=held_out)}),
    )
