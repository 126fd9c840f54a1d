"""Every ablation in experiments/ loads, with valid points, claims that can be read, and models that can be changed."""

from pathlib import Path

import pytest

from polygpt.ablation import claims, results, summary
from polygpt.ablation.study import FILE, load_ablation, places, points
from polygpt.evaluation import conditions
from polygpt.models.functional import bind
from polygpt.spec import from_json, to_json

FILES = sorted((Path(__file__).parents[2] / "experiments" / "ablations").glob(f"*/{FILE}"))


NAMES = "extrapolation fusion glu mup norm_placement positions prefix qk_norm sinks".split()


def test_there_are_ablations_and_most_claims_of_papers_are_decided():
    assert set(NAMES) <= {path.parent.name for path in FILES}
    decided = undecided = 0
    for path in FILES:
        found = results.frame(load_ablation(path), results.read(path.with_name(results.RESULTS)))
        assert len(found.seeds) >= 5 and summary.missing(found)[0] == 0, path.parent.name
        verdicts = [one.verdict for one in summary.verdicts(found)] if found.ablation.paper else []
        decided += len(verdicts) - verdicts.count("undecided")
        undecided += verdicts.count("undecided")
    print(f"of {decided + undecided} claims of papers {decided} are held or refuted")
    assert decided >= 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_an_ablation_is_whole(path):
    ablation = load_ablation(path)
    claims.check(ablation.claims, ablation.variants, ablation.axes())
    for words in (f"polygpt ablate {path.parent.name}", "Expected", "On 2 CPU cores"):
        assert words in " ".join(path.read_text().split()), f"the docstring lacks {words!r}"
    for variant, at in places(ablation):
        assert len(results.candidates(ablation, variant, at)) == len(ablation.tuned)
    for point in points(ablation):
        experiment = point.experiment
        assert from_json(to_json(experiment)) == experiment
        changed = {name: task for name, task in experiment.evaluation.tasks.items() if task.model}
        trained = bind(experiment.model, experiment.tokenizer.build().vocabulary) if changed else None
        for name, task in changed.items():
            assert conditions.model_of(name, task, trained).spec != experiment.model, f"{name} changes nothing"
