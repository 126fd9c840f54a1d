"""How much does a language model gain from being told positions, and by which encoding?

    polygpt data fetch state-of-the-union
    polygpt ablate positions --engine processes

After Transformer Language Models without Positional Encodings Still Learn Positional Information (Haviv et al.,
2203.16634), Table 1: perplexity of a 1.3B-parameter model on WikiText-103 and on the Pile. In the paper, no encoding is
almost as good as learned positions, which are worse than sinusoidal positions, which are worse than ALiBi; perplexity
differs by up to 0.9 between seeds. Here: a byte-level decoder with 0.1M parameters on speeches, evaluated at its
training length; the learning rate is tuned for each encoding. Rotary positions, which the paper does not include, are
added. Expected: the same order. On 2 CPU cores it takes under 30 minutes.
"""

from math import log

from polygpt.ablation.bases import text
from polygpt.ablation.claims import Claim
from polygpt.ablation.study import Ablation, Paper
from polygpt.ablation.variants import grid
from polygpt.attention.biases import ALiBi
from polygpt.nn.positions import Learned, NoPosition, Rope, Sinusoidal

LENGTH = 128
PERPLEXITIES = {"none": 13.10, "learned": 13.05, "sinusoidal": 12.93, "alibi": 12.51}
"""The paper's."""


def ablation() -> Ablation:
    """The question."""
    encodings = {
        "none": NoPosition(),
        "learned": Learned(LENGTH),
        "sinusoidal": Sinusoidal(),
        "alibi": ALiBi(),
        "rope": Rope(),
    }
    return Ablation(
        question="Which position encoding gives the lowest loss at the length it was trained at?",
        base=text("positions", seq_len=LENGTH),
        variants={name: {"model.decoder.position": encoding} for name, encoding in encodings.items()},
        paper=Paper(
            title="Transformer Language Models without Positional Encodings Still Learn Positional Information",
            reference="2203.16634",
            where="Table 1",
            evidence="V",
            unit="log-perplexity",
            setting="1.3B parameters on the Pile (perplexities 13.10, 13.05, 12.93, 12.51)",
            figures={name: round(log(perplexity), 3) for name, perplexity in PERPLEXITIES.items()},
        ),
        unit="nats per byte",
        tuned=grid("optim.schedule.peak_lr", 2e-3, 4e-3, 8e-3, 1.6e-2),
        tuning_seeds=3,
        claims=(
            Claim("alibi < sinusoidal", "ALiBi below sinusoids"),
            Claim("sinusoidal < learned", "sinusoids below learned positions"),
            Claim("learned < none", "learned positions below none"),
            Claim("alibi < none", "ALiBi below none"),
        ),
    )
