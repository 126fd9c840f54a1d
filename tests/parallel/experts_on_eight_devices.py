"""Losses and gradients of models with experts on meshes of eight CPU devices beside those of one device, as JSON.

Arguments: the names of meshes, of `MESHES`. Run as a process of its own: the number of devices is set once a process.
"""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, str(Path(__file__).parents[1]))

from batches import LIGHT, build, example, lively, tiny  # noqa: E402
from polygpt.models.functional import bind  # noqa: E402
from polygpt.nn.experts import MixtureOfExperts  # noqa: E402
from polygpt.objectives.load_balance import LoadBalance  # noqa: E402
from polygpt.objectives.next_token import NextToken  # noqa: E402
from polygpt.objectives.router_z import RouterZLoss  # noqa: E402
from polygpt.sharding import MeshSpec, make_layout, tree_shardings, use_layout  # noqa: E402

T = 16
ROWS = [
    [example(5, seed=1), example(2, ("image", 4), 2, seed=2)],
    [example(("audio", 3), 9, seed=3)],
    [example(16, seed=4)],
    [],
    [example(3, ("audio", 2), 4, ("image", 4), 1, seed=5)],
    [example(4, seed=6), example(4, seed=7), example(5, seed=8)],
    [example(1, ("image", 4), 9, seed=9)],
    [example(12, seed=10)],
]
MESHES = {
    "expert 4, data 2": MeshSpec(expert=4),
    "expert 2, tensor 2, data 2": MeshSpec(expert=2, tensor=2),
    "expert 2, fsdp 2, sequence 2": MeshSpec(expert=2, fsdp=2, sequence=2),
    "stage 2, expert 2, tensor 2": MeshSpec(stage=2, expert=2, tensor=2),
}
FORMS = {
    "dropless": MixtureOfExperts(8, 2, groups=(4, 1, 1), shared=1),
    "capacity": MixtureOfExperts(8, 2, groups=(4, 1, 1), capacity=0.9),
}
OBJECTIVES = {"next": (NextToken(), 1.0), "balance": (LoadBalance(), 0.1), "z": (RouterZLoss(), 0.01)}


def collectives(text: str) -> dict[str, list[str]]:
    """By kind, the shapes that come out of each collective of a compiled program."""
    found = {kind: [] for kind in ("all-to-all", "all-gather", "all-reduce", "reduce-scatter")}
    for shapes, kind in re.findall(rf"= (.+?) ({'|'.join(found)})(?:-start)?\(", text):
        found[kind].append(shapes)
    return found


def run(form: str, meshes: list[str]) -> dict:
    """What comes of one device, and of each mesh, errors relative to the largest element of a parameter's gradient."""
    model = bind(tiny(adapters=LIGHT, mlp=FORMS[form]), 31)
    params, batch = lively(model, scale=0.2), build(ROWS, T, adapters=LIGHT)

    def loss(params, batch):
        outputs = model.apply(params, batch, jax.random.key(0))  # with a key as in training: capacities bind
        terms = [(share, objective(outputs, batch)) for objective, share in OBJECTIVES.values()]
        return sum(share * total / weight for share, (total, weight) in terms)

    step = jax.value_and_grad(loss)
    expected, gradient = jax.jit(step)(params, batch)
    results = {"loss": float(expected), "meshes": {}}
    for name in meshes:
        layout = make_layout(MESHES[name], jax.devices())
        places = tree_shardings(layout, params, model.axes())
        rows = jax.tree.map(lambda x: layout.sharding(("batch",) + (None,) * (x.ndim - 1), x.shape), batch)  # noqa: B023

        def split(params, batch):
            with use_layout(layout):  # noqa: B023
                return step(params, batch)

        compiled = jax.jit(split, in_shardings=(places, rows), out_shardings=(None, places))
        compiled = compiled.lower(params, batch).compile()
        value, got = compiled(jax.device_put(params, places), jax.device_put(batch, rows))
        errors = jax.tree.map(
            lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()), got, gradient
        )
        kernel = got["decoder"]["blocks"]["mlp"]["experts"]["gate"]["kernel"]
        results["meshes"][name] = {
            "loss": float(value),
            "error": max(jax.tree.leaves(errors)),
            "held": kernel.addressable_shards[0].data.size / kernel.size,
            "collectives": collectives(compiled.as_text()),
        }
    return results


if __name__ == "__main__":
    print(json.dumps({form: run(form, sys.argv[1:]) for form in FORMS}))
