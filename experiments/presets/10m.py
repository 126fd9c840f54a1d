"""12 million parameters, for a workstation.

    polygpt train experiments/presets/10m.py
    polygpt plan experiments/presets/10m.py --on v5e:2x4

Meant for one GPU, or a v5e-8; experiments/plans has plans for a slice of each TPU generation. It uses the embedded
data: replace `data` and `tokenizer` with your own corpus, and adapt `steps` and the learning rate to it.
"""

from polygpt.training.experiment import Experiment
from polygpt.training.pretraining import pretraining


def experiment() -> Experiment:
    """The experiment."""
    return pretraining("10m", seq_len=512, batch_size=16, steps=10_000, peak_lr=1e-3)
