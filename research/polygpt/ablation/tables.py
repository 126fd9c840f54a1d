"""The results of an ablation as tables: metrics, costs and verdicts."""

import collections
import math
from collections.abc import Sequence

from polygpt.ablation.claims import Verdict
from polygpt.ablation.results import Frame
from polygpt.ablation.summary import best_rows, costs, missing, rows
from polygpt.ablation.variants import Name
from polygpt.markup import Table, alone, as_written, probability, short, span, value_text, with_interval

SETTLES = (
    "Seeds needed: number that decides the claim with probability 0.8 if the effect is as measured; in brackets, for "
    "the 10 to 90 % range of the effect."
)
ROUGH = 5
"""Number of seeds below which effect sizes have a caveat."""


def results_table(frame: Frame) -> Table:
    """The metric, with the best variant of each combination of factors highlighted."""
    ablation, found = frame.ablation, rows(frame)
    first, *others = frame.values
    with_paper = not frame.axes and any(row.paper is not None for row in found)
    heads = ["variant", *frame.axes, ablation.heading, "bootstrap"]
    heads += [f"minus {first}", "effect size", "P(better)"] if others else []
    heads += ["paper"] if with_paper else []
    cells = []
    for row in found:
        gone = row.diverged and row.diverged == row.seeds
        figures = ["diverged", "–"] if gone else [with_interval(row.mean, row.t), span(row.bootstrap)]
        line = [row.variant, *map(value_text, row.at.values()), *figures]
        if row.compared is None or gone:
            line += ["–"] * 3 if others else []
        else:
            line += [with_interval(row.compared.mean, row.compared.t), _effect(row.compared.effect)]
            line += [probability_of(row.better)]
        cells.append(line + ([as_written(row.paper)] if with_paper else []))
    bold = frozenset((i, len(frame.axes) + 1) for i in best_rows(found, ablation.measure.better))
    title = f"Results: {ablation.label}, {ablation.measure.better} is better"
    return Table(title, heads, cells, bold, notes=_said(frame))


def costs_table(frame: Frame) -> Table:
    """Costs of the points of the comparison."""
    found, ablation = costs(frame), frame.ablation
    diverged = any(cost.diverged for cost in found)
    kept = [factor for factor in ablation.over if found and factor in found[0].at]
    heads = ["variant", *kept, *(["tuned"] if ablation.tuned else []), "parameters", "FLOPs", "steps"]
    heads += ["tokens", "seconds", "runs", *(["diverged"] if diverged else [])]
    cells = []
    for cost in found:
        chosen = ", ".join(value_text(value) + _edge(value, list(ablation.tuned)) for value in cost.tuned)
        line = [cost.variant, *map(value_text, cost.at.values()), *([chosen] if ablation.tuned else [])]
        line += [f"{cost.parameters:,}", short(cost.flops), f"{cost.steps:,}", f"{cost.tokens:,}"]
        line += [alone(cost.seconds, 3), str(cost.runs)]
        cells.append(line + ([str(cost.diverged)] if diverged else []))
    return Table("Cost of a run", heads, cells, notes=[budget(frame)])


def _edge(value: Name, tried: Sequence[Name]) -> str:
    """A remark if a chosen value is at the edge of the grid."""
    if len(tried) < 2 or not all(isinstance(one, int | float) for one in tried):
        return ""
    return {min(tried): ", the lowest tried", max(tried): ", the highest tried"}.get(value, "")


def claims_table(found: Sequence[Verdict]) -> Table:
    """Claims and their verdicts."""
    heads = ["claim", "in words", "verdict", "estimate (95 % interval)", "p (Holm)", "seeds needed", "note"]
    cells = [
        [
            one.claim.text,
            one.claim.says,
            one.verdict,
            with_interval(one.estimate, (one.low, one.high)),
            probability(one.adjusted),
            seeds_text(one.seeds_needed, one.seeds_range) if one.verdict == "undecided" else "",
            one.note,
        ]
        for one in found
    ]
    bold = frozenset((i, 2) for i, one in enumerate(found) if one.verdict != "undecided")
    shown = [j for j in range(len(heads)) if j == 0 or any(row[j] for row in cells)]
    bold = frozenset((i, shown.index(j)) for i, j in bold)
    notes = [
        "The estimate is the margin by which the deciding comparison holds (negative: fails). Claims are decided at "
        "p ≤ 0.05, by Holm's method over all claims. p assumes normal or symmetric margins: it is the larger of "
        "Student's t test and Hall's, which corrects for skewness."
    ]
    notes += [SETTLES] if any(one.verdict == "undecided" and one.seeds_needed for one in found) else []
    return Table(
        "Claims",
        [heads[j] for j in shown],
        [[row[j] for j in shown] for row in cells],
        bold,
        code=frozenset({0}),
        prose=frozenset(j for j, head in enumerate(shown) if heads[head] in ("in words", "verdict", "note")),
        notes=notes,
    )


