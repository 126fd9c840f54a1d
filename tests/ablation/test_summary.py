"""Rows, costs and verdicts, and the tables and sentences that are made of them."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from own_ablation import CLAIMS
from polygpt.ablation import results, summary, tables
from polygpt.ablation.study import load_ablation

OVER = (
    "over={'rows': grid('data.batch_size', 2, 4), 'rate': grid('optim.schedule.peak_lr', 1e-3, 1e-2, 1e-1)},\n"
    "diverged=9.0,"
)


def frame(folder):
    return results.frame(load_ablation(folder / "experiment.py"), results.read(folder / "results.jsonl"))


def rated(variant, at, seed):
    """Diverges at the largest rate; the first one but one is best."""
    if at["rate"] == 0.1:
        return None
    return {"base": 2.0, "wide": 1.9, "deep_2": 2.1}[variant] + 0.1 * seed - (at["rate"] == 0.01) * 0.2


def test_a_row_is_what_the_seeds_say(made):
    found = frame(made())
    base, wide, deep = summary.rows(found)
    values = found.values["wide"]
    assert wide.seeds == 4 and wide.mean == pytest.approx(values.mean())
    half = stats.t.ppf(0.975, 3) * stats.sem(values)
    assert wide.t == pytest.approx((values.mean() - half, values.mean() + half))
    test = stats.ttest_rel(values, found.values["base"])
    assert wide.compared.p == pytest.approx(test.pvalue)
    assert wide.compared.t == pytest.approx(tuple(test.confidence_interval()))
    assert base.compared is None and base.better is None and base.paper == 1.99
    assert wide.better == pytest.approx(np.mean([[a < b for a in values] for b in found.values["base"]]), abs=1e-9)
    assert deep.paper is None and wide.diverged == 0


def test_a_higher_metric_may_be_the_better_one(made):
    found = frame(made("better='higher',"))
    table = tables.results_table(found)
    (bold,) = table.bold
    assert table.rows[bold[0]][0] == "base" and bold[1] == 1
    lower = frame(made(name="lower"))
    assert summary.rows(found)[1].better == pytest.approx(1 - summary.rows(lower)[1].better)


def test_the_table_of_results(made):
    table = tables.results_table(frame(made()))
    assert table.columns == [
        "variant", "text/loss (nats per token)", "bootstrap", "minus base", "effect size", "P(better)", "paper",
    ]  # fmt: skip
    assert [row[0] for row in table.rows] == ["base", "wide", "deep_2"] and table.bold == {(1, 1)}
    assert table.rows[0][3:] == ["–", "–", "–", "1.99"] and table.rows[1][3] == "-0.1012 ± 0.0024"
    assert "4 seeds, the same for all variants" in table.notes[0]


def test_one_variant_is_compared_with_none(made):
    found = frame(made())
    alone = dataclasses.replace(
        found,
        ablation=found.ablation.replace(variants={"base": {}}, claims=()),
        values={"base": found.values["base"]},
        records=[record for record in found.records if record["variant"] == "base"],
    )
    table = tables.results_table(alone)
    assert table.columns == ["variant", "text/loss (nats per token)", "bootstrap", "paper"]
    assert [len(row) for row in table.rows] == [4] and not table.bold
    assert tables.headline(alone, []) == "No claims and no comparisons."


def test_factors_are_columns_and_each_combination_has_its_best(made):
    found = frame(made(OVER, rated))
    table = tables.results_table(found)
    assert table.columns[:4] == ["variant", "rows", "rate", "text/loss (nats per token)"]
    assert [row[:3] for row in table.rows[:4]] == [
        ["base", "2", "0.001"], ["base", "2", "0.01"], ["base", "2", "0.1"], ["base", "4", "0.001"],
    ]  # fmt: skip
    gone = [row for row in table.rows if row[2] == "0.1"]
    assert all(row[3:] == ["diverged", "–", "–", "–", "–"] for row in gone) and len(gone) == 6
    assert {table.rows[i][0] for i, _ in table.bold} == {"wide"} and len(table.bold) == 4
    assert any("count as 9.000" in note for note in table.notes)
    assert summary.best_place(found, "base") == {"rows": 2, "rate": 0.01}
    assert tables.headline(found, []) == "Best text/loss: wide at 4 of 4 values of rows and rate."


def test_costs_are_told_by_the_factors_that_change_them(made):
    found = frame(made(OVER, rated))
    costs = summary.costs(found)
    assert [cost.at for cost in costs] == [{}] * 3 and [cost.runs for cost in costs] == [24] * 3
    assert [cost.diverged for cost in costs] == [8] * 3 and [cost.steps for cost in costs] == [4] * 3
    for record in found.records:
        record["flops"] *= record["at"]["rows"]
    costs = summary.costs(found)
    assert [cost.at for cost in costs[:2]] == [{"rows": 2}, {"rows": 4}]
    table = tables.costs_table(found)
    assert table.columns[:2] == ["variant", "rows"] and table.columns[-1] == "diverged"
    assert table.rows[1][:5] == ["base", "4", "4,000", "10 G", "4"]


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("", "Budget: as many steps as the base (4), unless a variant sets them itself."),
        ("budget=Budget('tokens'),", "Budget: as many tokens as the base, within 2.0%, by the number of steps (384)."),
        ("budget=Budget('flops', tolerance=0.5),", "as many FLOPs as the base, within 50.0%, by the number of steps"),
    ],
)
def test_the_budget_is_stated(made, budget, said):
    assert said in tables.budget(frame(made(budget)))


def test_claims_are_told_with_verdict_interval_and_seeds(made):
    found = frame(made())
    verdicts = summary.verdicts(found)
    table = tables.claims_table(verdicts)
    held, undecided, same = table.rows
    assert held[:4] == ["wide < base", "a wider model learns more", "held", "0.1012 ± 0.0024"]
    assert (
        undecided[2] == "undecided" and undecided[5].startswith(f"{verdicts[1].seeds_needed:,} (") and same[2] == "held"
    )
    assert table.bold == {(0, 2), (2, 2)} and table.code == {0}
    assert tables.headline(found, verdicts) == (
        "2 of 3 claims held: a wider model learns more; depth makes no difference; "
        "1 of 3 claims undecided: a deeper model learns more; "
        "best text/loss: wide, 2.00 ± 0.14 nats per token, 4 seeds."
    )


def test_one_seed_has_no_intervals_and_says_so(made):
    found = frame(made(CLAIMS, seeds=1))
    table = tables.results_table(found)
    assert table.rows[1][1:4] == ["1.900", "–", "-0.1020"]
    assert "one seed: no intervals" in table.notes[0] and "9 of 12 runs are missing (4 seeds of each)." in table.notes
    verdicts = summary.verdicts(found)
    assert {verdict.verdict for verdict in verdicts} == {"undecided"}
    assert "1 of 1 seeds can be compared" in tables.claims_table(verdicts).rows[0][-1]


def test_nothing_run_is_no_error(made, tmp_path):
    folder = made()
    (folder / "results.jsonl").unlink()
    found = frame(folder)
    assert tables.results_table(found).rows[1][1:] == ["–", "–", "–", "–", "–", "1.944"]
    assert tables.costs_table(found).rows == [] and "12 of 12" in summary.missing(found)
    assert tables.headline(found, summary.verdicts(found)) == "Not run yet."
