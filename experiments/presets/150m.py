"""150 million parameters: GPT-2 small with image and audio input.

    polygpt train experiments/presets/150m.py
    polygpt plan experiments/presets/150m.py --on v5e:4x4

Meant for 8 GPUs, or a v5e-16; experiments/plans has plans for a slice of each TPU generation. It uses the embedded
data: replace `data` and `tokenizer` with your own corpus, and adapt `steps` and the learning rate to it.
"""

from polygpt.training.experiment import Experiment
from polygpt.training.pretraining import pretraining


def experiment() -> Experiment:
    """The experiment."""
    return pretraining("150m", seq_len=1024, batch_size=256, steps=50_000, peak_lr=6e-4)
