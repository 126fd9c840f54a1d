"""A mesh that splits nothing is refused."""

import pytest
from jax.sharding import AbstractMesh
from tiny_experiment import experiment

from polygpt.errors import UserError
from polygpt.models.functional import bind
from polygpt.sharding import AXES, Layout
from polygpt.training.program import _require_splits


def require_splits(**sizes):
    model = bind(experiment().model, vocabulary=256)
    layout = Layout(AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES))
    _require_splits(layout, model.abstract(), model.axes())


def test_an_axis_of_the_mesh_that_divides_no_parameter_is_named():
    require_splits(data=3, tensor=4, fsdp=2)
    require_splits(expert=3)  # nothing is routed: its devices share the rows
    with pytest.raises(UserError, match="train.mesh.tensor is 5, and it divides no axis of any parameter"):
        require_splits(tensor=5)
    with pytest.raises(UserError, match="train.mesh.fsdp is 3"):
        require_splits(fsdp=3, tensor=2)
