"""12 million parameters: a workstation's size.

    polygpt train experiments/presets/10m.py
    polygpt plan experiments/presets/10m.py --on v5e:2x4

Meant for one GPU, or a v5e-8; experiments/plans says what it takes on a slice of each TPU generation. It begins on
the embedded data: exchange `data` and `tokenizer` for your own corpus, and let `steps` and the learning rate follow
it.
"""

from polygpt.training.experiment import Experiment
from polygpt.training.pretraining import pretraining


def experiment() -> Experiment:
    """The whole run."""
    return pretraining("10m", seq_len=512, batch_size=16, steps=10_000, peak_lr=1e-3)
