"""Trains the tiny experiment in a mode on four CPU devices, interrupted once, and prints the final loss as JSON.

Run as a process of its own: the number of devices is set once a process.
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 4)
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from tiny_experiment import experiment  # noqa: E402

from polygpt.init.from_run import FromRun  # noqa: E402
from polygpt.overrides import override  # noqa: E402
from polygpt.training.loggers import JsonLines, Silent  # noqa: E402
from polygpt.training.loop import train  # noqa: E402
from polygpt.training.program import assemble  # noqa: E402
from polygpt.training.run import open_run  # noqa: E402


class Interrupt(Silent):
    def step(self, step, loss):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def run(mode: str, workdir: Path) -> dict:
    changes = {
        "train.steps": "6",
        "train.evaluate_every": "6",
        "train.log_every": "1",
        "train.parallel": mode,
        "data.batch_size": "8",
        "model.decoder.dropout": "0",  # pmap's devices draw their own
        "model.decoder.depth": "0",  # compiles sooner: the modes' blocks are compared elsewhere
    }
    chosen = override(experiment(), changes)
    first = train(chosen, workdir, lambda *where: [JsonLines(*where[:2]), Interrupt()])
    second = train(chosen, workdir, lambda *where: [JsonLines(*where[:2])])
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "stopped": first.step,
        "finished": second.finished,
        "losses": [line["loss"] for line in lines if "loss" in line],
        "metric": lines[-1]["metric"],
        "opened": open_run(workdir).step,
        "started": started(chosen, workdir),
    }


def started(chosen, workdir: Path) -> dict:
    """Whether a new run in this mode starts from the one in `workdir`, with its arrays where the step wants them."""
    program = assemble(chosen.replace(init=FromRun(path=str(workdir))), chosen.tokenizer.build().vocabulary)
    state, target = program.first_state(), program.parallel.abstract(program.initial)
    placed = jax.tree.map(lambda x, t: x.sharding.is_equivalent_to(t.sharding, x.ndim), state, target)
    same = jax.tree.map(np.array_equal, state.params, open_run(workdir).params)
    return {"equal": all(jax.tree.leaves(same)), "placed": all(jax.tree.leaves(placed))}


if __name__ == "__main__":
    print(json.dumps({mode: run(mode, Path(sys.argv[1]) / mode) for mode in ("single", "pmap", "sharded")}))
