"""1.1 billion parameters.

    polygpt train experiments/presets/1b.py
    polygpt plan experiments/presets/1b.py --on v5e:8x8

Meant for a v5e-64; experiments/plans has plans for a slice of each TPU generation. It uses the embedded data: replace
`data` and `tokenizer` with your own corpus, and adapt `steps` and the learning rate to it.
"""

from polygpt.sharding import MeshSpec
from polygpt.training.experiment import Experiment
from polygpt.training.pretraining import pretraining


def experiment() -> Experiment:
    """The experiment."""
    return pretraining("1b", seq_len=2048, batch_size=256, steps=100_000, peak_lr=3e-4, mesh=MeshSpec(data=1, fsdp=-1))
