"""Configurations of older versions."""

import json

import pytest

from polygpt import spec
from polygpt.data.sources.folder import MediaFolder
from polygpt.errors import UserError
from polygpt.migration import SCHEMA, migrate
from polygpt.runtime.checkpoint import CheckpointSpec
from polygpt.runtime.watchdog import WatchdogSpec


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
