"""What does a model that was trained with full attention lose when it sees but a window, and are sinks what it lacks?

    polygpt data fetch state-of-the-union
    polygpt ablate sinks

After Efficient Streaming Language Models with Attention Sinks (Xiao et al., 2309.17453), Table 1: perplexity of
Llama-2-13B, trained without a window, on a book of 65k tokens. With the latest 1,024 tokens only it is 5,158.07; with
the first 4 and the latest 1,020 it is 5.40. The weights of a softmax sum to 1; the model has learned to put weight that
it does not need on the first tokens, and a window drops them.

Here: a small byte-level decoder on speeches, trained with full attention at seq_len 256. The same parameters are then
evaluated with full attention, with a window of 32, and with 4 sinks and a window of 28; one training run serves all
three. Only the last 128 bytes of each piece count, where the sinks are outside the window. Each piece has its own row,
whose first position is the token that begins a text. Expected: the window is worse than full attention, and sinks
recover a part of the difference. The model may, however, be too small or too briefly trained to have learned to use its
first position as a sink. On 2 CPU cores it takes under 10 minutes.
"""

from polygpt.ablation.bases import text
from polygpt.ablation.claims import Claim
from polygpt.ablation.study import Ablation, Paper
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.sinks import SinksAndWindow
from polygpt.attention.sliding import SlidingWindow
from polygpt.overrides import replaced
from polygpt.training.experiment import Experiment

LENGTH, HEADS = 256, 4
KEYS, SINKS = 32, 4
"""How many keys a query sees beside full attention, and how many of them may be the first."""
LAST = 128
"""Bytes of each piece that count."""
SEEN = {
    "full": {},
    "window": {"decoder.attention": SlidingWindow(heads=HEADS, window=KEYS)},
    "sinks": {"decoder.attention": SinksAndWindow(heads=HEADS, sinks=SINKS, window=KEYS - SINKS)},
}
"""By what a query sees, the changes of the model that was trained."""


def base() -> Experiment:
    """The experiment, with a held-out task for each way to read the same pieces."""
    made = text("sinks", seq_len=LENGTH, attention=MultiHead(heads=HEADS), peak_lr=4e-3, steps=600)
    pieces = made.evaluation.tasks["text"].replace(last=LAST)
    tasks = {seen: pieces.replace(model=changes) for seen, changes in SEEN.items()}
    return replaced(made, {"data.layout.packing": False, "evaluation.tasks": tasks})


def ablation() -> Ablation:
    """The question."""
    return Ablation(
        question="Do the first tokens save a model trained with full attention when it sees but a window?",
        base=base(),
        variants={"model": {}},
        paper=Paper(
            title="Efficient Streaming Language Models with Attention Sinks",
            reference="2309.17453",
            where="Table 1",
            evidence="V",
            unit="perplexity",
            setting="Llama-2-13B on 65k tokens of a book: window of 1,024 5158.07, 4 sinks + window of 1,020 5.40",
        ),
        metric="full/loss",
        unit="nats per byte",
        reads={"seen": {seen: f"{seen}/loss" for seen in SEEN}},
        claims=(
            Claim("at(model, seen='full') < at(model, seen='window')", "a window loses against full attention"),
            Claim("at(model, seen='sinks') < at(model, seen='window')", "sinks beat a window that sees as many keys"),
            Claim(
                "at(model, seen='window') - at(model, seen='sinks') > at(model, seen='sinks') - at(model, seen='full')",
                "sinks make good more than half of what the window loses",
            ),
        ),
    )
