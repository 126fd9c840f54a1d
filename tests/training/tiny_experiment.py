"""A run of seconds that has everything in it: packing, dropout, accumulation, a moving average, evaluations."""

from pathlib import Path

from polygpt.attention.multi_head import MultiHead
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.sources.text_files import TextFiles
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import WarmupCosine
from polygpt.runtime.checkpoint import CheckpointSpec
from polygpt.training.experiment import Experiment, TrainSpec

TEXT = TextFiles((str(Path(__file__).parents[2] / "LICENSE"),), unit="chunk", bytes=40)


def experiment() -> Experiment:
    return Experiment(
        name="tiny",
        data=DataSpec(tasks={"text": Task(TEXT)}, layout=LayoutSpec(seq_len=64), batch_size=4),
        model=ModelSpec(decoder=DecoderSpec(width=16, depth=1, attention=MultiHead(heads=2), dropout=0.1)),
        optim=Optim(WarmupCosine(3e-3, warmup=5), accumulate=2, ema=0.9),
        evaluation=EvaluationSpec(tasks={"text": EvalTask(TEXT, limit=8)}, batch_size=8),
        train=TrainSpec(steps=60, log_every=3, evaluate_every=20, checkpoint=CheckpointSpec(every=7)),
    )
