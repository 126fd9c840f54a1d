"""Fill in the middle: a model that reads from left to right writes what is missing between two texts.

    polygpt train experiments/fill_in_the_middle.py
    polygpt train experiments/fill_in_the_middle.py --data.tasks.text.transform.0.rate 0 --workdir runs/left-to-right

The first model (0.4M parameters) reads half of its examples as suffix, prefix, middle (2207.14255); the second reads
all from left to right. Held out are 1,000 pieces of text, and 1,000 gaps of one to four characters.

Expected after 1,500 steps, each run some 3 minutes of CPU time:

| | filling in | left to right |
|---|---|---|
| `text/loss`, nats per byte: 0.7 % higher | 1.553 | 1.542 |
| `infill/exact_match`: the gap is filled and ends where it should | 26.7 % | 0.1 % |
| `prefix_only/fixed_length`: without the suffix, answers cut to the best one length | 12.5 % | 13.0 % |
| `prefix_only/opening`: without the suffix, but told how long each gap is | 26.5 % | 27.6 % |

So filling in costs little, and the gaps end where they should. But all pieces have 58 characters, so positions tell how
long a gap is, and after so few steps the model uses no more of the suffix than that: it is not better than a model that
is told the length. One run each; `--seed 1` gives another.
"""

import dataclasses
from typing import ClassVar

import polygpt.api as pg
from polygpt.evaluation.metric import Measure, Metric

FIM = pg.FillInTheMiddle(rate=0.5, spm=1.0, middle=(1, 4))
GAP = FIM.replace(rate=1.0, context_weight=0.0)
"""Held-out gaps; only the middle is scored."""
MIDDLE = pg.Text(FIM.special[2], 0.0, special=True)


@dataclasses.dataclass(frozen=True)
class WithoutSuffix(pg.Transform):
    """The same gaps without what follows them: what is left to a model that reads from left to right."""

    def __call__(self, example, rng):
        parts = GAP(example, rng).parts
        return dataclasses.replace(example, parts=parts[parts.index(MIDDLE) + 1 :])


@dataclasses.dataclass(frozen=True)
class WithoutEnd(Metric):
    """For answers that do not end with the gap. `opening`: the share that begin with the truth. `fixed_length`: the
    share that are the truth, if all are cut to the one length that suits them best."""

    measures: ClassVar = (Measure("opening", "higher", share=True), Measure("fixed_length", "higher", share=True))

    def __call__(self, predictions, truths):
        pairs = list(zip(predictions, truths, strict=True))
        cut = [sum(answer[:length] == truth for answer, truth in pairs) for length in range(1, FIM.middle[1] + 1)]
        begun = sum(answer.startswith(truth) for answer, truth in pairs)
        return {"opening": begun / len(pairs), "fixed_length": max(cut) / len(pairs)}


def experiment() -> pg.Experiment:
    """The experiment."""
    text, test = (pg.Embedded("text", split, characters=58) for split in ("train", "test"))  # two fill a row
    prompted = test.replace(prompt=20)  # every gap has at least 20 characters before it
    infill, prefix_only = (pg.Transformed(prompted, (one,)) for one in (GAP, WithoutSuffix()))
    held_out = {
        "text": pg.EvalTask(test, limit=1000),
        "infill": pg.EvalTask(infill, limit=1000, generate=True),
        "prefix_only": pg.EvalTask(prefix_only, limit=1000, generate=True, metrics=(WithoutEnd(),)),
    }
    return pg.Experiment(
        name="fill-in-the-middle",
        tokenizer=pg.SpecialTokens(pg.Bytes(), FIM.special),
        data=pg.DataSpec({"text": pg.Task(text, transform=(FIM,))}, pg.LayoutSpec(seq_len=128), batch_size=16),
        model=pg.ModelSpec(pg.DecoderSpec(width=96, depth=3, attention=pg.MultiHead(heads=4), scan=False)),
        optim=pg.Optim(pg.WarmupCosine(peak_lr=4e-3, warmup=60, final=0.02), pg.AdamW(weight_decay=0.05, beta2=0.98)),
        train=pg.TrainSpec(steps=1500, log_every=50, use="latest"),
        evaluation=pg.EvaluationSpec(held_out, sampling=pg.Sampling(temperature=0.0, max_tokens=8)),
    )
