"""A tiny run as one of two processes. Arguments: the run folder, when a SIGTERM comes, mode, changes as JSON.

It comes after so many steps; or, "evaluating 1", before the first batch of an evaluation.
"""

import dataclasses
import json
import os
import signal
import sys

import jax

jax.config.update("jax_num_cpu_devices", 2)

import numpy as np  # noqa: E402
from tiny_experiment import experiment  # noqa: E402

from polygpt.overrides import override  # noqa: E402
from polygpt.training import feed, trainer  # noqa: E402
from polygpt.training.loggers import JsonLines  # noqa: E402
from polygpt.training.loop import train  # noqa: E402
from polygpt.training.spikes import SpikeSpec  # noqa: E402

CHANGES = {
    "model.decoder.depth": "0",
    "optim.accumulate": "1",
    "optim.schedule.peak_lr": "0.01",
    "train.steps": "16",
    "train.log_every": "1",
    "train.evaluate_every": "8",
    "evaluation.batch_size": "2",
    "train.checkpoint.every": "4",
    "train.processes.initialization_timeout": "120",
    "train.processes.barrier_timeout": "60",
}
BAD = {10, 11}
"""Batches, counted from 1, whose targets are bytes that no text has: spikes of which the second makes a rewind."""


def numbered(batches):
    """Makes the batches of those numbers bad."""
    draw, get, put = batches.__next__, batches.get_state, batches.set_state
    number = 0

    class Numbered:
        last_examples = ()

        def __iter__(self):
            return self

        def __next__(self):
            nonlocal number
            number += 1
            batch = draw()
            wrong = np.full_like(batch.target_BT, 200)
            return dataclasses.replace(batch, target_BT=wrong) if number in BAD else batch

        def get_state(self):
            return get() | {"number": number}

        def set_state(self, states):
            nonlocal number
            number = states[0]["number"]
            put(states)

        def close(self):
            batches.close()

    return Numbered()


def main(workdir, at, mode, changes):
    made = feed.train_batches
    feed.train_batches = lambda *given, **named: numbered(made(*given, **named))
    what, _, number = at.rpartition(" ")
    name, calls = "_proceed" if what else "_advance", []
    real = getattr(trainer.Trainer, name)

    def stop_at(self):
        calls.append(name)
        due = len(calls) == int(number)
        if due and what:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self)
        if due and not what:
            os.kill(os.getpid(), signal.SIGTERM)

    setattr(trainer.Trainer, name, stop_at)
    chosen = override(experiment(), CHANGES | {"train.parallel": mode} | json.loads(changes))
    spikes = SpikeSpec(window=4, sigmas=8.0, action="rewind", patience=2)
    chosen = chosen.replace(train=chosen.train.replace(spikes=spikes))
    outcome = train(chosen, workdir, lambda workdir, step, steps: [JsonLines(workdir, step)])
    print("outcome", outcome.step, outcome.finished, flush=True)


main(*sys.argv[1:])
