"""What may change while a run goes on, and what makes it another run."""

import contextlib
import dataclasses
from pathlib import Path

import pytest
from tiny_experiment import experiment

from polygpt.errors import UserError
from polygpt.models.decoder import DecoderSpec
from polygpt.models.encoder_decoder import EncoderDecoder
from polygpt.overrides import override
from polygpt.runtime.manifest import Record, seal
from polygpt.spec import load_file, to_json
from polygpt.training.workdir import EQUIVALENT_SETTINGS, claim, require_same


def saved(folder, made):
    """A run's folder as it is left when it has saved once."""
    with contextlib.ExitStack() as stack:
        claim(folder, made, stack)
    place = folder / "checkpoints" / "7"
    place.mkdir(parents=True)
    seal(place, Record(7, None, True), 1)
    return folder


@pytest.fixture
def workdir(tmp_path):
    return saved(tmp_path, experiment())


def quickstart():
    """An experiment with adapters."""
    return load_file(Path(__file__).parents[2] / "experiments" / "quickstart.py").experiment()


@pytest.mark.parametrize(
    "changes",
    [
        {"train.parallel": "sharded", "train.mesh.fsdp": "4", "train.mesh.tensor": "2"},
        {"train.processes.barrier_timeout": "5", "train.prefetch": "3", "train.log_every": "7"},
        {"train.checkpoint.every": "9", "train.checkpoint.keep_every": "90", "train.use": "latest"},
        {"model.decoder.remat": "full", "train.steps": "99"},
        {"train.steps": "99", "optim.schedule_steps": "60", "optim.rewarm": "5"},
    ],
)
def test_a_run_goes_on_elsewhere_and_with_another_rhythm(workdir, changes):
    chosen = override(experiment(), changes)
    assert to_json(chosen) != to_json(experiment())
    require_same(workdir, chosen)


def test_towers_may_be_computed_twice_when_a_run_goes_on(tmp_path):
    workdir = saved(tmp_path, quickstart())
    require_same(workdir, override(quickstart(), {"model.adapters.image.tower.remat": "full"}))
    with pytest.raises(UserError, match="model.adapters.image.tower.depth"):
        require_same(workdir, override(quickstart(), {"model.adapters.image.tower.depth": "7"}))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"optim.ema": "0.5"}, "optim.ema is 0.9 there, 0.5 here"),
        ({"train.steps": "59"}, "train.steps is 60 there, 59 here"),
        ({"data.batch_size": "8"}, "data.batch_size"),
        ({"model.decoder.dropout": "0"}, "model.decoder.dropout"),
        ({"train.metric": "text/loss"}, "train.metric"),
        ({"seed": "1"}, "seed is 0 there, 1 here"),
    ],
)
def test_other_mathematics_are_another_run(workdir, changes, named):
    with pytest.raises(UserError, match=f"is a run with a different configuration: {named}"):
        require_same(workdir, override(experiment(), changes))


def test_the_settings_that_may_change_exist():
    both = EncoderDecoder(encoder=DecoderSpec(mask="bidirectional"))
    for name in EQUIVALENT_SETTINGS:
        spec = quickstart()
        for part in name.split("."):
            spec = both if part == "encoder" else spec
            if part == "*":
                spec = next(iter(spec.values()))
                continue
            assert part in {field.name for field in dataclasses.fields(spec)}, name
            spec = getattr(spec, part)
