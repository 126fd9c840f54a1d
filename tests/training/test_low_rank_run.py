"""A run with low-rank updates of another run's matrices: only they change, and the opened model has them merged."""

import json

import jax
import numpy as np
import pytest
from tiny_experiment import experiment

from polygpt.errors import SpecError
from polygpt.evaluation.evaluate import evaluate
from polygpt.init.from_run import FromRun
from polygpt.models.functional import bind
from polygpt.models.low_rank import LowRank
from polygpt.overrides import override
from polygpt.parameters import paths
from polygpt.runtime.stored import read_parameters
from polygpt.training.held_out import plan
from polygpt.training.loggers import JsonLines, Silent
from polygpt.training.loop import train
from polygpt.training.program import assemble
from polygpt.training.run import open_run

pytestmark = pytest.mark.usefixtures("compiled_once")

SMALL = {
    "optim.accumulate": "1",
    "train.steps": "4",
    "train.evaluate_every": "4",
    "train.use": "latest",
    "evaluation.tasks.text.limit": "3",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, the experiment that starts from it, and its run."""
    folder = tmp_path_factory.mktemp("runs")
    chosen = override(experiment(), SMALL)
    train(chosen, folder / "base", lambda *_: [Silent()])
    chosen = chosen.replace(
        model=chosen.model.replace(low_rank=LowRank("attention", rank=2, magnitude=True)),
        init=FromRun(path=str(folder / "base")),
    )
    train(chosen, folder / "tuned", lambda *where: [JsonLines(*where[:2])])
    return folder / "base", chosen, folder / "tuned"


def stored(chosen, workdir):
    model = bind(chosen.model, chosen.tokenizer.build().vocabulary)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), model.abstract())
    return model, read_parameters(workdir / "checkpoints", 4, target, averaged=True)


def test_only_the_updates_change(runs):
    base, chosen, tuned = runs
    expected, (_, found) = paths(open_run(base).params), stored(chosen, tuned)
    updates = paths(found.pop("low_rank"))
    assert paths(found).keys() == expected.keys() and updates
    for name, value in paths(found).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert all(np.any(value) for name, value in updates.items() if not name.endswith("down"))


def test_an_opened_run_has_the_updates_merged(runs):
    _, chosen, tuned = runs
    opened, (model, params) = open_run(tuned), stored(chosen, tuned)
    assert opened.model.spec.low_rank is None
    expected = paths(model.merge(params))
    assert paths(opened.params).keys() == expected.keys()
    for name, value in paths(opened.params).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-7, err_msg=name)


def test_a_run_that_starts_from_it_has_the_updates_merged(runs):
    base, chosen, tuned = runs
    init = FromRun(path=str(tuned), exclude="attention/value")
    plain = override(experiment(), SMALL).replace(init=init)
    for model in (plain.model, chosen.model):
        following = plain.replace(model=model)
        state = assemble(following, following.tokenizer.build().vocabulary).first_state()
        found = paths(state.params)
        for name, value in paths(open_run(tuned).params).items():
            if "attention/value" not in name:
                np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
        new = [value for name, value in found.items() if name.startswith("low_rank/") and not name.endswith("/down")]
        assert not np.any([np.any(value) for value in new]) and bool(new) == (model.low_rank is not None)
    changed = paths(open_run(tuned).params)["decoder/blocks/attention/query/kernel"]
    assert not np.allclose(changed, paths(open_run(base).params)["decoder/blocks/attention/query/kernel"], rtol=1e-3)


def test_an_evaluation_that_changes_updates_is_refused_before_training(runs):
    _, chosen, _ = runs
    tasks = {"text": chosen.evaluation.tasks["text"].replace(model={"low_rank.alpha": 1.0})}
    with pytest.raises(SpecError, match="task 'text'.*low_rank"):
        chosen.replace(evaluation=chosen.evaluation.replace(tasks=tasks))


def test_the_evaluation_during_training_is_that_of_the_opened_run(runs):
    _, chosen, tuned = runs
    opened = open_run(tuned)
    found = evaluate(
        opened.model, opened.params, opened.tokenizer, chosen.model.adapters, chosen.data.layout, plan(chosen)
    )
    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    metric = next(line["metric"] for line in reversed(lines) if "metric" in line)
    np.testing.assert_allclose(metric, found["tasks"]["text"]["loss"], rtol=1e-6)
