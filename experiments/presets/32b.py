"""32 billion parameters, text only.

    polygpt train experiments/presets/32b.py
    polygpt plan experiments/presets/32b.py --on v5e:16x16 --search

Meant for a v5e-256 or a v5p-128; experiments/plans has plans for a slice of each TPU generation. It uses the embedded
data: replace `data` and `tokenizer` with your own corpus, and adapt `steps` and the learning rate to it.
"""

from polygpt.sharding import MeshSpec
from polygpt.training.experiment import Experiment
from polygpt.training.pretraining import pretraining


def experiment() -> Experiment:
    """The experiment."""
    return pretraining(
        "32b", seq_len=2048, batch_size=1024, steps=200_000, peak_lr=1.5e-4, mesh=MeshSpec(data=1, fsdp=-1)
    )
