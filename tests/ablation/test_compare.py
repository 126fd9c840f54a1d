"""Finished runs in groups, paired or not."""

import json
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from own_ablation import write_ablation
from polygpt import spec
from polygpt.ablation.compare import compare_runs, fields, tables, welch
from polygpt.ablation.statistics import CORRECTION
from polygpt.ablation.study import load_ablation
from polygpt.errors import UserError
from polygpt.overrides import replaced

WIDE = {"model.decoder.width": 16}


@pytest.fixture
def run(tmp_path):
    """Writes a run folder with made-up figures; gives its path."""
    base = load_ablation(write_ablation(tmp_path / "own")).base

    def write(name: str, loss: float, seed: int = 0, changes=None, steps: int = 4, **others: float):
        folder = tmp_path / name
        folder.mkdir()
        experiment = replaced(base, {"name": name, "seed": seed, "train.log_every": 1, **(changes or {})})
        (folder / "config.json").write_text(json.dumps(spec.to_json(experiment)))
        lines = [{"step": step, "loss": loss + 1 / step} for step in range(1, steps + 1)]
        lines.append({"step": steps, "evaluation": {"text": {"loss": loss, "n": 8, **others}}})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write


def test_runs_that_differ_in_the_seed_alone_are_a_group_paired_by_seed(run):
    a, b = [2.0, 2.2, 2.5], [1.9, 2.15, 2.3]
    folders = [run(f"small-{seed}", loss, seed) for seed, loss in enumerate(a)]
    folders += [run(f"large-{seed}", loss, seed, WIDE) for seed, loss in reversed(list(enumerate(b)))]
    found = compare_runs(folders)
    small, large = found.groups
    assert (found.metric, found.better) == ("text/loss", "lower")
    assert found.differences == {"model.decoder.width": (8, 16)}
    assert (small.name, large.name) == ("width 8", "width 16") and small.compared is None
    assert large.values == (1.9, 2.15, 2.3) and large.how == "paired"
    test = stats.ttest_rel(b, a)
    assert large.compared.p == pytest.approx(test.pvalue)
    assert large.compared.t == pytest.approx(tuple(test.confidence_interval()))
    assert large.better == pytest.approx(np.mean([[x < y for x in b] for y in a]))
    table, differing = tables(found)
    assert table.rows[1][:2] == ["width 16", "0, 1, 2"] and "paired" in table.rows[1]
    assert differing.rows == [["model.decoder.width", "8", "16"]]


def test_several_groups_are_adjusted_by_holm_and_what_would_settle_them_is_said(run):
    a, widths = [2.0, 2.2, 2.5], {16: [1.9, 2.15, 2.3], 32: [1.5, 1.71, 2.02]}
    folders = [run(f"8-{seed}", loss, seed) for seed, loss in enumerate(a)]
    for width, losses in widths.items():
        changes = {"model.decoder.width": width}
        folders += [run(f"{width}-{seed}", loss, seed, changes) for seed, loss in enumerate(losses)]
    found = compare_runs(folders)
    _, open_, settled = found.groups
    p = [stats.ttest_rel(losses, a).pvalue for losses in widths.values()]
    assert (open_.adjusted, settled.adjusted) == pytest.approx((p[0], 2 * p[1])) and settled.adjusted < 0.05 < p[0]
    rows = tables(found)[0].rows
    fewest, most = open_.seeds_range
    assert rows[0][-1] == "–" and rows[1][-1] == f"{open_.seeds_needed} ({fewest} to {most})" and rows[2][-1] == ""
    by_t = open_.seeds_needed - CORRECTION
    power = TTestPower().power(abs(open_.compared.effect), by_t, 0.025)
    assert power >= 0.8 > TTestPower().power(abs(open_.compared.effect), by_t - 1, 0.025)
    assert fewest < open_.seeds_needed < most
    notes = " ".join(tables(found)[0].notes)
    assert "needs four seeds" in notes and "rough" in notes and "10 to 90 %" in notes


def test_other_seeds_are_compared_by_welch(run):
    a, b = [2.0, 2.2, 2.5], [1.9, 2.15, 2.3, 1.8]
    folders = [run(f"small-{seed}", loss, seed) for seed, loss in enumerate(a)]
    folders += [run(f"large-{seed}", loss, seed + 1, WIDE) for seed, loss in enumerate(b)]
    large = compare_runs(folders).groups[1]
    assert large.adjusted == large.compared.p and large.seeds_needed is None
    test = stats.ttest_ind(b, a, equal_var=False)
    assert large.how == "Welch" and large.compared.p == pytest.approx(test.pvalue)
    assert large.compared.t == pytest.approx(tuple(test.confidence_interval()))
    low, high = large.compared.bootstrap
    assert -math.inf < low < large.compared.mean < high < math.inf
    pooled = np.sqrt((2 * np.var(a, ddof=1) + 3 * np.var(b, ddof=1)) / 5)
    assert large.compared.effect == pytest.approx((np.mean(b) - np.mean(a)) / pooled * (1 - 3 / (4 * 5 - 1)), rel=0.01)


