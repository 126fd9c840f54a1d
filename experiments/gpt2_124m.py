"""GPT-2 small, 124 million parameters, text only: a benchmark of the training step on accelerators.

    polygpt train experiments/gpt2_124m.py                           (uses the available devices)
    polygpt train experiments/gpt2_124m.py --train.parallel pmap     (or sharded, with --train.mesh.fsdp 8)

Radford et al., Language Models are Unsupervised Multitask Learners, table 2, with seq_len 1,024. It trains on the bytes
of the embedded text with an embedding table of GPT-2's size, so that a step costs as much as GPT-2's; the loss is not
meaningful. tokens_per_second is in runs/gpt2_124m/timing.jsonl. Meant for one GPU with at least 24 GB: 200 steps take
a few minutes there, and days on a CPU.
"""

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
from polygpt.optim.schedules import WarmupCosine
from polygpt.training.experiment import Experiment, TrainSpec


def experiment() -> Experiment:
    """The experiment."""
    attention = MultiHead(heads=12, bias=True)
    decoder = DecoderSpec(768, 12, attention, mlp=MLP(), norm=LayerNorm(), position=Learned(1024))
    return Experiment(
        name="gpt2_124m",
        model=ModelSpec(decoder, dtype="bfloat16"),
        tokenizer=Bytes(multiple=50_304),
        data=DataSpec({"text": Task(Embedded("text", characters=900))}, LayoutSpec(1024), batch_size=32),
        optim=Optim(WarmupCosine(6e-4, warmup=20)),
        train=TrainSpec(steps=200, parallel="auto"),
    )
