"""Does the best learning rate of a narrow model hold for a wide one under muP?

    polygpt data fetch state-of-the-union
    polygpt ablate mup --engine processes

After Tensor Programs V (Yang et al., 2203.03466), Figure 1: in the standard parametrization the best learning rate of
Adam decreases with the width of a transformer; under muP it stays constant, and wider models are better at every
learning rate. The paper: widths of 128 to 8,192 on WikiText-2. Here: byte-level decoders of width 32 to 128 with heads
of width 16 on speeches; neighbouring learning rates differ by a factor of 2. Expected: the same, with as much drift as
a fourfold width can show. On 2 CPU cores it takes 26 minutes. It uses eight seeds, because the best learning rate is a
point on a grid and is compared by a sign test.
"""

from polygpt.ablation.bases import UNIFORM, text
from polygpt.ablation.claims import Claim
from polygpt.ablation.study import Ablation, Paper
from polygpt.ablation.variants import grid, zipped
from polygpt.attention.multi_head import MultiHead
from polygpt.optim.mup import MuP

WIDTHS, HEAD = (32, 64, 128), 16


def ablation() -> Ablation:
    """The question."""
    heads = [width // HEAD for width in WIDTHS]
    base = text(
        "mup", steps=300, seq_len=64, batch_size=8, width=WIDTHS[0], depth=2, attention=MultiHead(heads=heads[0])
    )
    mup = MuP({"decoder.width": WIDTHS[0], "decoder.attention.heads": heads[0]})
    return Ablation(
        question="Does the best learning rate stay where it is, under muP, when a model grows wider?",
        base=base,
        variants={"standard": {}, "mup": {"model.mup": mup}},
        paper=Paper(
            title="Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer",
            reference="2203.03466",
            where="Figure 1",
            evidence="M",
            setting="transformers of 128 to 8,192 channels on WikiText-2, by Adam",
        ),
        unit="nats per byte",
        over={
            "width": zipped(grid("model.decoder.width", *WIDTHS), grid("model.decoder.attention.heads", *heads)),
            "rate": grid("optim.schedule.peak_lr", 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1),
        },
        claims=(
            Claim("constant(argmin(mup, over=rate), over=width)", "under muP the best rate is the same at all widths"),
            Claim(
                "argmin(at(standard, width=128), over=rate) < argmin(at(standard, width=32), over=rate)",
                "without, it falls with the width",
            ),
            Claim(
                "at(mup, width=128, rate=0.064) < at(mup, width=32, rate=0.064)",
                "under muP wider is better, at a high rate too",
            ),
            Claim(
                "at(mup, width=128, rate=0.064) < at(standard, width=128, rate=0.064)",
                "a wide model bears a narrow one's high rate under muP alone",
            ),
        ),
        diverged=UNIFORM,
        seeds=8,
    )
