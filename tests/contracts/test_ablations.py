"""Every ablation in experiments/ loads, with valid points, claims that can be read, and models that can be changed."""

from pathlib import Path

import pytest

from polygpt.ablation import claims, results
from polygpt.ablation.study import FILE, load_ablation, places, points
from polygpt.evaluation import conditions
from polygpt.models.functional import bind
from polygpt.spec import from_json, to_json

FILES = sorted((Path(__file__).parents[2] / "experiments" / "ablations").glob(f"*/{FILE}"))


def test_there_are_ablations():
    assert {"glu", "extrapolation", "sinks"} <= {path.parent.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_an_ablation_is_whole(path):
    ablation = load_ablation(path)
    claims.check(ablation.claims, ablation.variants, ablation.axes())
    assert f"polygpt ablate {path.parent.name}" in path.read_text()
    for variant, at in places(ablation):
        assert len(results.candidates(ablation, variant, at)) == len(ablation.tuned)
    for point in points(ablation):
        experiment = point.experiment
        assert from_json(to_json(experiment)) == experiment
        changed = {name: task for name, task in experiment.evaluation.tasks.items() if task.model}
        trained = bind(experiment.model, experiment.tokenizer.build().vocabulary) if changed else None
        for name, task in changed.items():
            assert conditions.model_of(name, task, trained).spec != experiment.model, f"{name} changes nothing"
