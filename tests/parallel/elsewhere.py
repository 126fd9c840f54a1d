"""Writes checkpoints on so many CPU devices, and reads those that were written on another number of them.

    elsewhere.py FOLDER DEVICES OTHER    saves under FOLDER/DEVICES in every layout of DEVICES, waits for those of a
                                         second process under FOLDER/OTHER, restores them and prints as JSON what came
    elsewhere.py train WORKDIR DEVICES UNTIL SETTING=VALUE...    trains the tiny experiment to a step; prints the losses

Run as a process of its own: the number of devices is set once a process.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", int(sys.argv[3] if sys.argv[1] == "train" else sys.argv[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from tiny_experiment import experiment  # noqa: E402

from polygpt.overrides import override  # noqa: E402
from polygpt.runtime.checkpoint import Checkpoints, CheckpointSpec  # noqa: E402
from polygpt.training.loggers import JsonLines, Silent  # noqa: E402
from polygpt.training.loop import train  # noqa: E402
from polygpt.training.program import assemble  # noqa: E402
from polygpt.training.spikes import SpikeSpec  # noqa: E402

LAYOUTS = {
    8: {
        "fsdp 8": {"parallel": "sharded", "mesh.fsdp": "8"},
        "data 2, fsdp 2, tensor 2": {"parallel": "sharded", "mesh.fsdp": "2", "mesh.tensor": "2"},
        "pmap 8": {"parallel": "pmap"},
        "single": {"parallel": "single"},
    },
    4: {
        "fsdp 4": {"parallel": "sharded", "mesh.fsdp": "4"},
        "data 2, tensor 2": {"parallel": "sharded", "mesh.tensor": "2"},
        "pmap 4": {"parallel": "pmap"},
        "single": {"parallel": "single"},
    },
}


def program(settings):
    changes = {"data.batch_size": "16", "model.decoder.depth": "2"} | {f"train.{k}": v for k, v in settings.items()}
    chosen = override(experiment(), changes)
    return assemble(chosen.replace(train=chosen.train.replace(spikes=SpikeSpec(window=4))), vocabulary=256)


def values(target):
    """The same numbers in every process, for every leaf."""
    rng = np.random.default_rng(0)
    numbers = jax.tree.map(lambda x: (100 * rng.standard_normal(x.shape)).astype(x.dtype), target)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.int32(7) if path == (jax.tree_util.GetAttrKey("step"),) else x, numbers
    )


def exchange(folder, here, there):
    for name, settings in LAYOUTS[here].items():
        runs = program(settings)
        target = runs.parallel.abstract(runs.initial)
        checkpoints = Checkpoints(folder / str(here) / name, CheckpointSpec(), "lower")
        state = jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), values(target), target)
        checkpoints.save(state, metric=None, finite=True, data={"by": name})
        checkpoints.wait()
        checkpoints.close()
    (folder / f"{here} saved").touch()
    deadline = time.monotonic() + 300
    while not (folder / f"{there} saved").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)

    came = {}
    for into, settings in LAYOUTS[here].items():
        runs = program(settings)
        target = runs.parallel.abstract(runs.initial)
        for name in LAYOUTS[there]:
            checkpoints = Checkpoints(folder / str(there) / name, CheckpointSpec(), "lower")
            state, data = checkpoints.restore(target)
            checkpoints.close()
            same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), state, values(target))
            placed = jax.tree.map(lambda x, t: x.sharding.is_equivalent_to(t.sharding, x.ndim), state, target)
            split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
            came[f"{name} of {there} -> {into} of {here}"] = {
                "equal": all(jax.tree.leaves(same)) and data == {"by": name},
                "placed": all(jax.tree.leaves(placed)),
                "split": split,
            }
    print(json.dumps(came))


class Stop(Silent):
    def __init__(self, until):
        self.until = until

    def step(self, step, loss):
        if step == self.until:
            os.kill(os.getpid(), signal.SIGTERM)


def go(workdir, until, settings):
    changes = {"train.steps": "18", "train.evaluate_every": "null", "train.log_every": "1", "data.batch_size": "16"}
    changes |= {"model.decoder.dropout": "0"} | dict(setting.split("=") for setting in settings)
    chosen = override(experiment(), changes)
    outcome = train(chosen, workdir, lambda *where: [JsonLines(*where[:2]), Stop(until)])
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    came = {"step": outcome.step, "losses": [line["loss"] for line in lines]}
    print(json.dumps(came | ({"state": last(chosen, workdir)} if outcome.finished else {})))


def last(chosen, workdir) -> dict[str, list[float]]:
    """The arrays of the last checkpoint by their paths: parameters, their average, the optimizer's."""
    runs = assemble(chosen, chosen.tokenizer.build().vocabulary)
    checkpoints = Checkpoints(workdir / "checkpoints", chosen.train.checkpoint, "lower")
    state, _ = checkpoints.restore(runs.parallel.abstract(runs.initial))
    checkpoints.close()
    kept = {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}
    leaves = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(kept) if leaf.ndim]
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64).ravel().tolist() for path, leaf in leaves}


if __name__ == "__main__":
    if sys.argv[1] == "train":
        go(Path(sys.argv[2]), int(sys.argv[4]), sys.argv[5:])
    else:
        exchange(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
