"""150 million parameters: GPT-2's small size with eyes and ears.

    polygpt train experiments/presets/150m.py
    polygpt plan experiments/presets/150m.py --on v5e:4x4

Meant for 8 GPUs, or a v5e-16; experiments/plans says what it takes on a slice of each TPU generation. It begins on
the embedded data: exchange `data` and `tokenizer` for your own corpus, and let `steps` and the learning rate follow
it.
"""

from polygpt.training.experiment import Experiment
from polygpt.training.pretraining import pretraining


def experiment() -> Experiment:
    """The whole run."""
    return pretraining("150m", seq_len=1024, batch_size=256, steps=50_000, peak_lr=6e-4)
