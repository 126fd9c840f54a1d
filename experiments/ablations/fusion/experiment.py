"""How should a decoder read pictures and recordings: where, in which direction, and through whose projection?

    polygpt ablate fusion

This question is not from a paper. The model sees an image of one digit and a recording of another, with `+` between and
`=` after them, and writes the sum in words. It compares all combinations of three choices: media in place or all media
before the text; causal or bidirectional attention within each item (within all media together if they come first); and
one projection from tower to decoder per modality, or a shared one with only an embedding vector per modality. A decoder
with 0.2M parameters, embedded data, and the base's learning rate for all variants; the loss is that of the sums for
held-out images and voices. Expected: nothing in particular, since there is no paper; bidirectional attention within an
image should not hurt. On 2 CPU cores it takes about 20 minutes.
"""

from polygpt.ablation.bases import see_and_hear
from polygpt.ablation.claims import Claim
from polygpt.ablation.study import Ablation
from polygpt.ablation.variants import product
from polygpt.adapters.base import Connector, SharedConnector

WIDTH = 64
ORDER = {"interleaved": {}, "first": {"data.layout.fusion": "prefix"}}
SPAN = {"causal": {}, "bidirectional": {"data.layout.media_span": "bidirectional"}}
PROJECTION = {
    "own": {},
    "shared": {
        "model.connector": SharedConnector(width=WIDTH),
        "model.adapters.image.connector": Connector("none"),
        "model.adapters.audio.connector": Connector("none"),
    },
}
VARIANTS = product(ORDER, SPAN, PROJECTION)


def mean(word: str) -> str:
    """The mean over all variants of which a part is called so, as claims say it."""
    return f"mean({', '.join(name.replace(' + ', '_') for name in VARIANTS if word in name.split(' + '))})"


def ablation() -> Ablation:
    """The question."""
    return Ablation(
        question="Media in place or first, causal or both ways, one projection each or one for all: what adds up best?",
        base=see_and_hear("fusion", width=WIDTH),
        variants={name.replace(" + ", "_"): changes for name, changes in VARIANTS.items()},
        metric="fusion/loss",
        unit="nats per byte of the answer",
        claims=(
            Claim(f"{mean('bidirectional')} < {mean('causal')}", "media read both ways help"),
            Claim(f"{mean('first')} < {mean('interleaved')}", "media before all text help"),
            Claim(f"{mean('own')} < {mean('shared')}", "a projection for each modality helps"),
        ),
    )
