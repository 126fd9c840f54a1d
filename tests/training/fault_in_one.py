"""A tiny run as one of two processes, of which one meets a fault. Arguments: the fault, the run folder."""

import errno
import os
import sys
from pathlib import Path

FAULT, WORKDIR, RANK = sys.argv[1], Path(sys.argv[2]), int(os.environ["POLYGPT_PROCESS"])

from tiny_experiment import experiment  # noqa: E402

from polygpt.data.sources.text_files import TextFiles  # noqa: E402
from polygpt.errors import UserError  # noqa: E402
from polygpt.overrides import override  # noqa: E402
from polygpt.runtime import manifest, processes, stored  # noqa: E402
from polygpt.training import held_out  # noqa: E402
from polygpt.training.loggers import Silent  # noqa: E402
from polygpt.training.loop import train  # noqa: E402
from polygpt.training.run import open_run  # noqa: E402

CHANGES = {
    "train.parallel": "sharded",
    "model.decoder.depth": "0",
    "optim.accumulate": "1",
    "train.steps": "6",
    "train.evaluate_every": "4",
    "train.checkpoint.every": "2",
    "train.processes.initialization_timeout": "120",
    "train.processes.heartbeat_timeout": "60",
}


class Logger(Silent):
    """Meets what the first process meets in its third step."""

    def step(self, step, loss):
        if step == 3 and FAULT == "exit":
            raise SystemExit(1)  # as rich does where its reader is gone
        if step == 3 and FAULT == "disk":
            raise OSError(errno.ENOSPC, "No space left on device", str(WORKDIR / "metrics.jsonl"))


def fails(*_, **__):
    raise UserError("a held-out file is torn")


def half(self, opened=TextFiles.open):
    found = opened(self)
    return [found[i] for i in range(len(found) // 2)]


def verify(place, *given, verify=manifest.verify):
    if place.name == "6":
        raise manifest.Damaged("d/x cannot be read: Input/output error")
    return verify(place, *given)


CODES = {"full": errno.ENOSPC, "locked": errno.EACCES}
"""By fault, what the system says when the second process writes its part of a checkpoint."""


def writer(make=stored.writer):
    """One that cannot write its part of the checkpoint of step 4."""
    made, step = make(), []
    save, wait = made.save, made.wait_until_finished

    def save_and_note(place, **given):
        step[:] = [place.name]
        save(place, **given)

    def fail():
        if step == ["4"]:
            raise OSError(CODES[FAULT], os.strerror(CODES[FAULT]), str(WORKDIR / "checkpoints" / "4" / "d"))
        wait()

    made.save, made.wait_until_finished = save_and_note, fail
    return made


if RANK == 1:
    if FAULT == "evaluation":
        held_out.evaluate = fails
    elif FAULT == "data":
        TextFiles.open = half
    elif FAULT in CODES:
        stored.writer = writer

chosen = override(experiment(), CHANGES)


try:
    with processes.together(chosen.train.processes):
        train(chosen, WORKDIR, lambda *_: [Logger()])
        if RANK == 1:
            manifest.verify = verify
        print("opened", open_run(WORKDIR, spread=True).step, flush=True)
except UserError as error:
    sys.exit(f"polygpt: {error}")
