"""The loss and its gradient on eight devices, by pmap and on meshes, are those of one device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from polygpt.lab import process
from polygpt.lab.compiled import flags
from polygpt.lab.measured import Measured, absent
from polygpt.lab.objective.subject import Subject, off_by
from polygpt.objectives.base import depends_on_scores_only
from polygpt.objectives.forward import AVERAGE
from polygpt.sharding import MeshSpec
from polygpt.spec import to_json
from polygpt.training import parallel
from polygpt.training.state import State
from polygpt.training.step import Recipe, make_step

DEVICES = 8
THREADS = {"NPROC": "32"}
"""The environment of the process: independent collectives of one program may be in progress at once, which takes more
threads than devices."""


class Way(NamedTuple):
    """A way of using the devices: the mesh, or None for pmap; microbatches; positions whose logits exist at a time."""

    mesh: MeshSpec | None
    accumulate: int = 1
    logits_block: int | None = None


WAYS = {
    "pmap, 2 microbatches": Way(None, 2),
    "fsdp 4 x tensor 2": Way(MeshSpec(data=1, fsdp=4, tensor=2), logits_block=8),
    "data 2 x fsdp 2 x tensor 2, 2 microbatches": Way(MeshSpec(data=2, fsdp=2, tensor=2), 2),
}
"""The ways of using eight devices. Where an objective allows it, one of them computes logits in blocks."""


def eight_devices(subject: Subject) -> Measured:
    """The mean loss and its gradient on eight CPU devices equal those on one, for each of `WAYS`."""
    if (reason := process.reason_against(type(subject.objective))) is not None:
        return absent(reason)
    found = process.answer(
        "polygpt.lab.objective.eight_devices", to_json(subject.objective), XLA_FLAGS=flags(), **THREADS
    )
    return process.worst(found, subject.bound, "with")


def error_of(subject: Subject, name: str) -> float:
    """The largest relative difference between this process's devices and one, in mean loss and gradient."""
    way = WAYS[name]
    block = way.logits_block if depends_on_scores_only(subject.objective) else None
    loss = subject.loss(accumulate=way.accumulate, logits_block=block)
    average = subject.others.get(AVERAGE)
    decay = None if average is None else 0.5
    trace = optax.trace(decay=0.0)  # its state is the gradient
    recipe = Recipe(loss, trace, lambda step: 0.0, ema=decay)
    mode = "pmap" if way.mesh is None else "sharded"
    runs = parallel.build(mode, subject.model.axes(), way.mesh, jax.devices())
    runs.check(*subject.batch.shape, way.accumulate)
    references = {name: own for name, own in subject.others.items() if name != AVERAGE}

    def initial(params, average, references):
        zero = jnp.zeros((), jnp.int32)
        return State(zero, params, trace.init(params), average, zero, zero, None, references)

    given = subject.params, average, references
    step = runs.compile(lambda **wiring: make_step(recipe, **wiring), lambda: initial(*given))
    place = runs.shardings(lambda: initial(*given))
    state, metrics = step(jax.jit(initial, out_shardings=place)(*given), runs.put(subject.batch))
    gradient = jax.tree.map(np.asarray, state.opt_state.trace)
    return off_by((float(metrics["loss"]), subject.trained(gradient)), subject.usual.mean)
