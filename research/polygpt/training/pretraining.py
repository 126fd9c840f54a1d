"""The experiment used to plan and try a preset: its model on the embedded data, with long sequences and large
batches."""

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

    The data come with the package, so it runs anywhere. The byte vocabulary is padded to the size of a subword
    vocabulary, so cost and memory are realistic. Replace `data` and `tokenizer` with your own.

    Args:
        name: name of the preset.
        seq_len: T, positions per row.
        batch_size: B, of the global batch.
        steps: number of training steps.
        peak_lr: learning rate after warm-up.
        mesh: how devices are arranged; default: chosen automatically.
    """
    size = preset(name)
    # What fits the rows and the recordings of the smallest preset.
    tasks = {"text": Task(Embedded("text", characters=min(256, seq_len // 2)))}
    if size.tower is not None:
        media = ("pictures", "utterances", "fusion")
        tasks |= {task: Task(Embedded(task, seconds=min(3.0, size.seconds))) for task in media}
    return Experiment(
        name=name,
        model=size.model(),
        tokenizer=Bytes(multiple=1 if size.vocabulary == BYTES else size.vocabulary),
        data=DataSpec(tasks, LayoutSpec(seq_len), batch_size),
        optim=Optim(WarmupCosine(peak_lr, warmup=min(2000, steps // 10))),
        train=TrainSpec(steps, "auto" if mesh is None else "sharded", mesh or MeshSpec()),
    )
