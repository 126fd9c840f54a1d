"""An ablation as a specification: the points that it asks for, and what is wrong with it before anything runs."""

import dataclasses
from typing import ClassVar

import pytest
from tiny_runs import experiment

from own_ablation import write_ablation
from polygpt.ablation.budget import Budget
from polygpt.ablation.claims import Claim
from polygpt.ablation.study import Ablation, find_ablation, load_ablation, point, points
from polygpt.ablation.variants import grid, zipped
from polygpt.attention.sliding import SlidingWindow
from polygpt.errors import SpecError, UserError
from polygpt.evaluation.classification import Classification
from polygpt.evaluation.metric import Measure, Metric
from polygpt.overrides import replaced

DEPTH, WIDTH = "model.decoder.depth", "model.decoder.width"


def ablation(**settings) -> Ablation:
    settings = {"variants": {"base": {}, "deep": {DEPTH: 2}}} | settings
    return Ablation("Is deep better?", experiment(), **settings)


def test_points_are_variants_at_all_values_of_all_factors():
    widths = {"width": grid(WIDTH, 16, 32), "rate": grid("optim.schedule.peak_lr", 0.1)}
    found = points(ablation(over=widths, reads={"length": {8: "text/loss", 16: "text/perplexity"}}))
    assert [(made.variant, made.at) for made in found] == [
        ("base", {"width": 16, "rate": 0.1}),
        ("base", {"width": 32, "rate": 0.1}),
        ("deep", {"width": 16, "rate": 0.1}),
        ("deep", {"width": 32, "rate": 0.1}),
    ]
    last = found[-1]
    assert last.name == "deep, width 32, rate 0.1"
    assert last.experiment == experiment(
        model__decoder__depth=2, model__decoder__width=32, optim__schedule__peak_lr=0.1
    )


def test_the_tuned_grid_is_applied_where_a_value_is_asked_for():
    tuned = ablation(tuned=grid("optim.schedule.peak_lr", 0.1, 0.2))
    assert points(tuned)[0].experiment == experiment()
    made = point(tuned, "deep", {}, 0.2)
    assert made.experiment == experiment(model__decoder__depth=2, optim__schedule__peak_lr=0.2)
    assert (made.tuned, made.name) == (0.2, "deep, tuned 0.2")


def test_a_factor_may_change_what_lies_inside_of_what_a_variant_sets():
    windows = {"sliding": {"model.decoder.attention": SlidingWindow(heads=2)}}
    made = ablation(variants=windows, over={"window": grid("model.decoder.attention.window", 3)})
    assert points(made)[0].experiment.model.decoder.attention == SlidingWindow(heads=2, window=3)


def test_a_budget_is_held_at_every_value_of_a_factor():
    lengths = grid("data.layout.seq_len", 48, 96)
    made = ablation(
        variants={"base": {}, "wide": {"data.batch_size": 8}}, over={"length": lengths}, budget=Budget("tokens")
    )
    assert [made.experiment.train.steps for made in points(made)] == [12, 12, 6, 6]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"variants": {}}, "Ablation.variants is {}: it must be at least one, each with a name"),
        ({"variants": {"": {}}}, "at least one, each with a name"),
        ({"variants": {"a-b": {}, "a b": {}}}, "variants 'a-b' and 'a b' are both written a_b in claims: rename one"),
        ({"claims": (Claim("deep < wide"),)}, "claim 'deep < wide': no variant is named 'wide'"),
        (
            {"claims": (Claim("deep < base"),), "over": {"width": grid(WIDTH, 8, 16)}},
            "claim 'deep < base': deep has a value for each width: write at(deep, width=16)",
        ),
        ({"seeds": 0}, "Ablation.seeds is 0"),
        ({"over": {"width": [1, 2]}}, "Ablation.over['width'] is [1, 2]: it must be a mapping from values to changes"),
        ({"over": {"width": {8: 8}}}, "Ablation.over['width'][8] is 8: it must be changes"),
        ({"over": {"width": {}}}, "factors with at least one value"),
        ({"reads": {"length": {8: 3}}}, "Ablation.reads['length'][8] is 3: it must be a metric"),
        ({"reads": {"a": {1: "text/loss"}, "b": {1: "text/loss"}}}, "at most one factor"),
        ({"over": {"a": {1: {}}}, "reads": {"a": {1: "text/loss"}}}, "a factor that is not also in `over`"),
        ({"tuned": {None: {}}}, "Ablation.tuned: the value None must be a number or a string"),
    ],
)
def test_an_ablation_that_makes_no_sense_is_refused(settings, fault):
    with pytest.raises(SpecError) as raised:
        ablation(**settings)
    assert fault in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"variants": {"deep": {"model.decoder.dept": 2}}}, "deep: --model.decoder.dept: DecoderSpec has no field"),
        ({"over": {"depth": grid(DEPTH, 1)}}, "deep, depth 1: variant 'deep' and depth 1 both change model.decoder.d"),
        ({"metric": "txt/loss"}, "base: the metric 'txt/loss' belongs to no held-out task: did you mean text?"),
        ({"metric": "loss"}, "the metric 'loss' must be 'task/measure'"),
        ({"metric": "text/accuracy"}, "the metric 'text/accuracy' must be one of loss, perplexity"),
        ({"reads": {"length": {8: "at_8/loss"}}}, "the metric 'at_8/loss' belongs to no held-out task"),
        (
            {"variants": {"base": {}, "long": {"train.steps": 24}}, "budget": Budget("tokens")},
            "long: it changes train.steps, which the budget by tokens sets",
        ),
    ],
)
def test_a_point_that_makes_no_sense_is_named(settings, fault):
    with pytest.raises(SpecError) as raised:
        points(ablation(**settings))
    assert fault in str(raised.value)


