"""No module of these folders imports, wherever in the file, one that leads back to it."""

import graphlib
from pathlib import Path

import pytest

from polygpt.ablation.provenance import PACKAGE, _read


@pytest.mark.parametrize("folder", ["ablation", "evaluation"])
def test_imports_make_no_circle(folder):
    graph = {}
    for file in sorted((PACKAGE / folder).rglob("*.py")):
        name = ".".join(("polygpt", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        imported = _read(Path(file), file.stat().st_mtime_ns)[1]
        graph[name] = {one for one in imported if one.startswith(f"polygpt.{folder}.") and one != name}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert len(graph) > 3 and set(graph) <= set(order)
