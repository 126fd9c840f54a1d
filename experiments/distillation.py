"""Distillation (Hinton et al., 1503.02531): a student of a quarter of its teacher's size learns more with it.

    python experiments/distillation.py         trains the teacher, then each student with five seeds, and compares them
    polygpt train experiments/distillation.py  trains one student, if runs/distillation/teacher exists

All are byte-level language models of the embedded text, of four blocks: the teacher, 128 wide with 0.82M parameters,
takes 700 steps, the students, 64 wide with 0.21M, take 250 steps. One student learns from the text, the other from the
teacher's predictions too, which cost it one forward pass of the teacher per step.

Expected held-out loss in nats per byte: teacher 1.629, student alone 2.013 ± 0.010, with the teacher 1.910 ± 0.010 over
5 seeds; the gain is 0.103, 95 % interval 0.093 to 0.113. It takes 9 minutes of CPU time, about 5 minutes on 2 cores.
"""

import argparse
from pathlib import Path

import numpy as np

import polygpt.api as pg
from polygpt.ablation.intervals import interval_t

TEACHER = "runs/distillation/teacher"
SEEDS = 5


def text(name: str, width: int, steps: int, **changes) -> pg.Experiment:
    """A byte-level language model of the embedded text, of four blocks."""
    train, test = (pg.Embedded("text", split, characters=120) for split in ("train", "test"))
    decoder = pg.DecoderSpec(width=width, depth=4, attention=pg.MultiHead(heads=4), mlp=pg.MLP(), scan=False)
    return pg.Experiment(
        name=name,
        data=pg.DataSpec({"text": pg.Task(train)}, pg.LayoutSpec(seq_len=128), batch_size=16),
        model=pg.ModelSpec(decoder),
        optim=pg.Optim(pg.WarmupCosine(peak_lr=3e-3, warmup=50)),
        train=pg.TrainSpec(steps=steps, log_every=50, use="latest"),
        evaluation=pg.EvaluationSpec({"text": pg.EvalTask(test, limit=500)}),
    ).replace(**changes)


def teacher() -> pg.Experiment:
    """The teacher: 128 wide."""
    return text("teacher", 128, steps=700)


def alone() -> pg.Experiment:
    """A student of half the width, which learns from the text only."""
    return text("alone", 64, steps=250)


def experiment() -> pg.Experiment:
    """The same student, which learns from the teacher's predictions too."""
    objectives = {"next_token": (pg.NextToken(), 0.3), "teacher": (pg.Distillation(), 0.7)}
    references = {"teacher": pg.Reference(pg.FromRun(path=TEACHER))}
    return alone().replace(name="distilled", objectives=objectives, references=references)


def held_out(chosen: pg.Experiment, workdir: str) -> float:
    """Trains, and returns the held-out loss in nats per byte."""
    pg.train(chosen, workdir)
    return pg.evaluate_run(pg.open_run(workdir))["tasks"]["text"]["loss"]


def main() -> None:
    """Runs the comparison and prints its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"seeds of each student (default {SEEDS})")
    seeds = range(parser.parse_args().seeds)
    print(f"teacher    {held_out(teacher(), TEACHER):.4f} nats per byte")
    folder = Path(TEACHER).parent
    losses = {
        one.name: np.array([held_out(one.replace(seed=seed), str(folder / f"{one.name}-{seed}")) for seed in seeds])
        for one in (alone(), experiment())
    }
    for name, values in losses.items():
        print(f"{name:10} {values.mean():.4f} ± {values.std(ddof=1):.4f} over {len(values)} seeds")
    gain = losses["alone"] - losses["distilled"]
    low, high = interval_t(gain)
    print(f"gain       {gain.mean():.4f}, 95 % interval {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    main()
