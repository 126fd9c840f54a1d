"""Results: what a run is known by, a file that survives whoever writes it, and the frame that is read from it."""

import dataclasses
import json
import math

import numpy as np
import pytest
from tiny_runs import experiment

from polygpt import migration
from polygpt.ablation import keys
from polygpt.ablation.keys import key
from polygpt.ablation.results import append, choose, frame, labelled, read
from polygpt.ablation.study import Ablation, point, points
from polygpt.ablation.variants import grid
from polygpt.errors import UserError
from polygpt.optim.schedules import WarmupCosine
from polygpt.overrides import replaced
from polygpt.runtime.checkpoint import CheckpointSpec
from polygpt.sources import hash_of_code
from polygpt.spec import Spec, load_file

OWN = '''"""An objective of one's own."""

import dataclasses

from polygpt.objectives.next_token import NextToken


@dataclasses.dataclass(frozen=True)
class Mine(NextToken):
    """Mine."""

    def total(self, outputs, batch):
        return super().total(outputs, batch) * {factor}  # {comment}


def ablation():
    return {asked}
'''


def own(folder, factor=1.0, comment="as it is", asked=1):
    """An experiment with a class of a file of that text."""
    folder.mkdir()
    (folder / "own.py").write_text(OWN.format(factor=factor, comment=comment, asked=asked))
    return experiment(objectives={"next_token": (load_file(folder / "own.py").Mine(), 1.0)})


def test_a_key_changes_with_what_changes_the_results_and_with_nothing_else():
    first = key(experiment())
    assert len(first) == 64 and first == key(experiment())
    same = experiment(name="another", train__log_every=3, data__workers=2, train__checkpoint=CheckpointSpec(every=3))
    assert key(same) == first
    others = [experiment(seed=1), experiment(train__steps=13), experiment(model__decoder__width=32)]
    others += [experiment(train__evaluate_every=None), experiment(optim__schedule__peak_lr=3.1e-3)]
    assert len({first, *map(key, others)}) == len(others) + 1


def test_a_key_outlives_a_field_that_is_added_until_it_is_set():
    schedule = WarmupCosine(3e-3, warmup=4)
    field = ("restarts", int, dataclasses.field(default=0))
    later = dataclasses.make_dataclass("WarmupCosine", [field], bases=(WarmupCosine,), frozen=True)
    later.__module__ = WarmupCosine.__module__  # make_dataclass of Python 3.12 sets its caller's
    before = key(experiment(optim__schedule=schedule))
    assert key(experiment(optim__schedule=later(3e-3, warmup=4))) == before
    assert key(experiment(optim__schedule=later(3e-3, warmup=4, restarts=1))) != before


def test_keys_know_a_renamed_field_and_a_moved_class_by_their_former_names(monkeypatch):
    def spec(name, field):
        cls = dataclasses.make_dataclass(name, [(field, float)], bases=(Spec,), frozen=True)
        cls.__module__ = "polygpt.somewhere"
        return cls(3e-3)

    old, new = spec("Old", "peak"), spec("New", "peak_lr")
    before = keys._given(old)
    assert before == {"class": "polygpt.somewhere:Old", "peak": 3e-3} != keys._given(new)
    monkeypatch.setitem(migration.RENAMED, "polygpt.somewhere:New", {"peak": "peak_lr"})
    monkeypatch.setitem(keys.FORMER_CLASSES, "polygpt.somewhere:New", "polygpt.somewhere:Old")
    assert keys._given(new) == before


def test_a_key_changes_with_the_version(monkeypatch):
    first = key(experiment())
    monkeypatch.setattr("polygpt.ablation.keys.VERSION", "99")
    assert key(experiment()) != first


def test_a_key_changes_with_the_code_of_own_classes_and_not_with_its_place_comments_or_what_is_asked(tmp_path):
    first = key(own(tmp_path / "one"))
    assert key(own(tmp_path / "two", comment="elsewhere", asked=2)) == first
    assert key(own(tmp_path / "three", factor=1.5)) != first
    assert key(experiment()) != first


CODE = b'''
@dataclass(frozen=True)
class Mine(Base):
    field: int = None

    async def call(self, *x, sep=None, **rest):
        """Has a docstring."""
        match x:
            case None | [1.5, *_]:
                yield lambda: f"{self!r:>{x}}"
'''


def test_the_hash_of_code_is_the_same_in_every_version_of_python():
    assert hash_of_code(CODE) == "14ab5e1c6b95767b2bb16397605b6df406d34499e0cbc24224186b166da11df6"  # by 3.11
    assert hash_of_code(CODE.replace(b"1.5", b"1.25")) != hash_of_code(CODE)


