"""Fill in the middle: a model that reads from left to right writes what is missing between two texts.

    python experiments/fill_in_the_middle.py    # both models, SEEDS seeds; `polygpt train` trains the first model once

The model (0.26M parameters) reads pieces of 16 characters of the King James Bible and writes middles of one to three
characters. For the first 850 of 4,000 steps it reads 90 % of the pieces as suffix, prefix, middle (2207.14255), with a
tenth of the loss weight on prefix and suffix; then 5 %, with the whole weight. The other model reads all from left to
right. Held out are 1,000 pieces, and a gap in each of 1,000 pieces. All have one length, so that positions tell how
long a gap is; the suffix of another piece does too, and nothing else.

Expected with seeds 0 and 1, some 6 minutes for each run on 2 cores of an AMD EPYC that were also busy otherwise:

| | filling in | left to right |
|---|---|---|
| `text/loss`, nats per token: 1.4 and 1.3 % higher | 1.400, 1.400 | 1.381, 1.382 |
| `infill/exact_match`: the gap is filled and ends where it should | 42.9 %, 44.3 % | 0 % |
| `prefix_only/fixed_length`: without the suffix, answers cut to the best one length | 20.2 %, 19.5 % | 20.2 %, 20.4 % |
| `prefix_only/opening`: without the suffix, but told how long each gap is | 40.2 %, 38.8 % | 40.6 %, 41.0 % |
| `infill/loss`, nats per token of the gap and its end | 0.838, 0.842 | |
| `swapped/loss`: the same with the suffix of another piece | 1.003, 1.039 | |

More filling in costs more: 15 % of the pieces from step 1,000 on fill 48.2 % of the gaps (0.762 against 1.198 nats with
another suffix), with a loss from left to right that is 2.4 % higher (seed 0). With the whole weight on prefix and
suffix from the beginning, a model does not use the suffix within 1,500 steps (0.906 against 0.909, pieces of 28
characters).
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

import polygpt.api as pg
from polygpt.evaluation.metric import Measure, Metric
from polygpt.spec import load_file
from polygpt.training.loggers import Silent

CHARACTERS, PROMPT, ROW, SEEDS, STEPS = 16, 4, 128, 2, 4000
FIM = pg.FillInTheMiddle(rate=0.9, spm=1.0, middle=(1, 3), context_weight=0.1)
GAP = FIM.replace(rate=1.0, context_weight=0.0)
"""Held-out gaps; only the middle is scored."""
MIDDLE = pg.Text(FIM.special[2], 0.0, special=True)


@dataclasses.dataclass(frozen=True)
class Pieces(pg.Source):
    """Pieces of the Bible, all of one length."""

    split: Literal["train", "test"] = "train"
    """The split."""
    prompt: int = 0
    """As in `Embedded`: the number of characters before every gap, at least."""

    def open(self) -> Sequence[pg.Example]:
        some = pg.Embedded("text", self.split, characters=CHARACTERS, prompt=self.prompt, labels=True).open()
        found = (some[i] for i in range(len(some)))
        bible = (one for one in found if one.labels["corpus"] == 0)
        whole = (one for one in bible if len("".join(part.text for part in one.parts)) == CHARACTERS)
        return [dataclasses.replace(one, labels={}) for one in whole]


@dataclasses.dataclass(frozen=True)
class Gaps(pg.Source):
    """Held-out pieces, each with a gap to fill."""

    suffix: Literal["own", "other", "none"] = "own"
    """What follows the gap: what does so in the piece; what does so in another piece, of the same length; or nothing,
    without the special tokens, which leaves the prompt that a model sees that reads from left to right."""

    def open(self) -> Sequence[pg.Example]:
        pieces = Pieces("test", PROMPT).open()
        return [self._gap(i, pieces) for i in range(len(pieces))]

    def _gap(self, i: int, pieces: Sequence[pg.Example]) -> pg.Example:
        parts = GAP(pieces[i], np.random.default_rng(i)).parts
        at = parts.index(MIDDLE)
        if self.suffix == "none":
            parts = parts[at + 1 :]
        elif self.suffix == "other":
            other = GAP(pieces[i - len(pieces) // 2], np.random.default_rng(i)).parts  # cut at the same place
            parts = (*other[: other.index(MIDDLE)], *parts[at:])
        return dataclasses.replace(pieces[i], parts=parts)


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
    """The model that fills in."""
    held_out = {
        "text": pg.EvalTask(Pieces("test"), limit=1000),
        "infill": pg.EvalTask(Gaps(), limit=1000, generate=True),
        "swapped": pg.EvalTask(Gaps("other"), limit=1000),
        "prefix_only": pg.EvalTask(Gaps("none"), limit=1000, generate=True, metrics=(WithoutEnd(),)),
    }
    later = {"data.tasks.text.transform.0.context_weight": 1.0, "data.tasks.text.transform.0.rate": 0.05}
    attention = pg.MultiHead(heads=4, position=pg.Rope())
    decoder = pg.DecoderSpec(width=96, depth=2, attention=attention, position=pg.Learned(ROW), scan=False)
    return pg.Experiment(
        name="fill-in-the-middle",
        tokenizer=pg.SpecialTokens(pg.Bytes(), FIM.special),
        data=pg.DataSpec({"text": pg.Task(Pieces(), transform=(FIM,))}, pg.LayoutSpec(ROW), batch_size=16),
        model=pg.ModelSpec(decoder),
        optim=pg.Optim(pg.WarmupCosine(peak_lr=4e-3, warmup=60, final=0.02), pg.AdamW(weight_decay=0.05, beta2=0.98)),
        train=pg.TrainSpec(steps=STEPS, log_every=50, use="latest", phases=(pg.Phase(850, later),)),
        evaluation=pg.EvaluationSpec(held_out, sampling=pg.Sampling(temperature=0.0, max_tokens=8)),
    )


def left_to_right() -> pg.Experiment:
    """The same model, which reads all pieces from left to right."""
    filling = experiment()
    data = filling.data.replace(tasks={"text": pg.Task(Pieces())})
    return filling.replace(name="left-to-right", data=data, train=filling.train.replace(phases=()))


def main(runs: Path) -> None:
    """Trains what is missing below `runs` and prints what the docstring shows."""
    rows = (("text", "loss"), ("infill", "exact_match"), ("infill", "loss"), ("swapped", "loss"))
    rows += (("prefix_only", "opening"), ("prefix_only", "fixed_length"))
    for chosen in (experiment(), left_to_right()):
        found = []
        for seed in range(SEEDS):
            folder = runs / f"{chosen.name}-{seed}"
            pg.train(chosen.replace(seed=seed), folder, lambda *_: [Silent()], on_message=lambda text: None)
            tasks = pg.evaluate_run(pg.open_run(folder))["tasks"]
            found.append([tasks[task][measure] for task, measure in rows])
        print(chosen.name)
        for (task, measure), values in zip(rows, np.transpose(found), strict=True):
            print(f"  {task}/{measure:13}", *(f"{value:.3f}" for value in values), flush=True)


if __name__ == "__main__":
    load_file(__file__).main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/fill_in_the_middle"))