# --- in words ---------------------------------------------------------------------------------------------------------


def headline(frame: Frame, found: Sequence[Verdict]) -> str:
    """The answer in one sentence."""
    if not frame.records:
        return "Not run yet."
    parts = []
    for verdict in ("held", "refuted", "undecided"):
        some = [one.claim.says.rstrip(".") or one.claim.text for one in found if one.verdict == verdict]
        if some:
            counted = f"{len(some)} of {len(found)} claims {verdict}" if len(found) > 1 else verdict
            parts.append(f"{counted}: {'; '.join(some)}" if len(found) <= 3 else counted)
    table = rows(frame)
    best = [table[i] for i in best_rows(table, frame.ablation.measure.better)]
    if best and not frame.axes:
        row = best[0]
        figure = f"{with_interval(row.mean, row.t)} {frame.ablation.measure.unit}".rstrip()
        parts.append(f"best {frame.ablation.label}: {row.variant}, {figure}, {row.seeds} seeds")
    elif best:
        times = collections.Counter(row.variant for row in best)
        over = " and ".join(frame.axes)
        parts.append(
            f"best {frame.ablation.label}: "
            + ", ".join(f"{name} at {count} of {len(best)} values of {over}" for name, count in times.most_common())
        )
    sentence = "; ".join(parts) or "no claims and no comparisons"
    return sentence[0].upper() + sentence[1:] + "."


def budget(frame: Frame) -> str:
    """What the budget keeps equal, in one sentence."""
    held, found = frame.ablation.budget, costs(frame)
    names = {"steps": "steps", "tokens": "tokens", "flops": "FLOPs", "parameters": "parameters"}
    amounts = [getattr(cost, held.by) for cost in found if cost.diverged < cost.runs]
    low, high = (min(amounts), max(amounts)) if amounts else (0, 0)
    # Equal between variants, but may differ between values of a factor.
    told = f" ({short(low)})" if short(low) == short(high) else f" ({short(low)} to {short(high)})"
    told = told if amounts else ""
    sizes = f"as many parameters as the base, within {held.tolerance:.1%}, by {held.field}" if held.field else ""
    if held.by == "parameters":
        return f"Budget: {sizes}{told}."
    if held.by == "steps":
        text = f"as many steps as the base{told}, unless a variant sets them itself"
    else:
        text = f"as many {names[held.by]} as the base, within {held.tolerance:.1%}, by the number of steps{told}"
    return f"Budget: {text}{f'; {sizes}' if sizes else ''}."


def caveats(seeds: int, effects: bool) -> list[str]:
    """Caveats about statistics with this number of seeds; `effects`: whether effect sizes are shown."""
    if seeds < 2:
        return []
    notes = ["Bootstrap intervals are studentised." if seeds >= 4 else "A bootstrap interval needs four seeds."]
    if effects and seeds < ROUGH:
        notes.append(f"Effect sizes from {seeds} seeds are rough estimates, often several times too large.")
    return notes


def seeds_text(needed: int | None, span: tuple[int, int | None] | None) -> str:
    """A number of seeds and its range: "31 (12 to 128)", "28 (9 or more)"."""
    if needed is None:
        return "–"
    if span is None:
        return f"{needed:,}"
    return f"{needed:,} ({span[0]:,} {'or more' if span[1] is None else f'to {span[1]:,}'})"


def probability_of(share: float | None) -> str:
    """A probability with two digits."""
    return "–" if share is None else f"{share:.2f}"


def _effect(value: float | None) -> str:
    return "–" if value is None else alone(value) if math.isinf(value) else f"{value:.2f}"


def _said(frame: Frame) -> list[str]:
    seeds = f"{len(frame.seeds)} seeds, the same for all variants" if len(frame.seeds) > 1 else "one seed: no intervals"
    notes = [f"Means over {seeds}; ± and intervals 95 %, Student's t; differences are paired by seed."]
    notes += caveats(len(frame.seeds), len(frame.values) > 1)
    if frame.ablation.diverged is not None:
        notes.append(f"Runs that diverged or did worse count as {alone(frame.ablation.diverged)}.")
    return notes + list(filter(None, [missing(frame)]))
