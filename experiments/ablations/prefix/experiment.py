"""Should a picture and the question about it be read both ways, and is there a point in predicting the question?

    polygpt ablate prefix

After PaliGemma (Beyer et al., 2407.07726), section 5.2 and Figure 5, average transfer performance of a 3B model: with
the autoregressive mask on the suffix alone (picture and prefix see all of each other) it is clearly best; a mask on the
prefix too, and one on the picture as well, work and are worse; a loss on the prefix, which an autoregressive mask
allows, reduces it further. The figure gives no numbers to copy. Here: a decoder of 0.2M parameters, embedded data: a
handwritten digit, `+five=`, and the sum in words, so that the question decides what is to be made of the picture; the
loss is that of answers about held-out pictures.
"""

from polygpt.ablation.bases import pictures
from polygpt.ablation.claims import Claim
from polygpt.ablation.study import Ablation, Paper

PICTURE_BOTH_WAYS = {"data.layout.media_span": "bidirectional"}
LOSS_ON_PREFIX = {f"data.tasks.{task}.prompt_weight": 1.0 for task in ("digits", "sums")}


def ablation() -> Ablation:
    """The question."""
    return Ablation(
        question="Is the answer better if picture and prefix see all of each other, or if the prefix is predicted too?",
        base=pictures("prefix"),
        variants={
            "suffix": {"data.layout.prompt_span": "bidirectional"},
            "prefix_suffix": PICTURE_BOTH_WAYS,
            "all": {},
            "prefix_suffix_loss": PICTURE_BOTH_WAYS | LOSS_ON_PREFIX,
            "all_loss": LOSS_ON_PREFIX,
        },
        paper=Paper(
            title="PaliGemma: A versatile 3B VLM for transfer",
            reference="2407.07726",
            where="section 5.2, Figure 5",
            evidence="V",
            setting="3B parameters, 100M examples of pretraining, transfers; a figure without numbers",
        ),
        metric="sums/loss",
        unit="nats a byte of the answer",
        claims=(
            Claim("suffix < prefix_suffix", "a causal mask on the suffix only beats one on the prefix too"),
            Claim("suffix < all", "and one on picture, prefix and suffix"),
            Claim("prefix_suffix < prefix_suffix_loss", "a loss on the prefix hurts"),
            Claim("all < all_loss", "also where the picture is read causally"),
        ),
    )
