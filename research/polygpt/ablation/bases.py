"""Small base experiments for ablations: each trains in about a minute on one core."""

import math
from collections.abc import Mapping
from typing import Any

from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.base import Adapter
from polygpt.adapters.image import ImageAdapter
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.stack import StackSpec
from polygpt.data.augment import RandomShift, SpecAugment, Speed
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.media.audio import LogMel
from polygpt.data.media.image import ImageFeatures
from polygpt.data.sources.corpus import Corpus
from polygpt.data.sources.embedded import Embedded
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.optim.optim import Optim
from polygpt.optim.optimizers import AdamW
from polygpt.optim.schedules import WarmupCosine
from polygpt.training.experiment import Experiment, TrainSpec

UNIFORM = math.log(Bytes().build().vocabulary)
"""Nats per byte of a uniform distribution over bytes: a sensible loss to assign to a diverged run."""


def text(
    name: str,
    *,
    steps: int = 500,
    seq_len: int = 128,
    batch_size: int = 8,
    width: int = 64,
    depth: int = 2,
    peak_lr: float = 4e-3,
    held_out: int = 400,
    **decoder: Any,
) -> Experiment:
    """A byte-level GPT trained on speeches; run `polygpt data fetch state-of-the-union` first.

    Args:
        name: name of the experiment.
        steps: number of training steps.
        seq_len: T.
        batch_size: B.
        width: D.
        depth: L.
        peak_lr: peak learning rate; warm-up takes a tenth of the steps, decay ends at a tenth of the peak.
        held_out: number of held-out pieces for evaluation.
        decoder: further fields of the decoder; by default attention heads have 32 channels.
    """
    corpus = {"name": "state-of-the-union", "characters": seq_len - 2}
    return _experiment(
        name,
        ModelSpec(_decoder(width, depth, decoder)),
        DataSpec({"text": Task(Corpus(**corpus))}, LayoutSpec(seq_len), batch_size),
        {"text": EvalTask(Corpus(split="test", **corpus), limit=held_out)},
        AdamW(weight_decay=0.1, beta2=0.98),
        steps,
        peak_lr,
    )


def pictures(name: str, *, width: int = 64, held_out: int = 400, **fields: Any) -> Experiment:
    """A GPT that names digits ("digits") and clip art ("pictures"), and adds spoken-out numbers to digits ("sums").
    Uses embedded data. In "sums", answers depend on the picture and the prompt. `held_out` is the number of sums for
    evaluation, with unseen pictures. Other fields as in `text`; defaults here are 600 steps, T = 96 and L = 3.
    """
    shift = (RandomShift(),)
    tasks = {
        "digits": Task(Embedded("digits"), weight=1, augment=shift),
        "sums": Task(Embedded("sums"), weight=3, augment=shift),
        "pictures": Task(Embedded("pictures"), weight=1, augment=shift),
    }
    evaluated = {
        "digits": EvalTask(Embedded("digits", "test")),
        "sums": EvalTask(Embedded("sums", "test", examples=held_out)),
        "pictures": EvalTask(Embedded("pictures", "test")),
    }
    adapters = {"image": _eyes(width, items=6, side=16)}
    return _with_media(name, width, adapters, tasks, evaluated, **{"steps": 600} | fields)


def see_and_hear(name: str, *, width: int = 64, held_out: int = 400, **fields: Any) -> Experiment:
    """A GPT that names digits it sees ("digits") or hears ("speech"), and adds one of each ("fusion"). Uses embedded
    data. Both adapters' towers have the decoder's width. `held_out` is the number of sums for evaluation, with unseen
    pictures and voices. Other fields as in `text`; defaults here are 600 steps, T = 96 and L = 3.
    """
    ears = LogMel(seconds=1.0, rate=8000, mels=40, window=256, hop=160)
    audio = AudioAdapter(ears, items=5, fold=2, tower=_tower(width // 2))
    shift = RandomShift()
    heard = (Speed(), SpecAugment(frequency_masks=1, frequency_width=6, time_masks=1, time_width=5))
    tasks = {
        "digits": Task(Embedded("digits"), weight=1, augment=(shift,)),
        "speech": Task(Embedded("speech"), weight=1, augment=heard),
        "fusion": Task(Embedded("fusion"), weight=3, augment=(shift, *heard)),
    }
    evaluated = {
        "digits": EvalTask(Embedded("digits", "test")),
        "speech": EvalTask(Embedded("speech", "test")),
        "fusion": EvalTask(Embedded("fusion", "test", examples=held_out)),
    }
    adapters = {"image": _eyes(width, items=5), "audio": audio}
    return _with_media(name, width, adapters, tasks, evaluated, **{"steps": 600} | fields)


def _with_media(
    name: str,
    width: int,
    adapters: Mapping[str, Adapter],
    tasks: Mapping[str, Task],
    evaluated: Mapping[str, EvalTask],
    *,
    steps: int,
    seq_len: int = 96,
    batch_size: int = 8,
    depth: int = 3,
    peak_lr: float = 4e-3,
    **decoder: Any,
) -> Experiment:
    model = ModelSpec(_decoder(width, depth, decoder), adapters)
    data = DataSpec(tasks, LayoutSpec(seq_len), batch_size)
    return _experiment(name, model, data, evaluated, AdamW(weight_decay=0.05, beta2=0.98), steps, peak_lr)


def _experiment(
    name: str,
    model: ModelSpec,
    data: DataSpec,
    tasks: Mapping[str, EvalTask],
    optimizer: AdamW,
    steps: int,
    peak_lr: float,
) -> Experiment:
    return Experiment(
        name=name,
        data=data,
        model=model,
        optim=Optim(WarmupCosine(peak_lr, warmup=steps // 10), optimizer),
        train=TrainSpec(steps),
        evaluation=EvaluationSpec(tasks, modality_gain=False),
    )


def _decoder(width: int, depth: int, fields: Mapping[str, Any]) -> DecoderSpec:
    return DecoderSpec(width, depth, **{"attention": MultiHead(heads=max(1, width // 32)), "scan": False} | fields)


def _tower(width: int) -> StackSpec:
    return StackSpec(width, depth=1, attention=MultiHead(heads=max(1, width // 32), bias=True), scan=False)


def _eyes(width: int, items: int, side: int = 8) -> Adapter:
    """A picture of `side` x `side` pixels fills 4 positions: with fewer, a decoder learns sooner to look. Digits are 8
    x 8."""
    return ImageAdapter(ImageFeatures(side, side, channels=1), items=items, patch=side // 2, tower=_tower(width))