def test_a_task_that_only_a_factor_brings_can_be_the_metric():
    held_out = experiment().evaluation.tasks["text"]
    made = ablation(metric="more/loss", over={"length": {48: {"evaluation.tasks.more": held_out}}})
    assert points(made)[0].experiment.evaluation.tasks["more"] == held_out
    assert made.measure.better == "lower"


@dataclasses.dataclass(frozen=True)
class Distance(Metric):
    """Two figures, of which one is declared."""

    measures: ClassVar = (Measure("mae", "lower", "MAE", "years"),)


def written(*metrics):
    task = experiment().evaluation.tasks["text"].replace(generate=True, metrics=metrics)
    base = replaced(experiment(train__evaluate="full"), {"evaluation.tasks.text": task})
    return ablation(metric="text/mae").replace(base=base)


def test_the_direction_and_the_unit_are_the_metrics_own_unless_they_are_given():
    assert (ablation().measure.better, ablation().heading) == ("lower", "text/loss (nats per token)")
    accuracy = ablation(metric="text/token_accuracy")
    assert (accuracy.measure.better, accuracy.heading) == ("higher", "text/token_accuracy")
    assert ablation(better="higher", unit="nats per byte").heading == "text/loss (nats per byte)"
    assert ablation(better="higher").measure.better == "higher"
    mae = written(Distance())
    assert (mae.measure.better, mae.heading) == ("lower", "text/mae (years)")


def test_a_figure_that_no_metric_declares_has_no_direction():
    undeclared = written(Classification(), Plain())
    with pytest.raises(SpecError, match="Ablation.better is null, and text/mae does not declare a direction"):
        assert undeclared.heading
    assert undeclared.replace(better="higher").measure.better == "higher"
    with pytest.raises(SpecError, match="'text/mse' is not measured"):
        points(written(Distance()).replace(metric="text/mse"))


@dataclasses.dataclass(frozen=True)
class Plain(Metric):
    """Declares nothing."""


def test_an_ablation_is_found_by_its_name_its_folder_and_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_ablation(tmp_path / "experiments" / "ablations" / "width_of_mlp")
    assert find_ablation("width-of-mlp").resolve() == file
    assert find_ablation(file.parent) == file == find_ablation(file)
    assert list(load_ablation("width_of_mlp").variants) == ["base", "wide", "deep_2"]
    with pytest.raises(UserError, match="no ablation 'width-of' in .*: did you mean width_of_mlp"):
        load_ablation("width-of")


def test_a_file_that_makes_no_ablation_is_told(tmp_path):
    wrong, none = tmp_path / "wrong.py", tmp_path / "none.py"
    wrong.write_text("def ablation():\n    return 3\n")
    none.write_text("ABLATION = 3\n")
    with pytest.raises(UserError, match="wrong.py: ablation.. returns int: it must return an Ablation"):
        load_ablation(wrong)
    with pytest.raises(UserError, match="none.py: no function ablation"):
        load_ablation(none)


def test_factors_in_step_keep_their_numbers():
    both = zipped(grid(WIDTH, 16, 32), grid("model.decoder.attention.heads", 2, 4))
    assert ablation(over={"width": both}).axes() == {"width": (16, 32)}
