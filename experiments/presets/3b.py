"""3.3 billion parameters.

    polygpt train experiments/presets/3b.py
    polygpt plan experiments/presets/3b.py --on v5e:8x16

Meant for a v5e-128; experiments/plans has plans for a slice of each TPU generation. It uses the embedded data: replace
`data` and `tokenizer` with your own corpus, and adapt `steps` and the learning rate to it.
"""

from polygpt.sharding import MeshSpec
from polygpt.training.experiment import Experiment
from polygpt.training.pretraining import pretraining


def experiment() -> Experiment:
    """The experiment."""
    return pretraining("3b", seq_len=2048, batch_size=512, steps=200_000, peak_lr=3e-4, mesh=MeshSpec(data=1, fsdp=-1))
