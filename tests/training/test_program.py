"""A mesh that splits nothing is refused; heads that it does not divide are named; what is printed when a run begins."""

import pytest
from jax.sharding import AbstractMesh
from tiny_experiment import experiment

from polygpt.attention.multi_head import MultiHead
from polygpt.errors import UserError
from polygpt.models.functional import bind
from polygpt.optim.mup import MuP
from polygpt.overrides import replaced
from polygpt.sharding import AXES, MeshLayout
from polygpt.training.program import _require_splits, _undivided_heads, assemble


def layout_of(**sizes):
    return MeshLayout(AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES))


def require_splits(**sizes):
    model, layout = bind(experiment().model, vocabulary=256), layout_of(**sizes)
    _require_splits(layout, model.abstract(), model.axes())


def test_an_axis_of_the_mesh_that_divides_no_parameter_is_named():
    require_splits(data=3, tensor=4, fsdp=2)
    require_splits(expert=3)  # nothing is routed: its devices share the rows
    with pytest.raises(UserError, match="train.mesh.tensor is 5, which divides no axis of any parameter"):
        require_splits(tensor=5)
    with pytest.raises(UserError, match="train.mesh.fsdp is 3"):
        require_splits(fsdp=3, tensor=2)


def test_heads_that_a_mesh_does_not_divide_are_named():
    chosen = experiment()
    heads = chosen.model.decoder.attention.heads
    assert not _undivided_heads(layout_of(tensor=heads, data=3), chosen)
    line = _undivided_heads(layout_of(tensor=2 * heads), chosen)[0]
    assert line.startswith(f"model.decoder: train.mesh.tensor {2 * heads} does not divide its {heads} heads")


def test_a_held_out_task_that_changes_parameters_is_refused_before_training():
    task = experiment().evaluation.tasks["text"].replace(model={"decoder.attention": MultiHead(heads=2, head_width=2)})
    chosen = replaced(experiment(), {"evaluation.tasks.narrow": task})
    with pytest.raises(UserError, match="evaluation task 'narrow', model: the parameter decoder/"):
        assemble(chosen, vocabulary=256)


def test_what_is_printed_when_a_run_begins_names_the_base_of_mup_and_its_factors():
    tiny = experiment()
    grown = tiny.replace(model=tiny.model.replace(mup=MuP({"decoder.width": 4})))
    first, base, header, *rows = assemble(grown, vocabulary=256).summary().splitlines()
    assert first.startswith("tiny: ") and base == "muP, relative to a base model with decoder.width 4"
    assert "muP" in header and any("hidden x 0.25" in " ".join(row.split()) for row in rows)
    assert "muP" not in assemble(tiny, vocabulary=256).summary()
