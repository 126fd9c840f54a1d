"""How should a decoder read pictures and recordings: where, in which direction, and through whose projection?

    polygpt ablate fusion

Our own question, no paper's. A picture of one digit and a recording of another, `+` and `=` between and behind them,
are to be summed in words. Compared, everything with everything: media where they are mentioned, or all of them before
the text; media read causally, or each of them both ways (all of them as one where they come first); a projection from
tower to decoder for each modality, or one for both, which then have only a vector of their own. A decoder of 0.2M
parameters, embedded data, one learning rate for all, the base's; the loss is that of sums of held-out pictures and
voices. Expected: nothing in particular, as no paper says; reading a picture both ways ought not to hurt. On 2 CPU cores
it takes about 20 minutes.
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