NOW = {"schema": 2}
LINES = [{"key": "a", "seed": 0}, {"key": "b", "seed": 1, "loss": math.inf}]


def test_lines_are_appended_and_read(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read(path) == []
    append(path, LINES[:1])
    append(path, LINES[1:])
    assert read(path) == [LINES[0] | NOW, {"key": "b", "seed": 1, "loss": None} | NOW]
    assert all(json.loads(line)["schema"] == 2 for line in path.read_text().splitlines())


def test_lines_without_a_schema_are_of_unknown_code_and_those_of_a_later_one_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": "a", "made": {"commit": "c"}}\n')
    assert read(path) == [{"key": "a", "made": {"commit": "c", "code": None}} | NOW]
    append(path, [{"key": "b", "schema": 3}])
    with pytest.raises(UserError, match="line 2 has schema 3, but this version supports 2: update polygpt"):
        read(path)


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path, cut):
    path = tmp_path / "results.jsonl"
    append(path, LINES[:1])
    path.write_bytes(path.read_bytes() + b'{"key": "b", "seed": 1}'[:cut])
    assert read(path) == [LINES[0] | NOW]
    append(path, [{"key": "c"}])
    assert read(path) == [LINES[0] | NOW, {"key": "c"} | NOW]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": "a"}')
    append(path, [{"key": "c"}])
    assert read(path) == [{"key": "a"} | NOW, {"key": "c"} | NOW]


def test_any_other_line_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": "a"}\n{"key": \n{"key": "c"}\n')
    with pytest.raises(UserError, match="results.jsonl, line 2 is not JSON: remove that line"):
        read(path)


# --- the frame --------------------------------------------------------------------------------------------------------


def ablation(**settings) -> Ablation:
    settings = {"variants": {"base": {}, "deep": {"model.decoder.depth": 2}}, "seeds": 2} | settings
    return Ablation("Is deep better?", experiment(), **settings)


def line(made, seed, loss, stage="comparison", **metrics):
    """A line for a run of a point; a loss of None is one that diverged."""
    record = {"seed": seed, "metrics": {"text/loss": loss, **metrics}, "diverged": loss is None}
    return labelled({"key": key(made.experiment.replace(seed=seed)), **record}, made, stage)


def test_a_frame_has_each_run_in_its_place():
    asked = ablation(over={"width": grid("model.decoder.width", 16, 32)})
    losses = {("base", 16): 1.0, ("base", 32): 2.0, ("deep", 16): 3.0, ("deep", 32): 4.0}
    lines = [line(p, s, losses[p.variant, p.at["width"]] + s / 10) for p in points(asked) for s in (1, 0)]
    found = frame(asked, lines)
    assert (found.seeds, found.axes) == ((0, 1), {"width": (16, 32)})
    np.testing.assert_array_equal(found.values["base"], [[1.0, 2.0], [1.1, 2.1]])
    np.testing.assert_array_equal(found.values["deep"], [[3.0, 4.0], [3.1, 4.1]])
    assert [(r["variant"], r["at"]["width"], r["seed"]) for r in found.records[:3]] == [
        ("base", 16, 0),
        ("base", 16, 1),
        ("base", 32, 0),
    ]


def test_what_is_missing_is_not_a_number_and_what_is_not_asked_for_is_left_out():
    asked = ablation()
    base, deep = points(asked)
    stale = line(base, 0, 7.0) | {"key": "of another time"}
    found = frame(asked, [stale, line(base, 0, 1.0), line(base, 1, 2.0), line(deep, 1, 3.0), line(base, 1000, 9.0)])
    np.testing.assert_array_equal(found.values["base"], [1.0, 2.0])
    np.testing.assert_array_equal(found.values["deep"], [np.nan, 3.0])
    assert len(found.records) == 3
    assert frame(asked, [], None).seeds == (0, 1) and np.isnan(frame(asked, []).values["deep"]).all()
    assert frame(asked, [line(base, 4, 1.0)]).seeds == (4,)


def test_a_factor_that_runs_are_read_at_is_the_last_axis():
    reads = {"length": {8: "text/perplexity", 16: "train/loss"}}
    asked = ablation(over={"width": grid("model.decoder.width", 16)}, reads=reads)
    lines = [line(p, 0, 1.0, **{"text/perplexity": 5.0, "train/loss": 6.0}) for p in points(asked)]
    found = frame(asked, lines)
    assert found.axes == {"width": (16,), "length": (8, 16)}
    np.testing.assert_array_equal(found.values["deep"], [[[5.0, 6.0]]])


