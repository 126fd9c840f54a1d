"""Do gates help the feed-forward layer, and does it matter which activation the gate has?

    polygpt data fetch state-of-the-union
    polygpt ablate glu --engine processes

After GLU Variants Improve Transformer (Shazeer, 2002.05202), Table 1: layers with equal parameter counts (gated ones
have two thirds of the hidden width), log-perplexity of T5 on span filling on C4. In the paper, all gated variants beat
the ungated ones; GEGLU and SwiGLU are best and practically equal (the standard deviation over seeds was 0.010 at 65k
steps). Here: a byte-level decoder with 0.1M parameters on speeches; the learning rate is tuned for each variant.
Expected: the same order between gated and ungated. On 2 CPU cores it takes 16 minutes.
"""

from polygpt.ablation.bases import text
from polygpt.ablation.claims import Claim
from polygpt.ablation.study import Ablation, Paper
from polygpt.ablation.variants import grid
from polygpt.nn.mlp import MLP, GatedMLP

MLPS = {
    "relu": MLP(activation="relu", bias=False),
    "gelu": MLP(activation="gelu", bias=False),
    "swish": MLP(activation="silu", bias=False),
    "glu": GatedMLP(activation="sigmoid"),
    "bilinear": GatedMLP(activation="identity"),
    "reglu": GatedMLP(activation="relu"),
    "swiglu": GatedMLP(activation="silu"),
    "geglu": GatedMLP(activation="gelu"),
}


def ablation() -> Ablation:
    """The question."""
    return Ablation(
        question="Do gated feed-forward layers beat ungated ones of as many parameters?",
        base=text("glu"),
        variants={name: {"model.decoder.mlp": mlp} for name, mlp in MLPS.items()},
        paper=Paper(
            title="GLU Variants Improve Transformer",
            reference="2002.05202",
            where="Table 1",
            evidence="V",
            unit="log-perplexity",
            setting="T5 base on C4, 524k steps, d_ff of gated forms times 2/3",
            figures={
                "relu": 1.677, "gelu": 1.679, "swish": 1.683, "glu": 1.663, "bilinear": 1.648, "reglu": 1.645,
                "swiglu": 1.636, "geglu": 1.633,
            },
        ),
        unit="nats per byte",
        tuned=grid("optim.schedule.peak_lr", 2e-3, 4e-3, 8e-3, 1.6e-2),
        claims=(
            Claim("mean(glu, bilinear, reglu, swiglu, geglu) < mean(relu, gelu, swish)", "gated below ungated"),
            Claim("reglu < relu", "a gate helps ReLU"),
            Claim("geglu < gelu", "a gate helps GELU"),
            Claim("swiglu < swish", "a gate helps Swish"),
            Claim("abs(geglu - swiglu) < noise", "GEGLU and SwiGLU are equal, to the paper's spread over seeds"),
        ),
        noise=0.010,
    )  # fmt: skip
