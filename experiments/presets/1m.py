"""1.1 million parameters for a laptop: 8 rows of 256 positions.

    polygpt train experiments/presets/1m.py
    polygpt plan experiments/presets/1m.py --on v5e:2x2

Meant for a laptop, or a v5e-4; experiments/plans has plans for a slice of each TPU generation. It uses the embedded
data: replace `data` and `tokenizer` with your own corpus, and adapt `steps` and the learning rate to it.
"""

from polygpt.training.experiment import Experiment
from polygpt.training.pretraining import pretraining


def experiment() -> Experiment:
    """The experiment."""
    return pretraining("1m", seq_len=256, batch_size=8, steps=2_000, peak_lr=2e-3)
