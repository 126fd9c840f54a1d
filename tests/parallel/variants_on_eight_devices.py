"""Every attention variant of the package on one device and on eight, with rows, positions and heads split.

Positions are in zigzag order for those that do not need the order of the row.

Prints, as JSON, the names of those whose outputs and gradients agree. Run as a process of its own: the number of
devices is set once a process.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from polygpt import sharding  # noqa: E402
from polygpt.attention import zigzag  # noqa: E402
from polygpt.attention.contract import Context, Dims  # noqa: E402
from polygpt.attention.masks import DECODER  # noqa: E402
from polygpt.attention.meta import Meta  # noqa: E402
from polygpt.lab import catalogue  # noqa: E402
from polygpt.nn.positions import Rope  # noqa: E402

WIDTH, T = 16, 16
DIMS = Dims(WIDTH, position=Rope())
SPECIAL = {
    "BlockSparse": {"block": 3},
    "LocalAndStrided": {"stride": 4},
    "Mamba2": {"state_width": 4, "chunk": 4},
    "SinksAndWindow": {"window": 3, "sinks": 2},
    "SlidingWindow": {"window": 3},
    "TransformerXL": {"piece": 3},
}
"""Fields with which a variant looks no further than it would at usual lengths."""


def context() -> Context:
    """Two rows of packed examples, text and media, the first with padding in an example and behind it."""
    segment = np.int32([[1] * 5 + [0] + [1] * 2 + [2] * 6 + [0] * 2, [1] * 3 + [2] * 13])
    position = np.int32([[0, 1, 2, 3, 4, 0, 5, 6, *range(6), 0, 0], [*range(3), *range(13)]])
    modality = np.where(segment == 0, -1, np.int32([[0, 1, 1, 0] * 4, [1, 2, 0, 0] * 4]))
    index = np.broadcast_to(np.arange(T, dtype=np.int32), segment.shape)
    meta = Meta(*(jnp.asarray(x) for x in (index, position, segment, np.zeros_like(segment), modality)))
    return Context(meta, meta, DECODER)


def compared(cls, context_name: str) -> float:
    """The greatest difference of an output or a gradient, relative to the greatest of its array."""
    spec = cls(heads=4)
    fields = SPECIAL.get(cls.__name__, {}) | ({"chunk": 4} if spec.family == "linear" else {})
    spec = spec.replace(**fields)
    graphdef, state = nnx.split(spec.build(DIMS, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: x + jnp.float32(rng.normal(0, 0.3, x.shape)), state)
    x_BTD, y_BTD = (jnp.float32(rng.normal(size=(2, T, WIDTH))) for _ in range(2))
    layout = sharding.make_layout(sharding.MeshSpec(data=2, sequence=2, tensor=2, context=context_name), jax.devices())
    given = x_BTD, y_BTD, context()
    moved = given if zigzag.needs_order(spec) else jax.tree.map(lambda x: zigzag.reordered(x, 2), given)
    layout = dataclasses.replace(layout, zigzag=moved is not given)

    def total(state, x_BTD, y_BTD, context):
        got_BTD, _ = nnx.merge(graphdef, state)(sharding.constrain(x_BTD, *sharding.RESIDUAL), context)
        return jnp.sum(got_BTD * y_BTD), got_BTD

    def answers(layout, given):
        with sharding.use_layout(layout):
            (of_state, of_x_BTD), got_BTD = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(state, *given)
        return of_state, of_x_BTD, got_BTD

    alone, of_x_BTD, got_BTD = answers(None, given)
    if layout.zigzag:
        of_x_BTD, got_BTD = (zigzag.reordered(x, 2) for x in (of_x_BTD, got_BTD))

    def difference(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.max(np.abs(a - b), initial=0) / max(np.max(np.abs(a), initial=0), 1e-3)

    pairs = zip(jax.tree.leaves((alone, of_x_BTD, got_BTD)), jax.tree.leaves(answers(layout, moved)), strict=True)
    return max(difference(a, b) for a, b in pairs)


if __name__ == "__main__":
    found, wanted = {}, sys.argv[1:]
    for i, cls in enumerate(catalogue.variants()):
        if not wanted or cls.__name__ in wanted:
            found[cls.__name__] = compared(cls, ("ring", "gather")[i % 2])
            print(cls.__name__, found[cls.__name__], file=sys.stderr, flush=True)
    bad = {name: difference for name, difference in found.items() if not difference < 1e-5}
    assert not bad, bad
    print(json.dumps(sorted(found)))