def test_one_run_that_two_variants_ask_for_is_read_by_both():
    asked = ablation(variants={"base": {}, "same": {"model.decoder.depth": 1}})
    base, _ = points(asked)
    found = frame(asked, [line(base, 0, 1.0)])
    assert found.values["base"] == found.values["same"] == [1.0]
    assert [record["variant"] for record in found.records] == ["base", "same"]


def test_a_run_that_diverged_is_an_error_unless_it_counts_as_something():
    base, deep = points(ablation())
    lines = [line(base, 0, 1.0), line(deep, 0, None)]
    with pytest.raises(
        UserError, match="deep, seed 0: training diverged: lower its learning rate, or set Ablation.div"
    ):
        frame(ablation(), lines)
    assert frame(ablation(diverged=5.0), lines).values["deep"] == [5.0]
    worse = [line(base, 0, 1.0), line(deep, 0, 8.0)]
    assert frame(ablation(diverged=5.0), worse).values["deep"] == [5.0]
    higher = ablation(metric="text/token_accuracy", better="higher", diverged=0.1)
    accuracies = [
        line(base, 0, 1.0, **{"text/token_accuracy": 0.5}),
        line(deep, 0, 1.0, **{"text/token_accuracy": 0.0}),
    ]
    found = frame(higher, accuracies)
    assert (found.values["base"], found.values["deep"]) == ([0.5], [0.1])


def test_a_metric_that_was_not_measured_is_named_with_those_that_were():
    base, deep = points(ablation(metric="text/bits_per_byte"))
    with pytest.raises(UserError, match="base: 'text/bits_per_byte' was not measured; there are text/loss"):
        frame(ablation(metric="text/bits_per_byte"), [line(base, 0, 1.0), line(deep, 0, 1.0)])


# --- tuning -----------------------------------------------------------------------------------------------------------


def chosen(losses: dict, **settings):
    """The value that is chosen, given the losses of its runs by value."""
    settings = {
        "tuned": grid("optim.schedule.peak_lr", *losses),
        "tuning_seeds": len(next(iter(losses.values()))),
    } | settings
    asked = ablation(**settings)
    lines = [
        line(point(asked, "deep", {}, value), 1000 + i, loss, "tuning")
        for value, some in losses.items()
        for i, loss in enumerate(some)
    ]
    return choose(asked, "deep", {}, {found["key"]: found for found in lines})


@pytest.mark.parametrize(
    ("losses", "settings", "best"),
    [
        ({0.1: [3.0], 0.2: [2.0], 0.4: [2.5]}, {}, 0.2),
        ({0.1: [3.0, 1.0], 0.2: [1.5, 1.5]}, {}, 0.2),
        ({0.1: [2.0], 0.2: [2.0]}, {}, 0.1),
        ({0.1: [3.0], 0.2: [None]}, {}, 0.1),
        ({0.1: [3.0, 3.0], 0.2: [0.1, None]}, {}, 0.1),
        ({0.1: [3.0, 3.0], 0.2: [0.1, None]}, {"diverged": 5.0}, 0.2),
        ({0.1: [3.0], 0.2: [2.0]}, {"better": "higher"}, 0.1),
    ],
)
def test_the_best_mean_is_chosen_the_first_of_equals_and_none_that_diverged(losses, settings, best):
    found = chosen(losses, **settings)
    assert found.tuned == best
    assert found.experiment == replaced(experiment(model__decoder__depth=2), {"optim.schedule.peak_lr": best})


def test_nothing_is_chosen_before_all_is_there():
    asked = ablation(tuned=grid("optim.schedule.peak_lr", 0.1, 0.2))
    half = line(point(asked, "deep", {}, 0.1), 1000, 1.0, "tuning")
    assert choose(asked, "deep", {}, {half["key"]: half}) is None
    assert np.isnan(frame(asked, [half]).values["deep"]).all()


def test_a_variant_that_diverges_everywhere_is_an_error():
    with pytest.raises(UserError, match=r"deep: training diverged at every value of the tuned grid \(0.1, 0.2\)"):
        chosen({0.1: [None], 0.2: [None]})


def test_lines_are_json(tmp_path):
    made = points(ablation())[0]
    append(tmp_path / "results.jsonl", [line(made, 0, 1.0)])
    assert json.loads((tmp_path / "results.jsonl").read_text())["key"] == key(made.experiment)
