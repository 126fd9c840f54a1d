"""DPO (Rafailov et al., 2305.18290) on pictures: which of two right answers is preferred depends on what one sees.

    python experiments/dpo.py         trains on answers of both kinds, then on preferences, and compares the two models
    polygpt train experiments/dpo.py  the second part alone, if runs/dpo/first exists

The first model names handwritten digits in words or as numerals, at random. Of both right answers, words are preferred
for the digits below five and numerals from five on, so the preference cannot be learned without the picture. The second
model learns from DPO and from the likelihood of the preferred answers; without the latter, after 200 steps, one answer
in 15 was not a number.

Expected on 299 held-out pictures: the margin log p(preferred) - log p(rejected) rises from -0.3 to +20 nats, the
preferred answer is the more likely one for 100 % of the pictures (before: 44 %), and the model writes it for 96 %
(before: 42 %). It takes about a minute of CPU time, on 2 cores.
"""

import dataclasses
from collections.abc import Sequence

import polygpt.api as pg
from polygpt.data.sources.embedded import NUMBERS

FIRST = "runs/dpo/first"


@dataclasses.dataclass(frozen=True)
class Digits(pg.Source):
    """Pictures of digits, named in words ("seven") or as numerals ("7"). Words are preferred below five, numerals from
    five on."""

    split: str = "train"
    """The split."""
    pairs: bool = True
    """Whether an example has both answers, the preferred one first; if not, it has either, regardless of preference."""

    def open(self) -> Sequence[pg.Example]:
        return [self._example(i, example) for i, example in enumerate(pg.Embedded("digits", self.split).open())]

    def _example(self, i: int, example: pg.Example) -> pg.Example:
        number = NUMBERS.index(example.answer)
        answers = [NUMBERS[number], str(number)]
        if self.pairs and number >= 5 or not self.pairs and i % 2:
            answers.reverse()
        rejected = answers[1] if self.pairs else None
        return dataclasses.replace(example, parts=(*example.prompt, pg.Text(answers[0])), rejected=rejected)


def first() -> pg.Experiment:
    """Learns to name digits in either way."""
    tower = pg.StackSpec(width=64, depth=1, attention=pg.MultiHead(heads=4), scan=False)
    image = pg.ImageAdapter(pg.ImageFeatures(32, 32), items=8, patch=16, tower=tower)
    decoder = pg.DecoderSpec(width=64, depth=2, attention=pg.MultiHead(heads=4), scan=False)
    return pg.Experiment(
        name="first",
        data=pg.DataSpec({"digits": pg.Task(Digits(pairs=False))}, pg.LayoutSpec(seq_len=96), batch_size=16),
        model=pg.ModelSpec(decoder, {"image": image}),
        optim=pg.Optim(pg.WarmupCosine(peak_lr=2e-3, warmup=50)),
        train=pg.TrainSpec(steps=400, log_every=50, use="latest"),
        evaluation=pg.EvaluationSpec({"digits": pg.EvalTask(Digits("test"), generate=True)}, modality_gain=False),
    )


def experiment() -> pg.Experiment:
    """Learns what is preferred, with the first model as the reference."""
    before = first()
    objectives = {
        "dpo": (pg.DPO(beta=0.3), 1.0),
        "next_token": (pg.NextToken(), 1.0),  # of the preferred answers alone, which keeps them likely
        "margin": (pg.PreferenceMargin(), 0.0),
        "accuracy": (pg.PreferenceAccuracy(), 0.0),
    }
    return before.replace(
        name="preferred",
        data=before.data.replace(tasks={"digits": pg.Task(Digits())}, layout=before.data.layout.replace(pairs=True)),
        optim=pg.Optim(pg.WarmupCosine(peak_lr=5e-4, warmup=20)),
        train=before.train.replace(steps=100),
        objectives=objectives,
        init=pg.FromRun(path=FIRST),
        references={"reference": pg.Reference()},
    )


def main() -> None:
    """Trains both models and prints how they do on held-out pictures."""
    for chosen, workdir in ((first(), FIRST), (experiment(), "runs/dpo/preferred")):
        pg.train(chosen, workdir)
        found = pg.evaluate_run(pg.open_run(workdir))["tasks"]["digits"]
        print(
            f"{chosen.name:10} margin {found['preference_margin']:+.2f} nats, preferred answer more likely "
            f"{found['preference_accuracy']:.1%}, written {found['exact_match']:.1%} of {found['n']}"
        )


if __name__ == "__main__":
    main()
