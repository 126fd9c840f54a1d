"""Does post-norm need a warm-up of the learning rate, and pre-norm none?

    polygpt data fetch state-of-the-union
    polygpt ablate norm_placement --engine processes

After On Layer Normalization in the Transformer Architecture (Xiong et al., 2002.04745), section 3: at initialisation
the gradients of a post-norm transformer are large near its output, so without warm-up it fails at the learning rates
that it needs. A pre-norm transformer without warm-up trains as well as a post-norm one with it. The paper: machine
translation and BERT. Here: a narrow byte-level decoder with 8 blocks in the paper's form (LayerNorm, ReLU) on speeches,
at several learning rates, with AdamW and without gradient clipping. Expected: the same order. On 2 CPU cores it takes
17 minutes.
"""

from polygpt.ablation.bases import UNIFORM, text
from polygpt.ablation.claims import Claim
from polygpt.ablation.study import Ablation, Paper
from polygpt.ablation.variants import grid
from polygpt.attention.multi_head import MultiHead
from polygpt.nn.mlp import MLP
from polygpt.nn.norms import LayerNorm
from polygpt.overrides import replaced

BLOCKS = {"attention": MultiHead(heads=3), "norm": LayerNorm(), "mlp": MLP(activation="relu")}


def ablation() -> Ablation:
    """The question."""
    base = text("norm_placement", steps=300, seq_len=64, width=48, depth=8, scan=True, **BLOCKS)
    post, at_once = {"model.decoder.norm_placement": "post"}, {"optim.schedule.warmup": 0}
    return Ablation(
        question="Does a post-norm transformer need a warm-up of the learning rate, and a pre-norm one none?",
        base=replaced(base, {"optim.schedule.warmup": 75, "optim.clip": None}),
        variants={"pre": {}, "pre_no_warmup": at_once, "post": post, "post_no_warmup": post | at_once},
        paper=Paper(
            title="On Layer Normalization in the Transformer Architecture",
            reference="2002.04745",
            where="section 3 and Figure 2",
            evidence="M",
            setting="IWSLT14 German to English by Adam at 5e-4 and 1e-3, and BERT",
        ),
        unit="nats per byte",
        over={"rate": grid("optim.schedule.peak_lr", 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)},
        claims=(
            Claim("best(post, over=rate) < best(post_no_warmup, over=rate)", "post-norm needs a warm-up"),
            Claim(
                "best(pre_no_warmup, over=rate) < best(post_no_warmup, over=rate)",
                "without a warm-up pre-norm is the better one",
            ),
            Claim(
                "best(pre_no_warmup, over=rate) - best(pre, over=rate) < noise",
                "pre-norm trains without a warm-up as well as with it",
            ),
            Claim(
                "best(pre_no_warmup, over=rate) - best(post, over=rate) < noise",
                "pre-norm trains without a warm-up as well as post-norm with it",
            ),
        ),
        noise=0.05,
        diverged=UNIFORM,
    )
