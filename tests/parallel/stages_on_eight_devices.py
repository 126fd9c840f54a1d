"""A decoder in stages on eight CPU devices beside the same on one, and what its devices tell each other, as JSON.

Argument: one of `MESHES`. Run as a process of its own: the number of devices is set once a process.
"""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, str(Path(__file__).parents[1]))

from batches import build, example, lively, tiny  # noqa: E402
from polygpt import sharding  # noqa: E402
from polygpt.models.functional import bind  # noqa: E402
from polygpt.sharding import MeshSpec  # noqa: E402

MESHES = {
    "stage 4, data 2": MeshSpec(stage=4),
    "stage 2 twice, tensor 2, data 2": MeshSpec(stage=2, repeats=2, tensor=2, microbatches=4),
}
WIDTH, ROWS, LENGTH = 32, 16, 14
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def gradients(model, batch):
    """A function of the parameters: (loss, gradients)."""

    def loss(params):
        logits_BTV = jax.nn.log_softmax(model.apply(params, batch).logits_BTV)
        likelihood_BT = jnp.take_along_axis(logits_BTV, batch.target_BT[..., None], axis=-1)[..., 0]
        return -jnp.sum(likelihood_BT * batch.weight_BT) / jnp.sum(batch.weight_BT)

    return jax.value_and_grad(loss)


def told(text: str) -> list[tuple[str, list[list[int]]]]:
    """Of each collective in a compiled program its kind and the shapes of what comes of it."""
    return [
        (kind, [[int(size) for size in shape.split(",")] for shape in re.findall(r"\w\d+\[([\d,]+)\]", result)])
        for result, kind in COLLECTIVE.findall(text)
    ]


def parts(text: str) -> tuple[str, str]:
    """A compiled program's loops, as what is not in its entry is here, and what surrounds them."""
    looped, _, entry = text.partition("\nENTRY ")
    return looped, entry


if __name__ == "__main__":
    model = bind(tiny(adapters={}, depth=8, width=WIDTH), 31)
    params = lively(model, scale=0.2)
    batch = build([[example(9, seed=i), example(4, seed=i + 50)] for i in range(ROWS)], LENGTH, adapters={})
    loss, expected = jax.jit(gradients(model, batch))(params)
    layout = sharding.make_layout(MESHES[sys.argv[1]], jax.devices())
    places = sharding.tree_shardings(layout, params, model.axes())

    def split(params, batch):
        with sharding.use_layout(layout):
            return gradients(model, batch)(params)

    here = (
        jax.device_put(params, places),
        jax.tree.map(
            lambda x: jax.device_put(x, layout.sharding(("batch", *[None] * (x.ndim - 1)), x.shape)),
            batch,
        ),
    )
    step = jax.jit(split, out_shardings=(None, places)).lower(*here).compile()
    ours, gradient = step(*here)
    off = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), gradient, expected)
    found = {
        "loss_off": abs(float(ours) / float(loss) - 1),
        "off": max(jax.tree.leaves(off)),
        **{where: told(text) for where, text in zip(("looped", "around"), parts(step.as_text()), strict=True)},
        "kernels": [leaf.shape for leaf in jax.tree.leaves(params["decoder"]["blocks"]) if leaf.ndim == 3],
    }
    print(json.dumps(found))
