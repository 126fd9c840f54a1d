"""A run that things happen to. Run as a process of its own; see test_faults.py.

faults.py reference FOLDER STEPS               the run that nothing happens to
faults.py kill FOLDER STEPS SAVE EVENT DELAY   kills itself in its SAVE-th save: at the EVENT-th thing done to a
                                               file, or DELAY seconds after its begin; prints where it went on from
faults.py chain FOLDER STEPS SEED KIND...      one fault after the other, the run started again after each; prints
                                               a line of JSON for each, then one for the end of the run
"""

import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
from test_kill import last_checkpoint
from tiny_experiment import experiment

from polygpt.errors import UserError
from polygpt.overrides import override
from polygpt.runtime.manifest import records
from polygpt.training.loggers import JsonLines, Silent
from polygpt.training.loop import train
from polygpt.training.parallel import Parallel

EVERY, KEEP, PATIENCE = 5, 3, 3
TOUCHES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def chosen(steps, every=EVERY):
    changes = {"steps": steps, "log_every": 1, "evaluate_every": "null", "max_nonfinite": PATIENCE}
    changes |= {"checkpoint.every": every, "checkpoint.keep": KEEP}
    changes = {f"train.{name}": str(value) for name, value in changes.items()}
    return override(
        experiment(), changes | {"model.decoder.depth": "0", "optim.accumulate": "1", "data.batch_size": "2"}
    )


class Kill(Silent):
    """SIGKILL to this process in a save: `flush` is what a save begins with."""

    def __init__(self, folder, save, event, delay):
        self.folder, self.save, self.event, self.delay = folder, save, event, delay
        self.armed, self.done, self.lock = False, 0, threading.Lock()
        sys.addaudithook(self.hook)

    def flush(self):
        self.save -= 1
        if self.save == 0:
            committed = [record.step for record in records(self.folder / "checkpoints")]
            print(json.dumps({"committed": committed}), flush=True)
            self.armed = True
            if self.delay:
                threading.Timer(self.delay, self.kill).start()

    def hook(self, event, arguments):
        if self.armed and self.event and event in TOUCHES:
            with self.lock:
                self.done += 1
                if self.done == self.event:
                    self.kill()

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)


class At(Silent):
    """Does `steps[7]()` at step 7, and `saves[9]()` as the first save from step 9 on begins."""

    def __init__(self, steps, saves):
        self.steps, self.saves = dict(steps), dict(saves)

    def step(self, step, loss):
        self.at = step
        self.steps.pop(step, lambda: None)()

    def flush(self):
        for step in [step for step in self.saves if step <= self.at]:
            self.saves.pop(step)()


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


