"""One step of the full multimodal model on packed rows, in every way to use eight CPU devices, written as JSON.

Arguments: the names of the ways to run, of `WAYS`. Run as a process of its own: the number of devices is set once a
process.
"""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, str(Path(__file__).parents[1]))

from batches import ADAPTERS, build, example, lively, tiny  # noqa: E402
from polygpt.heads.linear import LinearHead  # noqa: E402
from polygpt.models.functional import bind  # noqa: E402
from polygpt.models.low_rank import LowRank  # noqa: E402
from polygpt.models.prefix import PrefixTuning  # noqa: E402
from polygpt.nn.experts import MixtureOfExperts  # noqa: E402
from polygpt.nn.mlp import GatedMLP  # noqa: E402
from polygpt.objectives.classification import LabelClassification  # noqa: E402
from polygpt.objectives.loss import Loss  # noqa: E402
from polygpt.objectives.next_token import NextToken  # noqa: E402
from polygpt.objectives.z_loss import ZLoss  # noqa: E402
from polygpt.parameters import paths  # noqa: E402
from polygpt.sharding import MeshSpec  # noqa: E402
from polygpt.training import parallel  # noqa: E402
from polygpt.training.state import State  # noqa: E402
from polygpt.training.step import Recipe, make_step  # noqa: E402
from sources import build_sources, small  # noqa: E402

DENSE = GatedMLP(multiple=8)
ROUTED = MixtureOfExperts(experts=4, top_k=2)
CAPACITY = MixtureOfExperts(experts=4, top_k=2, capacity=1.25)
WAYS = {
    "pmap": (DENSE, None),
    "data 8": (DENSE, MeshSpec()),
    "fsdp 8": (DENSE, MeshSpec(data=1, fsdp=8)),
    "tensor 4, data 2": (DENSE, MeshSpec(tensor=4)),
    "sequence 4 (gather), data 2": (DENSE, MeshSpec(sequence=4)),
    "sequence 4 (ring), data 2": (DENSE, MeshSpec(sequence=4, context="ring")),
    "sequence 4 (gather, zigzag), data 2": (DENSE, MeshSpec(sequence=4, order="zigzag")),
    "sequence 4 (ring, zigzag), data 2": (DENSE, MeshSpec(sequence=4, context="ring", order="zigzag")),
    "fsdp 2, sequence 2 (ring, zigzag), expert 2": (
        ROUTED,
        MeshSpec(data=1, fsdp=2, sequence=2, expert=2, context="ring", order="zigzag"),
    ),
    "stage 2, sequence 2 (gather, zigzag), data 2": (DENSE, MeshSpec(stage=2, sequence=2, order="zigzag")),
    "sequence 4 (gather, zigzag), data 2 (blocks)": (DENSE, MeshSpec(sequence=4, order="zigzag")),
    "sequence 4 (gather, zigzag), data 2 (encoder)": (DENSE, MeshSpec(sequence=4, order="zigzag")),
    "expert 4, data 2 (dropless)": (ROUTED, MeshSpec(expert=4)),
    "expert 4, data 2 (capacity)": (CAPACITY, MeshSpec(expert=4)),
    "stage 4, data 2": (DENSE, MeshSpec(stage=4)),
    "stage 2 (circular), data 4": (DENSE, MeshSpec(stage=2, repeats=2)),
    "data 2, fsdp 2, tensor 2": (DENSE, MeshSpec(fsdp=2, tensor=2)),
    "fsdp 2, sequence 2 (ring), tensor 2": (DENSE, MeshSpec(fsdp=2, sequence=2, tensor=2, context="ring")),
    "stage 2, sequence 2 (gather), data 2": (DENSE, MeshSpec(stage=2, sequence=2)),
    "stage 2, sequence 2 (ring), data 2": (DENSE, MeshSpec(stage=2, sequence=2, context="ring")),
    "stage 2, fsdp 2, expert 2": (ROUTED, MeshSpec(data=1, stage=2, fsdp=2, expert=2)),
    "pmap (blocks)": (DENSE, None),
    "data 2, fsdp 2, tensor 2 (blocks)": (DENSE, MeshSpec(fsdp=2, tensor=2)),
    "fsdp 2, sequence 2, tensor 2 (blocks)": (DENSE, MeshSpec(data=1, fsdp=2, sequence=2, tensor=2)),
    "stage 2, fsdp 2, expert 2 (blocks)": (ROUTED, MeshSpec(data=1, stage=2, fsdp=2, expert=2)),
    "data 2, fsdp 2, tensor 2 (adapters)": (DENSE, MeshSpec(fsdp=2, tensor=2)),
    "sequence 4 (ring), data 2 (adapters)": (DENSE, MeshSpec(sequence=4, context="ring")),
    "stage 2, fsdp 2, expert 2 (adapters)": (ROUTED, MeshSpec(data=1, stage=2, fsdp=2, expert=2)),
    "pmap (encoder)": (DENSE, None),
    "data 2, fsdp 2, tensor 2 (encoder)": (DENSE, MeshSpec(fsdp=2, tensor=2)),
    "sequence 4 (gather), data 2 (encoder)": (DENSE, MeshSpec(sequence=4)),
    "sequence 4 (ring), data 2 (encoder)": (DENSE, MeshSpec(sequence=4, context="ring")),
    "stage 2, fsdp 2, expert 2 (encoder)": (ROUTED, MeshSpec(data=1, stage=2, fsdp=2, expert=2)),
    "stage 2 (circular), data 4 (encoder)": (DENSE, MeshSpec(stage=2, repeats=2)),
}
"""By name, the feed-forward layer and the mesh; None is pmap. Blocks: logits exist for some positions at a time.
Adapters: matrices are frozen under low-rank updates, behind a prefix. Encoder: an encoder reads the first half of each
example."""
ADAPTED = {
    "low_rank": LowRank("kernel$", rank=2, alpha=1.0, magnitude=True, also="bias$"),
    "prefix": PrefixTuning(length=3),
}
OBJECTIVES = {"next_token": (NextToken(), 1.0), "z": (ZLoss(), 1e-2), "kind": (LabelClassification("kind"), 0.5)}
ROWS, LENGTH = 16, 32
IDS = 52
"""Of the vocabulary; no other axis is as long, so that it can be found in a compiled program."""


