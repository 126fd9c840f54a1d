"""A SLURM job of several nodes, through submitit.

One process a node (or a task) runs the command; before the time limit, or when the job is preempted, the run saves and
the job goes back into the queue, where the same command resumes.
"""

import dataclasses
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polygpt.errors import UserError
from polygpt.scale.launch.local import PROGRAM
from polygpt.training.processes import COORDINATOR, PROCESS, PROCESSES

PORTS = (61440, 4096)
"""The first port for coordinators and how many there are; a job takes one by its number, as JAX does."""


@dataclasses.dataclass
class Task:
    """What submitit runs in each task of a job.

    Attributes:
        command: words after `program`.
        program: the words in front.
    """

    command: list[str]
    program: Sequence[str] = PROGRAM

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
        # Of its own, not in this process: submitit has the signals here.
        self.process = subprocess.Popen([*self.program, *self.command], env=os.environ | place)
        code = self.process.wait()
        if code:
            raise RuntimeError(f"process {self.here.global_rank} on {self.here.hostname} ended with code {code}")
        return code

    def checkpoint(self):
        """Called by submitit before the job is stopped: the run saves, and the same task is queued again."""
        import submitit

        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        return submitit.helpers.DelayedSubmission(Task(self.command, self.program))


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
    """Submits a job and returns it, submitit's.

    Args:
        task: what each task runs.
        folder: of the job's script and logs; on a file system that all nodes see.
        cluster: "slurm", or submitit's "local" and "debug", on this machine.
        name: of the job.
        nodes, tasks: how many nodes, and processes on each.
        minutes: the time limit.
        more: of submitit's parameters, "gpus_per_node", "cpus_per_task", "slurm_partition", ...

    Raises:
        UserError: if submitit is not installed, or SLURM refuses.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("launch slurm needs submitit, which is not installed: pip install 'polygpt[slurm]'") from None
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster)
        executor.update_parameters(
            name=name, nodes=nodes, tasks_per_node=tasks, timeout_min=minutes, stderr_to_stdout=True, **(more or {})
        )
        return executor.submit(task)
    except (RuntimeError, ValueError, NameError, OSError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"the job was not submitted: {error}") from error
