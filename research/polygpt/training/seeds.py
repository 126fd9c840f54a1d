"""Several seeds in one program: states, batches and metrics have a leading axis of seeds.

Seeds do not interact. Initial parameters, dropout, the order of examples and augmentation derive from a seed as in a
run of its own, so its results are equal up to rounding. `State.step` has no axis: all seeds take the same steps.
"""

import collections
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.data.loader import DataSpec, train_batches
from polygpt.errors import UserError
from polygpt.sequence import Batch
from polygpt.training.experiment import TrainSpec
from polygpt.training.state import State
from polygpt.training.step import Recipe, Step, make_step

AXES = State(step=None, params=0, opt_state=0, ema=0, skipped=0, skipped_in_row=0, window=0, references=None)
"""The axis of seeds in each field of the state."""


def reason_against(train: TrainSpec) -> str | None:
    """Why several seeds cannot be trained together with these settings; None if they can."""
    if train.parallel not in ("single", "auto"):
        return f"train.parallel is {train.parallel!r}: one seed uses several devices"
    if train.patience is not None:
        return "train.patience ends the runs of different seeds at different steps"
    if train.plateau is not None:
        return "train.plateau lowers the learning rate of different seeds at different steps"
    if train.spikes is not None and train.spikes.action == "rewind":
        return "train.spikes.action is 'rewind', and seeds would rewind independently"
    return None


def initial_states(create: Callable[[jax.Array], State], seeds: Sequence[int]) -> State:
    """The states before the first step, given `create(seed)`."""
    return jax.vmap(create, out_axes=AXES)(jnp.asarray(seeds, jnp.int32))


def make_vmapped_step(recipe: Recipe, seeds: Sequence[int], max_nonfinite: int) -> Step:
    """The step of all seeds.

    A seed stops after `max_nonfinite` consecutive non-finite steps: its `skipped_in_row` keeps that value, by which
    `stopped_seeds` recognises it. It is still computed, but its figures no longer count.
    """

    def step(state: State, batch: Batch, seed: jax.Array):
        after, metrics = make_step(dataclasses.replace(recipe, seed=seed))(state, batch)
        in_row = jnp.where(state.skipped_in_row < max_nonfinite, after.skipped_in_row, state.skipped_in_row)
        metrics["skipped_in_row"] = in_row.astype(jnp.float32)
        return dataclasses.replace(after, skipped_in_row=in_row), metrics

    over_seeds = jax.vmap(step, in_axes=(AXES, 0, 0), out_axes=(AXES, 0))
    return lambda state, batch: over_seeds(state, batch, jnp.asarray(seeds, jnp.int32))


def stopped_seeds(state: State, max_nonfinite: int) -> list[bool]:
    """Which seeds have stopped; see `make_vmapped_step`."""
    return (np.asarray(state.skipped_in_row) >= max_nonfinite).tolist()


@jax.jit
def select_seed(tree: Any, i: int) -> Any:
    """The part of the i-th seed."""
    return jax.tree.map(lambda x: x[i], tree)


class Streams(Iterator[Batch]):
    """Training batches of several seeds, stacked; used like `TrainBatches`.

    Args:
        data: the training data.
        tokenizer: the tokenizer.
        adapters: the model's adapters, by modality.
        seeds: as for `train_batches`, one per stream.
    """

    def __init__(self, data: DataSpec, tokenizer, adapters: Mapping, seeds: Sequence[int]):
        data = data.replace(workers=math.ceil(data.workers / len(seeds)))  # workers do not affect results
        self._seeds = list(seeds)
        self._streams = [train_batches(data, tokenizer, adapters, seed=seed) for seed in seeds]

    def under(self, data: DataSpec, adapters: Mapping) -> "Streams":
        """See `TrainBatches.under`."""
        found = copy.copy(self)
        data = data.replace(workers=math.ceil(data.workers / len(self._seeds)))
        found._streams = [stream.under(data, adapters) for stream in self._streams]
        return found

    def __next__(self) -> Batch:
        return jax.tree.map(lambda *arrays: np.stack(arrays), *[next(stream) for stream in self._streams])

    @property
    def last_examples(self) -> tuple:
        """The examples of the last batch, one after the other, of each seed."""
        return tuple(example for stream in self._streams for example in stream.last_examples)

    def get_state(self) -> dict[str, Any]:
        """The states of all streams, and their sums in the form of a single one's."""
        states = [stream.get_state() for stream in self._streams]
        skipped = sum((collections.Counter(state["skipped"]) for state in states), collections.Counter())
        total = {"data_shard": 0, "examples": states[0]["examples"], "skipped": dict(skipped)}
        return {**total, "seeds": self._seeds, "streams": states}

    def set_state(self, states: Sequence[dict[str, Any]]) -> None:
        """Continues from a state returned by `get_state`, in a list like that of `TrainBatches`.

        Raises:
            UserError: the seeds differ, or as for `TrainBatches`.
        """
        (state,) = states
        if state["seeds"] != self._seeds:
            raise UserError(f"the checkpoint is of seeds {state['seeds']}, not {self._seeds}: choose another workdir")
        for stream, own in zip(self._streams, state["streams"], strict=True):
            stream.set_state([own])

    def close(self) -> None:
        """Stops all workers."""
        for stream in self._streams:
            stream.close()
