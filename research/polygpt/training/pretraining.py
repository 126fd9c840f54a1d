"""The run that a preset is planned and tried with: its model on the embedded data, in long rows and large batches."""

from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.sources.embedded import Embedded
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.models.presets import BYTES, preset
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import WarmupCosine
from polygpt.sharding import MeshSpec
from polygpt.training.experiment import Experiment, TrainSpec


def pretraining(
    name: str, *, seq_len: int, batch_size: int, steps: int, peak_lr: float, mesh: MeshSpec | None = None
) -> Experiment:
    """An experiment with the preset called `name`.

    The data come with the package, so that it runs anywhere; its bytes as tokens fill the table that a subword
    tokenizer needs, so that cost and memory are those of the real thing. Exchange `data` and `tokenizer` for your own.

    Args:
        name: of the preset.
        seq_len: T, positions of a row.
        batch_size: B of the global batch.
        steps: batches.
        peak_lr: the learning rate after warm-up.
        mesh: how devices are arranged; by default that is chosen automatically.
    """
    size = preset(name)
    tasks = {"text": Task(Embedded("text"))}
    if size.tower is not None:
        tasks |= {task: Task(Embedded(task)) for task in ("pictures", "utterances", "fusion")}
    return Experiment(
        name=name,
        model=size.model(),
        tokenizer=Bytes(multiple=1 if size.vocabulary == BYTES else size.vocabulary),
        data=DataSpec(tasks, LayoutSpec(seq_len), batch_size),
        optim=Optim(WarmupCosine(peak_lr, warmup=min(2000, steps // 10))),
        train=TrainSpec(steps, "auto" if mesh is None else "sharded", mesh or MeshSpec()),
    )