def gradients_kept() -> optax.GradientTransformation:
    """Leaves the parameters alone and keeps the gradient, so that nothing is lost of it in an update."""

    def update(gradient, state, params=None):
        return jax.tree.map(jnp.zeros_like, gradient), {"gradient": gradient}

    return optax.GradientTransformation(lambda params: {"gradient": jax.tree.map(jnp.zeros_like, params)}, update)


def size(one) -> int:
    """The number of positions of an example."""
    return sum(part if isinstance(part, int) else part[1] for part in one.parts)


def packed_rows(encoder: bool):
    """Rows of several examples with pictures, recordings, both or neither, and padding behind."""
    kinds = [
        (example(3, ("image", 4), 5, seed=1), example(7, seed=2), example(2, ("audio", 4), 4, seed=3)),
        (example(30, seed=4),),
        (example(("audio", 3), 4, ("image", 4), 6, seed=5), example(9, seed=6)),
        (example(5, ("image", 4), 2, ("image", 4), 3, seed=7), example(1, ("audio", 2), 6, seed=8)),
    ]
    rows = [kinds[i % 4] for i in range(ROWS - 1)] + [()]  # the last row is padding alone
    batch = build(rows, LENGTH, bidirectional=True)
    if encoder:
        batch = build_sources([[(one, size(one) // 2) for one in row] for row in rows], LENGTH, bidirectional=True)
    kind_BT = np.random.default_rng(0).choice([0, 1, 2, np.nan], batch.shape)
    return batch.replace(extra={"kind": np.float32(np.where(batch.segment_BT > 0, kind_BT, np.nan))})


def run(mlp, mode: str, mesh: MeshSpec | None, devices: int, block=None, adapted=None, encoder=False) -> dict:
    fields = {"mlp": mlp, "depth": 4, "width": 32, "tied": False}
    spec = small(ADAPTERS, **fields) if encoder else tiny(heads=4, kv_heads=4, **fields)
    spec = spec.replace(logits_block=block, heads={"kind": LinearHead(3, pool="mean")}, **(adapted or {}))
    model = bind(spec, IDS)
    transformation, params = gradients_kept(), jax.tree.map(jnp.asarray, lively(model))
    trainable = jax.tree.map(lambda own: own.trained, model.traits)
    recipe = Recipe(Loss(model, OBJECTIVES, trainable, logits_block=block), transformation, lambda step: 0.0)
    runs = parallel.build(mode, model.axes(), mesh, jax.devices()[:devices])
    runs.check(ROWS, LENGTH, 1)

    def initial():
        zero = jnp.zeros((), jnp.int32)
        return State(zero, params, transformation.init(params), None, zero, zero)

    step = runs.compile(lambda **wiring: make_step(recipe, **wiring), initial)
    arguments = runs.create(initial), runs.put(packed_rows(encoder))
    if runs.layout:
        step = step.lower(*arguments).compile()
    state, metrics = step(*arguments)
    gradient = {name: own for name, own in paths(state.opt_state["gradient"]).items() if paths(trainable)[name]}
    return {
        "loss": float(metrics["loss"]),
        "gradient": {path: np.asarray(leaf, np.float64).ravel().tolist() for path, leaf in gradient.items()},
        "whole_vocabulary": not runs.layout or bool(re.search(rf"[\[,]{IDS}[\],]", step.as_text())),
        "split": sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params)),
    }


if __name__ == "__main__":
    found = {}
    for name in sys.argv[1:]:
        mlp, mesh = WAYS[name]
        adapted, encoder = ADAPTED if "(adapters)" in name else None, "(encoder)" in name
        single = f"single {type(mlp).__name__} {getattr(mlp, 'capacity', '')} {bool(adapted)} {encoder}"
        if single not in found:
            found[single] = run(mlp, "single", None, 1, adapted=adapted, encoder=encoder)
        block = 8 if "(blocks)" in name else None
        found[name] = run(mlp, "sharded" if mesh else "pmap", mesh, 8, block, adapted, encoder) | {"single": single}
    print(json.dumps(found))
