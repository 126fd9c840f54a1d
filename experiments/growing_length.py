"""Growing length: is training faster if the rows are short at first?

python experiments/growing_length.py    # both; `polygpt train experiments/growing_length.py` only trains the first

A byte-level model of 0.1M parameters reads the embedded texts in rows of 4,096 positions, or for the first 320 of 400
steps in rows of 128, with as many positions per batch (`train.phases`). Its positions are ALiBi (2108.12409), which
extrapolates from short rows to long ones. Held-out loss in nats per byte on rows of 4,096, one seed; CPU time of the
steps alone:

    rows              loss   CPU time  CPU time to a loss of 1.926
    4,096            1.926      152 s                        152 s
    128, then 4,096  1.873       63 s                         31 s

The final loss of long rows takes a fifth of the time, here before the rows grow, and the last 80 steps improve on it
(images/growing_length.svg). Time: 9 min 45 s on 2 cores of an AMD EPYC
that were also busy otherwise; 4 min 51 s of CPU time.
"""

import dataclasses
import sys
import time
from pathlib import Path
from statistics import median

import polygpt.api as pg
from polygpt.ablation.charts import Chart, Panel, Series
from polygpt.ablation.pictures import draw
from polygpt.training.loggers import Silent

STEPS, SHORT_STEPS = 400, 320
LONG, SHORT = 4096, 128
ROWS = 1
"""Rows of a batch of long rows; a batch of short ones has as many positions."""
PICTURE = Path(__file__).with_name("images") / "growing_length"


def experiment() -> pg.Experiment:
    """Rows of 128 positions for 320 steps, then of 4,096."""
    pieces = {name: pg.Embedded("text", characters=length - 68) for name, length in (("short", 188), ("long", LONG))}
    tasks = {"short": pg.Task(pieces["short"]), "long": pg.Task(pieces["long"], weight=1e-9)}
    longer = {
        "data.tasks.short.weight": 1e-9,
        "data.tasks.long.weight": 1.0,
        "data.layout.seq_len": LONG,
        "data.batch_size": ROWS,
    }
    test = pg.EvalTask(pg.Embedded("text", "test", characters=LONG - 68), limit=16, seq_len=LONG)
    return pg.Experiment(
        name="growing-length",
        data=pg.DataSpec(tasks, pg.LayoutSpec(SHORT), batch_size=ROWS * LONG // SHORT),
        model=pg.ModelSpec(
            pg.DecoderSpec(width=64, depth=2, attention=pg.MultiHead(heads=4), position=pg.ALiBi(), scan=False)
        ),
        optim=pg.Optim(pg.WarmupCosine(peak_lr=5e-3, warmup=20, final=0.02), pg.AdamW(weight_decay=0.05)),
        train=pg.TrainSpec(STEPS, evaluate_every=20, use="latest", phases=(pg.Phase(SHORT_STEPS, longer),)),
        evaluation=pg.EvaluationSpec({"text": test}, batch_size=1),
    )


def long_throughout() -> pg.Experiment:
    """The same without a phase: rows of 4,096 positions from the beginning."""
    growing = experiment()
    long = growing.data.tasks["long"].replace(weight=1.0)
    data = growing.data.replace(tasks={"long": long}, layout=pg.LayoutSpec(LONG), batch_size=ROWS)
    return growing.replace(name="long", data=data, train=growing.train.replace(phases=()))


@dataclasses.dataclass
class Curve(Silent):
    """Held-out losses by the seconds of CPU time that the steps took, without compilation and evaluation."""

    starts: tuple[int, ...]
    times: dict[int, float] = dataclasses.field(default_factory=dict)
    losses: dict[int, float] = dataclasses.field(default_factory=dict)
    before: float | None = None

    def step(self, step, loss):
        now = time.process_time()
        if self.before is not None:
            self.times[step] = now - self.before
        self.before = now

    def evaluation(self, step, results):
        self.losses[step], self.before = results["metric"], None

    def compiling(self, step, seconds):
        self.before = None

    def points(self) -> tuple[list[float], list[float]]:
        """Seconds and losses. A step whose time also had something else in it counts as the phase's median."""
        seconds, found = 0.0, {}
        for step in range(1, STEPS + 1):
            phase = sum(start < step for start in self.starts)
            alike = [took for other, took in self.times.items() if sum(start < other for start in self.starts) == phase]
            seconds += self.times.get(step, median(alike))
            found[step] = seconds
        return [found[step] for step in self.losses], list(self.losses.values())


def trained(chosen: pg.Experiment, folder: Path) -> tuple[list[float], list[float]]:
    """The held-out curve of a run."""
    curve = Curve(tuple(phase.start for phase in chosen.train.phases))
    pg.train(chosen, folder, lambda *_: [curve], on_message=lambda text: None)
    return curve.points()


def main(runs: Path) -> None:
    """Trains both below `runs`, which must not exist, draws the curves and prints the figures."""
    curves = {"128, then 4,096": trained(experiment(), runs / "growing")}
    curves["4,096"] = trained(long_throughout(), runs / "long")
    none = (float("nan"),) * len(curves["4,096"][0])
    series = tuple(Series(name, tuple(x), tuple(y), none, none) for name, (x, y) in curves.items())
    panel = Panel("", series, "CPU time of the steps (s)", "held-out loss (nats per byte)")
    suffix, content = draw(Chart("growing_length", "", "curves", (panel,), "lower"))
    PICTURE.with_suffix(suffix).write_bytes(content)
    (seconds, losses), (_, growing) = curves["4,096"], curves["128, then 4,096"]
    print(f"4,096: loss {losses[-1]:.3f} in {seconds[-1]:.0f} s")
    at = next((i for i, loss in enumerate(growing) if loss <= losses[-1]), None)
    seconds = curves["128, then 4,096"][0]
    took = "never" if at is None else f"{seconds[at]:.0f} s"
    print(f"128, then 4,096: that loss after {took}; loss {growing[-1]:.3f} in {seconds[-1]:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/growing_length"))