class Chain:
    """Faults one after the other, in one process.

    Each kind of fault is a method that makes one row: "kind", "injected", "happened", "lost" (steps), and "faults",
    which is empty if all went as it must.
    """

    def __init__(self, folder, steps, seed):
        self.folder, self.steps, self.rng, self.faults = folder, steps, random.Random(seed), []
        self.reference = (folder.parent / "reference" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        self.said = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.said.append(record.getMessage())
        logging.getLogger("polygpt").addHandler(handler)
        self.at = 0  # where the run stands
        self.go(2 * EVERY + 3)
        self.go(self.at + EVERY)

    def expect(self, holds, what):
        if not holds:
            self.faults.append(what)

    def go(self, until, steps=None, saves=None, error=None):
        """Goes on to a step, where SIGTERM comes. Returns (gone on from, the error's message)."""
        self.said.clear()
        begun, message = [], ""

        def loggers(workdir, step, steps_in_all):
            begun.append(step)
            stop = {} if until is None else {until: terminate}
            return [JsonLines(workdir, step), At(stop | (steps or {}), saves or {})]

        try:
            self.at = train(chosen(self.steps), self.folder, loggers).step
        except UserError as raised:
            message = str(raised)
        self.expect(bool(message) == bool(error) and (error or "") in message, f"ended with {message!r}")
        self.expect("\n" not in message, "an error of several lines")
        if error:
            self.at = (self.folder / "metrics.jsonl").read_bytes().count(b"\n")
        else:
            text = (self.folder / "metrics.jsonl").read_bytes()
            self.expect(text == b"".join(self.reference[: self.at]), f"the figures up to step {self.at} are others")
            self.expect(self.steps_on_disk()[-1:] == [self.at], "the last step is not saved")
        return (begun or [None])[0], message

    def steps_on_disk(self):
        return [record.step for record in records(self.folder / "checkpoints")]

    def again(self, expected, named=()):
        """Starts the run again; it has to go on from `expected`, having named what it passed over."""
        stood = self.at
        begun, _ = self.go(self.at + self.rng.randint(1, EVERY))
        self.expect(begun == expected, f"went on from {begun}, not {expected}")
        said = " ".join(self.said)
        for name in named:
            self.expect(name in said, f"{name} was not named")
        return stood - expected

    # What happens to checkpoints at rest.

    def damage(self, kind, harm):
        """To the newest, or the two newest, checkpoints: `harm(path)` to a file of each."""
        there = self.steps_on_disk()
        newest = there[-self.rng.randint(1, 2) :] if len(there) > 2 else there[-1:]
        injected, named = [], []
        for step in newest:
            place = self.folder / "checkpoints" / str(step)
            files = sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size)
            path = self.rng.choice(files)
            injected.append(f"{step}/{path.relative_to(place)} {harm(path)}".strip())
            named += [f"checkpoints/{step}", path.relative_to(place).parts[0]]
        good = [step for step in there if step not in newest]
        lost = self.again(good[-1], named)
        return {"injected": ", ".join(injected), "happened": f"named, passed over for {good[-1]}", "lost": lost}

    def bit_flip(self):
        def harm(path):
            content = bytearray(path.read_bytes())
            bit = self.rng.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            return f"bit {bit}"

        return self.damage("bit flip", harm)

    def truncation(self):
        def harm(path):
            size = path.stat().st_size
            left = self.rng.randrange(size)
            os.truncate(path, left)
            return f"{size} to {left} bytes"

        return self.damage("truncation", harm)

    def deletion(self):
        def harm(path):
            step = next(parent for parent in path.parents if parent.name.isdigit())
            if path.parent != step and self.rng.random() < 0.4:
                shutil.rmtree(step / path.relative_to(step).parts[0])
                return "and all beside it"
            path.unlink()
            return ""

        return self.damage("deletion", harm)

    # What happens to a run under way.

    def full_disk(self):
        """The disk is full for one or two saves of a run, and then is not."""
        failing, left, stood = self.rng.randint(1, 2), self.rng.randrange(100_000), self.at
        good = (stood // EVERY + 1) * EVERY
        again = good + (failing + 1) * EVERY

        def fill():
            self.until(lambda: self.steps_on_disk()[-1] == good)
            self.ballast(left)

        def free():
            self.until(lambda: self.failed() == failing)
            self.expect(self.steps_on_disk()[-1] == good, "the last good one is gone")
            self.relief()

        begun, _ = self.go(again + self.rng.randint(0, 2), {good + 1: fill}, {again: free})
        self.expect(begun == stood, f"went on from {begun}")
        self.expect(self.failed() == failing, f"{self.failed()} saves failed, not {failing}")
        return {
            "injected": f"{left:,} bytes left from step {good + 1} to {again}",
            "happened": f"{failing} saves failed and said so, run alive, the next was good",
            "lost": self.again(self.at),
        }

    def full_at_the_end(self):
        """The disk is full when the run is told to end: the last save fails, and so does the run."""
        self.go((self.at // EVERY + 1) * EVERY)
        kept, left = self.at, self.rng.randrange(100_000)
        end = {kept + 1: lambda: (self.ballast(left), terminate())}
        _, message = self.go(None, end, error="No space left on device")
        self.relief()
        injected = f"{left:,} bytes left for the last save"
        return {"injected": injected, "happened": message.split(": ", 1)[1], "lost": self.again(kept)}

    def file_limit(self):
        """No file may grow, by RLIMIT_FSIZE: the metrics cannot be written, and the run ends."""
        limit, step, before = self.rng.randint(0, 300), self.at + self.rng.randint(1, EVERY), self.at
        try:
            _, message = self.go(None, {step: lambda: self.limit(limit)}, error="File too large")
        finally:
            self.limit(resource.RLIM_INFINITY)
        last = self.steps_on_disk()[-1]
        self.expect(last >= before, f"the checkpoint of {before} is gone")
        lost = self.again(last)
        self.expect(lost <= EVERY + 2, f"{lost} steps lost")
        injected = f"no file above {limit} bytes from step {step} on"
        return {"injected": injected, "happened": message.split(": ", 1)[1], "lost": lost}

    def terminated_twice(self):
        """SIGTERM, and again as the save begins or while it is written."""
        stood, delay = self.at, self.rng.choice([0.0, self.rng.uniform(0.001, 0.2)])
        end = stood + self.rng.randint(1, 2 * EVERY)
        second = threading.Timer(delay, terminate) if delay else None
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the second signal may come after the run's end
        self.go(end, saves={end: second.start if second else terminate})
        if second:
            second.join()
        signal.signal(signal.SIGTERM, before)
        self.expect(end <= self.at <= end + 1, f"ended at {self.at}")
        injected = f"at step {end}, and {delay:.3f} s into the save"
        return {"injected": injected, "happened": f"saved {self.at} and ended", "lost": self.again(self.at)}

    def nan_batches(self):
        """So many batches of NaN in a row that the run gives up."""
        kept = (self.at // EVERY + 1) * EVERY
        put, made = Parallel.put, iter(range(self.at + 1, self.steps + 1))

        def poison(parallel, batch):
            if next(made) > kept:
                batch = batch.replace(weight_BT=np.full_like(batch.weight_BT, np.nan))
            return put(parallel, batch)

        Parallel.put = poison
        try:
            _, message = self.go(None, error=f"the checkpoint of step {kept} is intact")
        finally:
            Parallel.put = put
        return {"injected": f"from step {kept + 1} on", "happened": message.split(";")[0], "lost": self.again(kept)}

    def failed(self):
        return sum("was not written" in said for said in self.said)

    def until(self, holds):
        deadline = time.monotonic() + 60
        while not holds() and time.monotonic() < deadline:
            time.sleep(0.005)
        self.expect(holds(), "waited for a minute in vain")

    def ballast(self, left):
        """Fills the file system of the checkpoints up to `left` bytes."""
        with (self.folder / "checkpoints" / "ballast").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(1 << 16)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
            file.truncate(max(0, file.tell() - left))

    def relief(self):
        (self.folder / "checkpoints" / "ballast").unlink()

    def limit(self, size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def run(self, kinds):
        for kind in kinds:
            self.faults = []
            row = getattr(self, kind)()
            print(json.dumps({"kind": kind, **row, "faults": self.faults}), flush=True)
        self.faults = []
        begun, _ = self.go(None)
        reference = last_checkpoint(self.folder.parent / "reference")
        self.expect(last_checkpoint(self.folder) == reference, "the last state is another")
        row = {"kind": "end", "injected": "", "happened": f"{begun} to {self.at}", "lost": 0, "faults": self.faults}
        print(json.dumps(row), flush=True)


def main(what, folder, steps, *rest):
    folder, steps = Path(folder), int(steps)
    if what == "reference":
        train(chosen(steps, every=steps), folder, lambda workdir, step, _: [JsonLines(workdir, step)])
    elif what == "kill":
        save, event, delay = int(rest[0]), int(rest[1]), float(rest[2])

        def loggers(workdir, step, _):
            print(json.dumps({"from": step}), flush=True)
            return [JsonLines(workdir, step), Kill(workdir, save, event, delay)]

        train(chosen(steps), folder, loggers)
    else:
        Chain(folder, steps, int(rest[0])).run(rest[1:])


if __name__ == "__main__":
    main(*sys.argv[1:])
