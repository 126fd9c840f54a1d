"""The paper's results next to ours, and how often both agree on which variant is better."""

import itertools
from collections.abc import Mapping

import numpy as np

from polygpt.ablation.intervals import complete, interval_t
from polygpt.ablation.results import Frame
from polygpt.ablation.summary import best_place
from polygpt.markup import Table, as_written, with_interval


def beside(frame: Frame) -> Table:
    """The paper's results next to ours, each also relative to the first variant. The ablation must have a paper."""
    ablation, paper = frame.ablation, frame.ablation.paper
    first = next((variant for variant in frame.values if variant in paper.figures), None)
    over = f", at its best {' and '.join(ablation.over)}" if ablation.over else ""
    over += f", mean over {next(iter(ablation.reads))}" if ablation.reads else ""
    turned = f"{paper.better} is better" if paper.better not in (None, ablation.measure.better) else ""
    about = ", ".join(filter(None, (paper.unit, turned)))
    heads = ["variant", f"paper{f' ({about})' if about else ''}", f"minus {first}"]
    heads += [f"ours: {ablation.heading}{over}", f"minus {first}"]
    samples = {variant: _at_best(frame, variant) for variant in frame.values}
    rows = []
    for variant in [*frame.values, *(name for name in paper.figures if name not in frame.values)]:
        theirs = paper.figures.get(variant)
        both = theirs is not None and first is not None and variant != first
        line = [variant, as_written(theirs), _difference(theirs, paper.figures[first]) if both else "–"]
        ours_S = samples.get(variant)
        line.append(_over_seeds(ours_S))
        line.append(
            _over_seeds(ours_S - samples[first]) if ours_S is not None and first not in (None, variant) else "–"
        )
        rows.append(line)
    means = {name: float(kept.mean()) for name, x_S in samples.items() if len(kept := complete(x_S))}
    agreeing, pairs = agreement(
        paper.figures, means, opposite=paper.better is not None and paper.better != ablation.measure.better
    )
    notes = [f"For {agreeing} of {pairs} pairs of variants, the better one by mean is the same as in the paper."]
    return Table("The paper's figures beside ours", heads, rows, notes=notes if pairs else ())


def agreement(theirs: Mapping[str, float], ours: Mapping[str, float], opposite: bool = False) -> tuple[int, int]:
    """(pairs of variants that both order the same way, pairs with values in both and no tie in theirs).

    Args:
        theirs, ours: values by variant; variants in only one of them do not count.
        opposite: whether higher values of theirs correspond to lower values of ours.
    """
    same, pairs = 0, 0
    for a, b in itertools.combinations([name for name in ours if name in theirs], 2):
        if theirs[a] != theirs[b]:
            pairs += 1
            product = (theirs[a] - theirs[b]) * (ours[a] - ours[b])
            same += product < 0 if opposite else product > 0
    return same, pairs


def _at_best(frame: Frame, variant: str) -> np.ndarray:
    """The metric, [S], at the variant's best point; the mean over `reads`."""
    at = best_place(frame, variant)
    index = tuple(frame.axes[factor].index(value) for factor, value in at.items())
    return frame.values[variant][(slice(None), *index)].reshape(len(frame.seeds), -1).mean(axis=1)


def _difference(value: float, first: float) -> str:
    """With as many digits as the two values have."""
    digits = max(len(as_written(one).partition(".")[2]) for one in (value, first))
    return f"{value - first:+.{digits}f}"


def _over_seeds(x_S) -> str:
    kept = complete(x_S) if x_S is not None else ()
    return with_interval(float(kept.mean()), interval_t(kept)) if len(kept) else "–"
