"""Do QK-norm and the z-loss widen the range of learning rates that work?

    polygpt data fetch state-of-the-union
    polygpt ablate qk_norm --engine processes

After Small-scale Proxies for Large-scale Transformer Training Instabilities (Wortsman et al., 2309.14322), sections
3.1.1 and 3.1.2: the instabilities of large models also occur in small models at high learning rates. The paper measures
the learning rate sensitivity: the mean over a range of learning rates of the loss minus the loss at the best learning
rate, where a diverged run counts as one that learned nothing. QK-norm bounds the attention logits and lowers the
sensitivity; the z-loss keeps the output logits from drifting. The paper: 10M to 1.2B parameters on C4. Here: a
byte-level decoder with 0.1M parameters on speeches, without weight decay, which would scale with the learning rate and
dampen the instabilities. Expected: the same order at the highest learning rates. On 2 CPU cores it takes 22 minutes.
"""

from polygpt.ablation.bases import UNIFORM, text
from polygpt.ablation.claims import Claim
from polygpt.ablation.study import Ablation, Paper
from polygpt.ablation.variants import grid
from polygpt.attention.multi_head import MultiHead
from polygpt.nn.norms import LayerNorm
from polygpt.objectives.z_loss import ZLoss
from polygpt.overrides import replaced

SENSITIVITY = "mean({0}, over=rate) - best({0}, over=rate)".format
"""Section 2.2 of the paper."""


def ablation() -> Ablation:
    """The question."""
    base = text("qk_norm", steps=300, attention=MultiHead(heads=4))
    normed = {"model.decoder.attention.qk_norm": LayerNorm()}
    z_loss = {"objectives.z_loss": (ZLoss(), 1e-4)}
    return Ablation(
        question="Do QK-norm and the z-loss widen the range of learning rates that work?",
        base=replaced(base, {"optim.optimizer.weight_decay": 0.0}),
        variants={"plain": {}, "qk_norm": normed, "z_loss": z_loss, "both": normed | z_loss},
        paper=Paper(
            title="Small-scale Proxies for Large-scale Transformer Training Instabilities",
            reference="2309.14322",
            where="sections 2.2, 3.1.1 and 3.1.2",
            evidence="A",
            setting="10M to 1.2B parameters on C4",
        ),
        unit="nats per byte",
        over={"rate": grid("optim.schedule.peak_lr", 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)},
        claims=(
            Claim(f"{SENSITIVITY('qk_norm')} < {SENSITIVITY('plain')}", "QK-norm lowers the sensitivity to the rate"),
            Claim("at(qk_norm, rate=0.1) < at(plain, rate=0.1)", "QK-norm helps at ten times a good rate"),
            Claim(f"{SENSITIVITY('both')} < {SENSITIVITY('qk_norm')}", "the z-loss lowers it further"),
            Claim(
                "best(qk_norm, over=rate) - best(plain, over=rate) < noise", "at its best rate QK-norm costs nothing"
            ),
        ),
        noise=0.05,
        diverged=UNIFORM,
    )
