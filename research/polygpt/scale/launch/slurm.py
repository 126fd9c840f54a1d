"""A SLURM job of several nodes, through submitit.

One process per node (or task) runs the command. Before the time limit, or when the job is preempted, the run saves and
the job is requeued; the same command then resumes.
"""

import contextlib
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from polygpt.errors import UserError
from polygpt.runtime.processes import COORDINATOR, PROCESS, PROCESSES
from polygpt.scale.launch.local import PROGRAM, gpus

REQUEUES = 10_000
"""Default number of times that a job is requeued at its time limit."""
REMEDIES = {
    'Could not detect "srun"': ": submit from a login node, or try it here with --cluster local",
    "can use only one node": ": with --cluster local, leave --nodes out and give --tasks",
}
"""Remedies for errors of submitit, by a part of the message."""
PORTS = (61440, 4096)
"""First port for coordinators and number of ports. The job id chooses one, as in JAX."""


@dataclasses.dataclass
class Task:
    """The callable that submitit runs in each task of a job.

    Attributes:
        command: arguments of `program`.
        program: the program and its first arguments.
        gpus: GPUs of the node per process; None for all that SLURM assigns.
    """

    command: list[str]
    program: Sequence[str] = PROGRAM
    gpus: int | None = None

    def __call__(self) -> int:
        import submitit

        self.here = submitit.JobEnvironment()
        first, count = PORTS
        number = int(self.here.job_id.partition("_")[0])
        place = {
            COORDINATOR: f"{self.here.hostnames[0]}:{first + number % count}",
            PROCESSES: str(self.here.num_tasks),
            PROCESS: str(self.here.global_rank),
        }
        if self.gpus:
            tasks = self.here.num_tasks // self.here.num_nodes
            place["CUDA_VISIBLE_DEVICES"] = gpus(self.here.local_rank, tasks, self.gpus)
        # A child process, because submitit handles the signals of this one.
        self.process = subprocess.Popen([*self.program, *self.command], env=os.environ | place)
        code = self._wait()
        if code:
            raise RuntimeError(f"process {self.here.global_rank} on {self.here.hostname} ended with code {code}")
        return code

    def checkpoint(self):
        """Called by submitit before the job is stopped: the run saves and the same task is requeued.

        It runs in a signal handler that interrupts __call__.
        """
        import submitit

        self.process.send_signal(signal.SIGTERM)
        self._wait()
        return submitit.helpers.DelayedSubmission(dataclasses.replace(self))

    def _wait(self) -> int:
        """Waits for the process; returns its exit code. Takes no lock, because `checkpoint` interrupts it."""
        threading.Thread(target=self.process.wait, daemon=True).start()
        while self.process.returncode is None:
            time.sleep(0.1)
        return self.process.returncode


def submit(
    task: Task,
    folder: Path,
    cluster: str = "slurm",
    name: str = "polygpt",
    nodes: int = 1,
    tasks: int = 1,
    minutes: int = 60,
    more: dict[str, Any] | None = None,
):
    """Submits a job and returns submitit's job object.

    Args:
        task: what each task runs.
        folder: folder of the job's script and logs, on a file system that all nodes share.
        cluster: "slurm", or submitit's "local" and "debug", on this machine.
        name: name of the job.
        nodes: number of nodes.
        tasks: processes per node.
        minutes: time limit.
        more: further parameters of submitit, "gpus_per_node", "cpus_per_task", "slurm_partition", ...

    Raises:
        UserError: if submitit is not installed, the GPUs of a node cannot be divided, or SLURM rejects the job.
    """
    more = more or {}
    count = more.get("slurm_gpus_per_node", more.get("gpus_per_node"))
    if tasks > 1 and isinstance(count, int):
        if count % tasks:
            raise UserError(f"{count} GPUs cannot be divided among {tasks} tasks of a node: choose another --tasks")
        task = dataclasses.replace(task, gpus=count // tasks)
    made = executor(folder, cluster, name, nodes, tasks, minutes, more)
    with submission_errors():
        return made.submit(task)


def executor(folder: Path, cluster: str, name: str, nodes: int, tasks: int, minutes: int, more: dict[str, Any]) -> Any:
    """submitit's executor; for the arguments and errors see `submit`."""
    try:
        import submitit
    except ImportError:
        raise UserError("SLURM needs submitit, which is not installed: pip install -e '.[slurm]'") from None
    # submitit's default is three times, too few for long training.
    requeues = {"slurm_max_num_timeout": REQUEUES}
    requeues |= {name: more[name] for name in requeues if name in more}
    more = {name: value for name, value in more.items() if name not in requeues}
    with submission_errors():
        made = submitit.AutoExecutor(folder, cluster=cluster, **requeues)
        # A stopped task exits with an error; SLURM must not then kill the one that requeues the job.
        given = more.get("slurm_srun_args", [])
        given = shlex.split(given) if isinstance(given, str) else given
        more = more | {"slurm_srun_args": ["--kill-on-bad-exit=0", *given]}
        made.update_parameters(
            name=name, nodes=nodes, tasks_per_node=tasks, timeout_min=minutes, stderr_to_stdout=True, **more
        )
    return made


@contextlib.contextmanager
def submission_errors() -> Iterator[None]:
    """Turns an error of submitit or SLURM into a UserError."""
    import submitit

    try:
        yield
    except (RuntimeError, ValueError, NameError, OSError, submitit.core.utils.FailedSubmissionError) as error:
        said = str(error)
        remedy = next((remedy for words, remedy in REMEDIES.items() if words in said), "")
        raise UserError(f"the job was not submitted: {said}{remedy}") from error


def reason(error: BaseException) -> str:
    """Why a job failed: one line of submitit's report.

    It is the last line that names an error, such as `RuntimeError: process 1 on node7 ended with code 9`, or else the
    first line, which has the job's state.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = (line for line in reversed(lines) if re.match(r"[\w.]*Error: ", line))
    return next(named, lines[0] if lines else type(error).__name__)
