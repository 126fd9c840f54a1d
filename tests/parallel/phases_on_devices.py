"""Trains a run in phases on four fake devices in a mode, cuts it at the end of a phase and resumes it.

    python phases_on_devices.py MODE FOLDER

Prints JSON: the losses of each step, and whether the run that was cut is bit-identical.
"""

import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "training")]

from test_phases import FIRST, FROZEN, in_phases  # noqa: E402

from polygpt.overrides import replaced  # noqa: E402
from polygpt.sharding import MeshSpec  # noqa: E402
from polygpt.training.loggers import JsonLines, Silent  # noqa: E402
from polygpt.training.loop import train  # noqa: E402

MODES = {
    "single": {"train.parallel": "single"},
    "pmap": {"train.parallel": "pmap"},
    "sharded": {"train.parallel": "sharded", "train.mesh": MeshSpec(fsdp=2, tensor=2)},
    "stages": {"train.parallel": "sharded", "train.mesh": MeshSpec(data=2, stage=2)},
}


class Cut(Silent):
    """Ends the run after a step, without a checkpoint."""

    def step(self, step, loss):
        if step == FIRST + 1:
            raise InterruptedError


def chosen(mode):
    phase = {"data.layout.seq_len": 96, "data.batch_size": 8, "model.decoder.dropout": 0.0, "optim.groups": ()}
    given = {"data.batch_size": 4, "model.decoder.dropout": 0.0, "train.evaluate_every": None, "train.steps": 8}
    return replaced(in_phases((FIRST, phase), **FROZEN, **given), {**MODES[mode], "train.checkpoint.every": FIRST})


def main(mode, folder):
    def logged(workdir, step, steps):
        return [JsonLines(workdir, step)]

    whole, cut = Path(folder) / "whole", Path(folder) / "cut"
    train(chosen(mode), whole, logged, on_message=lambda text: None)
    try:
        train(chosen(mode), cut, lambda *where: [*logged(*where), Cut()], on_message=lambda text: None)
    except InterruptedError:
        pass
    train(chosen(mode), cut, logged, on_message=lambda text: None)
    texts = [(place / "metrics.jsonl").read_text() for place in (whole, cut)]
    losses = [json.loads(line)["loss"] for line in texts[0].splitlines()]
    print(json.dumps({"losses": losses, "same": texts[0] == texts[1]}))


main(*sys.argv[1:])
