"""Configurations of older versions."""

import dataclasses
import json

import pytest

from polygpt import spec
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.sources.embedded import Embedded
from polygpt.data.sources.folder import MediaFolder
from polygpt.errors import SpecError, UserError
from polygpt.migration import NO_DECAY, RENAMED, SCHEMA, migrate
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import Constant, WarmupCosine
from polygpt.overrides import override
from polygpt.runtime.checkpoint import CheckpointSpec
from polygpt.runtime.watchdog import WatchdogSpec
from polygpt.sharding import RULES, MeshSpec
from polygpt.training.experiment import Experiment, TrainSpec


class Mine(Constant):
    """A schedule of one's own: it inherits the renamed field."""


def test_classes_that_moved_and_fields_that_were_added_are_those_of_schema_1():
    old = {
        "class": "polygpt.training.checkpoint:CheckpointSpec",
        **{name: value for name, value in spec.to_json(CheckpointSpec(every=7)).items() if name != "class"},
    }
    assert spec.from_json(migrate(old, "config.json")) == CheckpointSpec(every=7)
    folder = {name: value for name, value in spec.to_json(MediaFolder("media")).items()}
    for name in ("text_placeholders", "follow_links", "ignore"):
        del folder[name]
    found = spec.from_json(migrate({"tasks": [folder]}, "config.json"))["tasks"][0]
    assert found == MediaFolder("media", text_placeholders=True)


def test_what_this_version_wrote_is_left_as_it_is():
    data = json.loads(json.dumps(spec.to_json(WatchdogSpec())))
    assert migrate({"schema": SCHEMA, **data}, "config.json") == data


def test_the_schema_of_a_newer_version_is_an_error():
    with pytest.raises(UserError, match=rf"config.json has schema {SCHEMA + 1} .*update polygpt"):
        migrate({"schema": SCHEMA + 1}, "config.json")


def test_fields_of_schema_2_are_known_by_their_names_then():
    data = {"class": "polygpt.data.layout:LayoutSpec", **spec.to_json(LayoutSpec(64))}
    old = {{"seq_len": "length"}.get(name, name): value for name, value in data.items()}
    assert spec.from_json(migrate({"schema": 2, "layout": old}, "config.json"))["layout"] == LayoutSpec(64)
    rules = {"batch": ("data",), **{name: axes for name, axes in RULES.items() if name != "batch"}}
    data = json.loads(json.dumps(spec.to_json(MeshSpec(rules=rules))))
    data["rules"] = {"rows" if axis == "batch" else axis: axes for axis, axes in data["rules"].items()}
    assert spec.from_json(migrate({"schema": 2, **data}, "config.json")) == MeshSpec(rules=rules)


def test_a_former_name_on_the_command_line_or_in_a_file_is_an_error_that_names_todays():
    for cls, old, new in (
        (LayoutSpec, "length", "seq_len"),
        (WarmupCosine, "peak", "peak_lr"),
        (Mine, "peak", "peak_lr"),
    ):
        with pytest.raises(SpecError, match=f"no field '{old}': it is called {new} now"):
            override(cls(64) if cls is LayoutSpec else cls(1e-3), {old: "2"})
    with pytest.raises(SpecError, match="it is called seq_len now"):
        spec.from_json({"class": "polygpt.data.layout:LayoutSpec", "length": 4})


@pytest.mark.parametrize("name", RENAMED)
def test_every_class_of_the_table_exists_and_has_the_new_fields(name):
    fields = {field.name for field in dataclasses.fields(spec.load_class(name))}
    for old, new in RENAMED[name].items():
        assert new in fields and old not in fields


def test_a_configuration_of_schema_2_is_todays_experiment():
    """Of an experiment whose every default was written down, under the names and with the fields of schema 2."""
    today = Experiment(
        "old", DataSpec({"text": Task(Embedded("text"))}, LayoutSpec(64), 4), Optim(Constant(1e-3)), TrainSpec(2)
    )
    former = {
        "LayoutSpec": {"seq_len": "length"},
        "DataSpec": {"batch_size": "rows"},
        "EvaluationSpec": {"batch_size": "rows"},
        "Constant": {"peak_lr": "peak"},
        "Optim": {"schedule_steps": None, "rewarm": None},
        "CheckpointSpec": {"every_minutes": None},
    }

    def aged(data):
        if isinstance(data, list):
            return [aged(item) for item in data]
        if not isinstance(data, dict):
            return data
        cls = data.get("class", "").rpartition(":")[2]
        names = former.get(cls, {})
        made = {names.get(name, name): aged(item) for name, item in data.items() if names.get(name, name) is not None}
        if cls == "Optim":
            made["no_decay"] = NO_DECAY
        if cls == "MeshSpec":
            made["rules"] = {"rows" if axis == "batch" else axis: item for axis, item in made["rules"].items()}
        return made

    old = {"schema": 2, **aged(json.loads(json.dumps(spec.to_json(today))))}
    train = today.train.replace(checkpoint=today.train.checkpoint.replace(every_minutes=None))
    assert spec.from_json(migrate(old, "config.json")) == today.replace(train=train)

    task = {name: value for name, value in spec.to_json(Task(Embedded("text"))).items() if name != "transform"}
    assert spec.from_json(migrate({"schema": 4, "task": task}, "config.json"))["task"] == Task(Embedded("text"))

    own = {"schema": 2, "optim": old["optim"], "data": {"class": "somewhere/mine.py:Mine"}}
    assert migrate(own, "config.json")["optim"]["no_decay"] == NO_DECAY, "a module of one's own may rely on it"
