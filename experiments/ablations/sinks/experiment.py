"""What does a model that was trained with full attention lose when it sees but a window, and are sinks what it lacks?

    polygpt data fetch state-of-the-union
    polygpt ablate sinks

After Efficient Streaming Language Models with Attention Sinks (Xiao et al., 2309.17453), Table 1: perplexity of
Llama-2-13B on a book of 65k tokens, never trained for a window. With the nearest 1,024 tokens alone it is 5,158.07;
with the first 4 and the nearest 1,020 it is 5.40: a softmax must give its weight to something, the model has learned to
give what it does not need to the first tokens, and a window loses them.

Here: a small decoder on speeches, byte by byte, trained with full attention on rows of 256 bytes. Its parameters are
then read with full attention, with a window of 32 bytes, and with 4 sinks and a window of 28. What counts are the last
128 bytes of each piece, before which the sinks have left the window; every piece has a row of its own, whose first
position is the token that begins a text. One training run serves all three. Expected: the window is worse than full
attention, and sinks make good a part of that. It need not be so: such a model may be too small, or too young, to have
learned to rest on its first position. On 2 CPU cores it takes under 10 minutes.
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
