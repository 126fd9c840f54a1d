"""Trains several seeds at once: states, batches and steps have a leading axis of seeds."""

import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.data.loader import TrainBatches
from polygpt.files import write_atomically
from polygpt.runtime.compilation import compiler_options
from polygpt.sequence import Batch
from polygpt.training import automatic
from polygpt.training.experiment import Experiment
from polygpt.training.program import Program, assemble
from polygpt.training.state import State, create
from polygpt.training.step import make_step


def most(experiment: Experiment) -> int:
    """Number of seeds to train together: as many as fit into a device's memory by estimate, at least one."""
    return max(1, int(fitting(experiment)))


def fitting(experiment: Experiment) -> float:
    """Estimated number of seeds that fit into a device's memory, at least 1.

    Each needs its state, a gradient and updates, activations of T B D (34 + 5 H T / D) bytes per layer at 16 bits
    (Korthikanti et al., 2205.05198, eq. 1), and the logits with their gradient.
    """
    vocabulary, decoder = experiment.tokenizer.build().vocabulary, experiment.model.decoder
    program = assemble(experiment, vocabulary, jax.devices()[:1])
    seq_len, batch_size = experiment.data.layout.seq_len, experiment.data.batch_size // experiment.optim.accumulate
    heads = getattr(decoder.attention, "heads", 1)
    layer = (
        decoder.width * (34 + 5 * heads * seq_len / decoder.width) * (2 if experiment.model.dtype == "float32" else 1)
    )
    activations = batch_size * seq_len * (decoder.depth * layer + 3 * 4 * vocabulary)
    state = automatic.bytes_of(jax.eval_shape(program.initial)) + 2 * automatic.bytes_of(program.shapes)
    return automatic.SPLIT * automatic.memory_of_all() / (state + activations)


class Streams(Iterator[Batch]):
    """Batches of several seeds, stacked: every array has a leading axis of seeds."""

    last_examples = ()

    def __init__(self, streams: Sequence[TrainBatches]):
        self.streams = streams

    def __next__(self) -> Batch:
        return jax.tree.map(lambda *arrays: np.stack(arrays), *[next(stream) for stream in self.streams])

    def get_state(self) -> dict[str, Any]:
        """The position of each stream."""
        return {"streams": [stream.get_state() for stream in self.streams]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state returned by `get_state`."""
        for stream, own in zip(self.streams, state["streams"], strict=True):
            stream.set_state([own])

    def close(self) -> None:
        """Stops all workers."""
        for stream in self.streams:
            stream.close()


def initial(program: Program) -> Callable[[jax.Array], State]:
    """The state before the first step, as a function of the seed."""
    optim, spikes = program.experiment.optim, program.experiment.train.spikes
    return lambda seed: create(program.model, program.transformation, seed, optim.ema is not None, spikes)


def over_seeds(program: Program) -> Callable:
    """The compiled step of all seeds, `(states, batches, seeds) -> (states, figures)`; the states are donated.

    The figures are float32 [2, seeds]: losses, and the number of non-finite steps in a row.
    """

    def advance(state, batch, seed):
        state, metrics = make_step(dataclasses.replace(program.recipe, seed=seed))(state, batch)
        return state, jnp.stack([metrics["loss"], metrics["skipped_in_row"]])

    options = compiler_options(program.parallel.devices[0].platform)
    return jax.jit(jax.vmap(advance, out_axes=(0, 1)), donate_argnums=0, compiler_options=options)


def write(path: Path, state: State, losses: np.ndarray, said: dict[str, Any]) -> None:
    """Writes a state, losses and JSON data to one file, atomically."""
    arrays = {f"state/{name}": np.asarray(leaf) for name, leaf in _paths(state).items()}
    buffer = io.BytesIO()
    np.savez(buffer, losses=losses, said=np.frombuffer(json.dumps(said).encode(), np.uint8), **arrays)
    write_atomically(path, buffer.getbuffer())


def read(path: Path, target: State, device: jax.Device) -> tuple[State, np.ndarray, dict[str, Any]]:
    """Reads what `write` wrote. `target` has the state's shapes and dtypes; the state is put on the device.

    Raises:
        OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile: the file is missing, damaged or of another model.
    """
    with np.load(path) as file:
        said, losses = json.loads(file["said"].tobytes()), file["losses"]
        leaves = [_as(file[f"state/{name}"], shape) for name, shape in _paths(target).items()]
    state = jax.device_put(jax.tree.unflatten(jax.tree.structure(target), leaves), device)
    # Copied: on a CPU, JAX may alias a NumPy array, which must not be donated.
    return jax.tree.map(jnp.copy, state), losses, said


def _paths(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _as(array: np.ndarray, shape: jax.ShapeDtypeStruct) -> np.ndarray:
    """The array with its dtype, which NumPy loses if it does not know it. ValueError if it does not match."""
    array = array.view(shape.dtype) if array.dtype.kind == "V" else array
    if array.shape != shape.shape or array.dtype != shape.dtype:
        raise ValueError(f"an array is {array.dtype}{array.shape}, it must be {shape.dtype}{shape.shape}")
    return array
