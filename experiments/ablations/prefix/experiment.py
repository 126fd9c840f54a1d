"""Should a picture and the question about it be read both ways, and is there a point in predicting the question?

    polygpt ablate prefix

After PaliGemma (Beyer et al., 2407.07726), section 5.2 and Figure 5, average transfer performance of a 3B model: a
causal mask on the suffix only (image and prefix attend to each other bidirectionally) is clearly best. A causal mask on
the prefix, or on image and prefix, also works but is worse. A loss on the prefix, which a causal mask allows, hurts
further. The figure has no numbers to copy.

Here: a decoder with 0.2M parameters, embedded data, and two kinds of question about an image. A handwritten digit and
`+five=` are followed by the sum in words, so the question determines how to use the image; clip art and `:` are
followed by a caption. The loss is that of answers about held-out images. All variants use the base's learning rate,
because they differ only in masks and loss weights. Expected: the same order, except that the difference between masks
may be too small to detect with prefixes of three or four tokens. On 2 CPU cores it takes about 20 minutes.
"""

from polygpt.ablation.bases import pictures
from polygpt.ablation.claims import Claim
from polygpt.ablation.study import Ablation, Paper

PICTURE_BOTH_WAYS = {"data.layout.media_span": "bidirectional"}
LOSS_ON_PREFIX = {f"data.tasks.{task}.prompt_weight": 1.0 for task in ("digits", "sums", "pictures")}

QUESTIONS = ("sums", "pictures")
EXPECTED = (
    ("suffix", "prefix_suffix", "a causal mask on the suffix only beats one on the prefix too"),
    ("suffix", "all", "and one on picture, prefix and suffix"),
    ("prefix_suffix", "prefix_suffix_loss", "a loss on the prefix hurts"),
    ("all", "all_loss", "also where the picture is read causally"),
)
"""The better variant, the worse, and the words of the claim."""


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
        unit="nats per byte of the answer",
        reads={"question": {question: f"{question}/loss" for question in QUESTIONS}},
        claims=tuple(
            Claim(f"at({better}, question='{question}') < at({worse}, question='{question}')", f"{question}: {words}")
            for question in QUESTIONS
            for better, worse, words in EXPECTED
        ),
    )
