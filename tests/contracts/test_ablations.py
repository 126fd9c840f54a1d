"""Every ablation in experiments/ loads, with valid points, claims that can be read, and models that can be changed."""

import contextlib
import itertools
import json
import statistics
from pathlib import Path

import pytest

from polygpt.ablation import claims, results, summary
from polygpt.ablation.study import FILE, load_ablation, places, points
from polygpt.data.fetch import Unreachable, fetch
from polygpt.evaluation import conditions
from polygpt.models.functional import bind
from polygpt.spec import from_json, to_json
from polygpt.training.program import assemble
from polygpt.training.seeds import Streams

FILES = sorted((Path(__file__).parents[2] / "experiments" / "ablations").glob(f"*/{FILE}"))


NAMES = "extrapolation fusion glu mup norm_placement positions prefix qk_norm sinks".split()


def test_there_are_ablations_and_most_claims_of_papers_are_decided():
    assert set(NAMES) <= {path.parent.name for path in FILES}
    decided = undecided = 0
    for path in FILES:
        found = results.frame(load_ablation(path), results.read(path.with_name(results.RESULTS)))
        assert len(found.seeds) >= 5 and not summary.missing(found), path.parent.name
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


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_what_is_recorded_is_what_the_code_trains(path):
    """The beginning of a recorded run, trained again: results are kept by the package's number, not by its code, so a
    change that moves these losses has to change `polygpt.__version__`."""
    ablation, lines = load_ablation(path), results.read(path.with_name(results.RESULTS))
    found = {line["key"]: line for line in lines}
    chosen = (results.choose(ablation, variant, at, found) for variant, at in places(ablation))
    keys = {results.key(made.experiment): made.experiment for made in chosen}
    record = next(line for line in lines if line["key"] in keys and not line["diverged"])
    experiment = keys[record["key"]]
    if "state-of-the-union" in json.dumps(to_json(experiment)):
        try:
            fetch("state-of-the-union")
        except Unreachable as error:
            pytest.skip(str(error))
    steps = record["curve"]["step"][0]
    tokenizer = experiment.tokenizer.build()
    program = assemble(experiment, tokenizer.vocabulary, seeds=[experiment.seed])
    state, losses = program.parallel.create(program.initial), []
    streams = Streams(experiment.data, tokenizer, experiment.model.adapters, program.seeds)
    with contextlib.closing(streams):
        for batch in itertools.islice(streams, steps):
            state, metrics = program.step(state, batch)
            losses.append(float(metrics["loss"][0]))
    assert statistics.fmean(losses) == pytest.approx(record["curve"]["loss"][0], rel=1e-3)
