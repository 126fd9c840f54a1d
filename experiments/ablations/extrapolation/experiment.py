"""Which position encoding lets a model read texts longer than those it was trained on?

    polygpt data fetch state-of-the-union
    polygpt ablate extrapolation --engine processes

After Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation (Press et al.,
2108.12409), Figure 1: perplexity of 247M-parameter models on WikiText-103, trained on 512 or 1,024 tokens and evaluated
at up to 16,000. In the paper, sinusoidal positions degrade a few dozen tokens beyond the training length and rotary
positions a few hundred, while ALiBi stays constant or improves. Learned positions, which the paper does not include,
cannot extrapolate: the embeddings of positions beyond the training length keep their initial values. YaRN (Peng et
al., 2309.00071, section 3) rescales a rotary encoding after training; here by the ratio of the lengths, and without the
fine-tuning of its paper.

Here: a small byte-level decoder on speeches, trained at seq_len 128 and evaluated at 128, 256 and 512; pieces of text
are as long as the rows. The learning rate is tuned for each encoding by the loss at 128. Expected: the paper's order.
On 2 CPU cores it takes under 20 minutes.
"""

from polygpt.ablation.bases import text
from polygpt.ablation.claims import Claim
from polygpt.ablation.study import Ablation, Paper
from polygpt.ablation.variants import Changes, grid
from polygpt.attention.biases import ALiBi
from polygpt.data.sources.corpus import Corpus
from polygpt.evaluation.spec import EvalTask
from polygpt.nn.positions import Learned, Position, Rope, Sinusoidal
from polygpt.nn.rotary import YaRN
from polygpt.training.experiment import Experiment

LENGTH = 128
"""T of training."""
LONGER = (256, 512)
"""T of the rows that are read beside."""
READ = 800 * LENGTH
"""Bytes that are read at each length, to the next piece."""


def task(length: int) -> str:
    """The held-out task of that length."""
    return "text" if length == LENGTH else f"at_{length}"


def base() -> Experiment:
    """The experiment, with a held-out task for each length."""
    made = text("extrapolation", seq_len=LENGTH, held_out=READ // LENGTH)
    tasks = {
        task(length): EvalTask(
            Corpus("state-of-the-union", "test", characters=length - 2), limit=READ // length, seq_len=length
        )
        for length in LONGER
    }
    return made.replace(evaluation=made.evaluation.replace(tasks=made.evaluation.tasks | tasks))


def encoding(position: Position) -> Changes:
    """A variant."""
    return {"model.decoder.position": position}


def stretched(length: int) -> Changes:
    """What is changed of the model that was trained, for rows of that length."""
    return {"decoder.position": Rope(scaling=YaRN(factor=length / LENGTH, original_length=LENGTH))}


def ablation() -> Ablation:
    """The question."""
    return Ablation(
        question="Which position encoding keeps its loss on texts four times as long as those of training?",
        base=base(),
        variants={
            "alibi": encoding(ALiBi()),
            "rope": encoding(Rope()),
            "yarn": encoding(Rope()) | {f"evaluation.tasks.{task(n)}.model": stretched(n) for n in LONGER},
            "sinusoidal": encoding(Sinusoidal()),
            "learned": encoding(Learned(max(LONGER))),
        },
        paper=Paper(
            title="Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
            reference="2108.12409",
            where="Figure 1",
            evidence="A",
            unit="perplexity",
            setting="247M parameters on WikiText-103, trained at 512 and 1,024 tokens, read at up to 16,000",
        ),
        unit="nats per byte",
        reads={"length": {length: f"{task(length)}/loss" for length in (LENGTH, *LONGER)}},
        tuned=grid("optim.schedule.peak_lr", 2e-3, 4e-3, 8e-3, 1.6e-2),
        claims=(
            Claim("rise(alibi, over=length) < noise", "ALiBi gets no worse at four times the length"),
            Claim("rise(sinusoidal, over=length) > noise", "sinusoids get worse"),
            Claim("rise(rope, over=length) > noise", "rotary positions get worse"),
            Claim("rise(learned, over=length) > noise", "learned positions fail beyond those that were trained"),
            Claim("at(alibi, length=512) < at(rope, length=512)", "ALiBi below rotary positions at 512"),
            Claim("at(rope, length=512) < at(sinusoidal, length=512)", "rotary positions below sinusoids at 512"),
            Claim("at(yarn, length=512) < at(rope, length=512)", "YaRN helps rotary positions at 512, untrained"),
        ),
    )
