"""Every file in experiments/ loads, goes through JSON, and its model fits the rows that it asks for."""

import re
from pathlib import Path

import jax
import pytest

from batches import build
from polygpt import topology
from polygpt.models.functional import bind
from polygpt.spec import from_json, load_file, to_json
from polygpt.training.experiment import Experiment

ROOT = Path(__file__).parents[2] / "experiments"
FILES = [path for path in sorted(ROOT.rglob("*.py")) if "def experiment()" in path.read_text()]


def test_there_are_experiments():
    assert ROOT / "quickstart.py" in FILES


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.py")), ids=lambda path: path.stem)
def test_a_preset_names_the_slices_that_its_plans_are_for(path):
    suits, said = load_file(ROOT / "plans" / "write.py").SLICES[path.stem], load_file(path).__doc__
    on = re.search(r"polygpt plan \S+ --on (\S+)", said)[1]
    assert on == suits[0]
    names = {topology.explain_name(name).rpartition(" ")[2] for name in re.findall(r"\bv\w+-\d+", said)}
    assert on in names and names <= set(suits)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_experiment_loads_and_its_model_fits_its_rows(path):
    module = load_file(path)
    assert module.__doc__ and "polygpt train" in module.__doc__, "its docstring says how to run it"
    experiment = module.experiment()
    assert isinstance(experiment, Experiment)
    assert from_json(to_json(experiment)) == experiment
    model = bind(experiment.model, experiment.tokenizer.build().vocabulary)
    rows, length = experiment.data.batch_size, experiment.data.layout.seq_len
    row = build([[]], length, adapters=experiment.model.adapters)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), row)
    outputs = jax.eval_shape(model.apply, model.abstract(), batch)
    assert outputs.logits_BTV.shape == (rows, length, model.vocabulary)
