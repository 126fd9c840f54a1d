"""What specifications refuse: for every field that a `require` names, a value just outside and perhaps one inside.

`requirements.json` lists them: {"Class": {"field": [refused, accepted]}}, or [refused] where nothing near is accepted.
"""

import ast
import inspect
import json
import re
import textwrap
from pathlib import Path

import pytest
from discovery import minimal, specs

from polygpt.errors import SpecError
from polygpt.spec import Spec

TABLE = json.loads(Path(__file__).with_name("requirements.json").read_text())
FOLDERS = ("attention", "nn", "adapters", "blocks", "models", "data", "optim", "objectives", "generation", "evaluation")
FOLDERS += ("runtime", "init", "training", "heads")
CLASSES = {found.id: found.values[0] for folder in FOLDERS for found in specs(f"polygpt.{folder}", Spec)}
RELATIVE = {"MultiHead.position", "Recurrent.norm", "Stateful.position", "TalkingHeads.backend", "ModelSpec.low_rank"}
RELATIVE |= {
    "ModelSpec.prefix",
    "CrossSequential.cross",
    "MixtureOfExperts.normalize",
    "MixtureOfExperts.groups",
    "EvalTask.metrics",
    "MRope.sections",
    "Reference.model",
    "StackSpec.norm_placement",
    "Embedded.labels",
    "MediaFolder.labels",
    "TrainSpec.phases",
    "TrainSpec.plateau",
    "TopKDistillation.remainder",
}
"""Refused for what another field holds: tested with their classes."""
ROWS = [(name, field, *values) for name, row in TABLE.items() for field, values in row.items()]


@pytest.mark.parametrize("name, field, refused, accepted", [(*row, None)[:4] for row in ROWS])
def test_a_value_outside_is_refused_by_name_and_one_inside_is_not(name, field, refused, accepted):
    base = minimal(CLASSES[name])
    with pytest.raises(SpecError, match=rf"{name}\.{field} is {re.escape(repr(_as_held(refused)))}: it must be "):
        base.replace(**{field: refused})
    if len(TABLE[name][field]) > 1:
        base.replace(**{field: accepted})


def _as_held(value):
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("name", CLASSES)
def test_every_requirement_is_in_the_table(name):
    required = set()
    for function in filter(inspect.isfunction, vars(CLASSES[name]).values()):
        if function.__code__.co_filename != inspect.getsourcefile(CLASSES[name]):
            continue  # written by dataclasses
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.require":
                required.add(node.args[1].value if isinstance(node.args[1], ast.Constant) else "")
    required.discard("")  # in a loop over fields
    listed = {field for field in required if f"{name}.{field}" in RELATIVE} | TABLE.get(name, {}).keys()
    assert required <= listed, "add a refused and an accepted value to requirements.json"