def test_samples_without_spread_or_of_one_have_an_answer():
    same = welch([1.0, 1.0], [2.0, 2.0])
    assert (same.mean, same.t, same.p, same.effect) == (-1.0, (-1.0, -1.0), 0.0, -np.inf)
    assert welch([1.0, 1.0], [1.0, 1.0]).p == 1.0 and welch([1.0, 1.0], [1.0, 1.0]).effect == 0.0
    one = welch([1.0], [2.0, 3.0])
    assert one.t == (-np.inf, np.inf) and one.p == 1.0 and one.effect is None and one.superiority == 1.0


def test_what_changes_no_result_makes_no_group(run):
    folders = [run("a", 2.0, 0), run("b", 2.1, 1, {"train.prefetch": 7, "data.workers": 0})]
    (group,) = compare_runs(folders).groups
    assert [one.seed for one in group.runs] == [0, 1] and group.name == "a"
    assert len(tables(compare_runs(folders))) == 1


def test_a_metric_is_named_and_may_be_better_higher(run):
    folders = [run("a", 2.0, accuracy=0.5), run("b", 2.1, changes=WIDE, accuracy=0.75)]
    found = compare_runs(folders, "text/accuracy")
    assert found.better == "higher" and found.groups[1].better == 1.0
    assert compare_runs(folders, "text/accuracy", "lower").groups[1].better == 0.0
    assert compare_runs(folders, "train/loss").groups[0].values == (2.25,)


def test_without_a_common_held_out_loss_runs_are_compared_by_training_loss_and_it_says_so(run):
    folders = [run("a", 2.0), run("b", 2.1, 1)]
    lines = (folders[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folders[1] / "metrics.jsonl").write_text("".join(line for line in lines if "evaluation" not in line))
    found = compare_runs(folders)
    assert found.metric == "train/loss"
    (note,) = found.notes
    assert "train/loss" in note and str(folders[1]) in note and str(folders[0]) not in note
    assert note in tables(found)[0].notes
    assert compare_runs(folders, "train/loss").notes == ()


def test_a_run_that_lost_its_patience_is_finished_and_it_says_so(run):
    stops = {"train.steps": 40, "train.evaluate_every": 1, "train.patience": 2}

    def stopped(name, seed, losses):
        folder = run(name, 2.0, seed, stops, steps=len(losses))
        lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
        lines += [
            {"step": step, "evaluation": {"text": {"loss": loss}}, "metric": loss}
            for step, loss in enumerate(losses, 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    patient = stopped("patient", 0, [3.0, 2.5, None, 2.6])
    found = compare_runs([patient, stopped("other", 1, [3.0, 2.0, 2.1, 2.1])])
    assert found.groups[0].values == (2.6, 2.1)
    assert [f"step {n} of 40" in note for n, note in zip((4, 4), found.notes, strict=True)] == [True, True]
    with pytest.raises(UserError, match="killed is at step 3 of 40: finish it first"):
        compare_runs([patient, stopped("killed", 2, [3.0, 2.5, 2.6])])


def test_the_evaluation_of_the_finished_run_counts(run):
    folders = [run("a", 2.0), run("b", 2.1, 1)]
    (folders[0] / "evaluation.json").write_text(json.dumps({"step": 4, "tasks": {"text": {"loss": 1.5}}}))
    assert compare_runs(folders).groups[0].values == (1.5, 2.1)


def test_runs_that_were_evaluated_in_different_ways_are_different(run):
    folders = [run("a", 2.0), run("b", 2.1, 1)]
    results = {"step": 4, "tasks": {"text": {"loss": 1.5}}, "overrides": {"evaluation.batch_size": "7"}}
    (folders[0] / "evaluation.json").write_text(json.dumps(results))
    found = compare_runs(folders)
    assert len(found.groups) == 2 and "evaluation.batch_size" in str(found)


def test_fields_that_differ_are_told_whole_where_their_kinds_differ():
    configs = [{"a": {"x": 1, "y": 2}, "b": [1, 2]}, {"a": {"x": 3, "y": 2}, "b": [1, 4]}, {"a": None, "b": [1, 2]}]
    found = fields(configs)
    assert found == {"a": ({"x": 1, "y": 2}, {"x": 3, "y": 2}, None), "b.1": (2, 4, 2)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: [run("a", 2.0), run("b", 2.1)], "a and .*b are the same run, seed 0: name one of them"),
        (lambda run: [run("a", 2.0), run("b", 2.1, steps=2)], "b is at step 2 of 4: finish it first"),
        (lambda run: [run("a", 2.0), run("a2", 2.0).parent / "nowhere"], "nowhere is not a run folder"),
        (lambda run: [run("a", 2.0), run("b", float("nan"), 1)], "b: text/loss is not finite"),
    ],
)
def test_mistakes_are_one_line(run, spoil, message):
    with pytest.raises(UserError, match=message) as raised:
        compare_runs(spoil(run))
    assert "\n" not in str(raised.value)


def test_an_unknown_metric_names_the_nearest(run):
    with pytest.raises(UserError, match="no metric 'text/los': did you mean text/loss"):
        compare_runs([run("a", 2.0), run("b", 2.1, 1)], "text/los")


def test_a_torn_line_is_told(run):
    folders = [run("a", 2.0), run("b", 2.1, 1)]
    with (folders[1] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    with pytest.raises(UserError, match="metrics.jsonl, line 6 is not JSON"):
        compare_runs(folders)
