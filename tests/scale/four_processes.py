"""A run of seconds over several processes: packed text, its parameters split over two of them."""

from pathlib import Path

from polygpt.attention.multi_head import MultiHead
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.sources.text_files import TextFiles
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import WarmupCosine
from polygpt.runtime.checkpoint import CheckpointSpec
from polygpt.runtime.processes import ProcessesSpec
from polygpt.sharding import MeshSpec
from polygpt.training.experiment import Experiment, TrainSpec

ROOT = Path(__file__).parents[2]
TASKS = {  # short ones, that begin anew many times
    "make": Task(TextFiles((str(ROOT / "Makefile"),), unit="chunk", bytes=40)),
    "build": Task(TextFiles((str(ROOT / "pyproject.toml"),), unit="chunk", bytes=60), weight=0.5),
}


def experiment() -> Experiment:
    return Experiment(
        name="four",
        data=DataSpec(tasks=TASKS, layout=LayoutSpec(seq_len=64), batch_size=8, log_examples=True),
        model=ModelSpec(decoder=DecoderSpec(width=16, depth=1, attention=MultiHead(heads=2))),
        optim=Optim(WarmupCosine(3e-3, warmup=5)),
        train=TrainSpec(
            steps=70,
            parallel="sharded",
            mesh=MeshSpec(fsdp=2),
            log_every=1,
            checkpoint=CheckpointSpec(every=6),
            processes=ProcessesSpec(heartbeat_timeout=24),
        ),
    )
