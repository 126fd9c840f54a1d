"""Fill in the middle: a model that reads from left to right writes what is missing between two texts.

polygpt train experiments/fill_in_the_middle.py
"""

import dataclasses
from typing import ClassVar

import polygpt.api as pg
from polygpt.evaluation.metric import Measure, Metric

CHARACTERS = 120
GAP = pg.FillInTheMiddle(rate=1.0, spm=0.0, middle=(1, 4), context_weight=0.0)
"""Held-out gaps of one to four characters, of which only the middle is scored."""


@dataclasses.dataclass(frozen=True)
class WithoutSuffix(pg.Transform):
    """The same gaps without what follows them: what is left to a model that reads from left to right."""

    def __call__(self, example, rng):
        _, *before, middle = GAP(example, rng).parts
        return dataclasses.replace(example, parts=(*before[: before.index(SUFFIX)], middle))


SUFFIX = pg.Text(GAP.special[1], 0.0, special=True)


@dataclasses.dataclass(frozen=True)
class Opening(Metric):
    """`opening`: the share of answers that begin with the truth, for a model that does not know where a gap ends."""

    measures: ClassVar = (Measure("opening", "higher", share=True),)

    def __call__(self, predictions, truths):
        right = sum(prediction.startswith(truth) for prediction, truth in zip(predictions, truths, strict=True))
        return {"opening": right / len(truths)}


def experiment() -> pg.Experiment:
    """The experiment."""
    fim = pg.FillInTheMiddle(rate=0.5, middle=(1, 16))
    text, test = pg.Embedded("text", characters=CHARACTERS), pg.Embedded("text", "test", characters=CHARACTERS)
    prompted = test.replace(prompt=40)  # every gap has at least 40 characters before it
    held_out = {
        "text": pg.EvalTask(test),
        "infill": pg.EvalTask(pg.Transformed(prompted, (GAP,)), generate=True),
        "prefix_only": pg.EvalTask(pg.Transformed(prompted, (WithoutSuffix(),)), generate=True, metrics=(Opening(),)),
    }
    return pg.Experiment(
        name="fill-in-the-middle",
        tokenizer=pg.SpecialTokens(pg.Bytes(), fim.special),
        data=pg.DataSpec({"text": pg.Task(text, transform=(fim,))}, pg.LayoutSpec(seq_len=128), batch_size=16),
        model=pg.ModelSpec(pg.DecoderSpec(width=128, depth=4, attention=pg.MultiHead(heads=4), scan=False)),
        optim=pg.Optim(pg.WarmupCosine(peak_lr=3e-3, warmup=100, final=0.02), pg.AdamW(weight_decay=0.05, beta2=0.98)),
        train=pg.TrainSpec(steps=1500, log_every=50, use="latest"),
        evaluation=pg.EvaluationSpec(held_out, sampling=pg.Sampling(temperature=0.0, max_tokens=8)),
    )
