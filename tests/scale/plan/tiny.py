"""The smallest model that uses what a large one does: a scanned decoder, a fused kernel, a mesh of two axes.

polygpt plan tests/scale/plan/tiny.py --on v5e:2x2
"""

from polygpt.attention.multi_head import MultiHead
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.sources.embedded import Embedded
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import WarmupCosine
from polygpt.sharding import MeshSpec
from polygpt.training.experiment import Experiment, TrainSpec


def experiment() -> Experiment:
    """The whole run."""
    return Experiment(
        name="tiny",
        data=DataSpec({"text": Task(Embedded("text"))}, LayoutSpec(seq_len=512), batch_size=8),
        optim=Optim(WarmupCosine(peak_lr=1e-3, warmup=10)),
        train=TrainSpec(steps=10, parallel="sharded", mesh=MeshSpec(data=1, fsdp=-1, tensor=2)),
        model=ModelSpec(DecoderSpec(256, 2, MultiHead(heads=2)), dtype="bfloat16"),
    )
