"""polygpt launch slurm -- train FILE: submit a command as a multi-node SLURM job."""

from argparse import Namespace
from pathlib import Path

from polygpt.cli.launch import LaunchParser, count, require_many, workdir
from polygpt.errors import UserError

EXAMPLES = """\
examples:
  polygpt launch slurm --nodes 4 --gpus 8 --hours 24 --partition gpu -- train mine.py --train.parallel sharded
  polygpt launch slurm --nodes 2 --set slurm_account=lab --set cpus_per_task=32 -- train mine.py --train.parallel auto
  polygpt launch slurm --cluster local --tasks 2 -- train mine.py --train.parallel sharded    # on this machine

Runs one process per node with all its GPUs; --tasks splits them between several processes. Before the time limit or on
preemption the run saves, the job is requeued and resumes, any number of times (--set slurm_max_num_timeout=3 limits
it). The run folder and the logs must be on a shared file system."""


def parser(prog: str, about: str) -> LaunchParser:
    """The verb's arguments."""
    words = LaunchParser(prog, about, EXAMPLES)
    words.add_argument("--nodes", metavar="N", type=count, default=1, help="number of nodes (default: 1)")
    words.add_argument(
        "--tasks", metavar="N", type=count, default=1, help="processes per node, which share --gpus (default: 1)"
    )
    words.add_argument("--gpus", metavar="N", type=count, help="GPUs per node")
    words.add_argument("--hours", metavar="H", type=float, default=1.0, help="time limit in hours (default: 1)")
    words.add_argument("--partition", metavar="P", help="SLURM partition")
    words.add_argument("--name", metavar="NAME", default="polygpt", help="job name (default: polygpt)")
    words.add_argument("--folder", metavar="DIR", help="folder for script and logs (default: slurm in the run folder)")
    words.add_argument("--set", metavar="K=V", action="append", default=[], help="any other submitit parameter")
    words.add_argument(
        "--cluster", choices=("slurm", "local", "debug"), default="slurm", help="where to run (default: slurm)"
    )
    words.add_argument("--wait", action="store_true", help="wait until the job has ended")
    return words


def run(arguments: Namespace) -> dict:
    """Submits the job; returns its id and the path of its logs."""
    from polygpt.scale.launch import slurm

    require_many(arguments.command, arguments.nodes * arguments.tasks)
    folder = Path(arguments.folder) if arguments.folder else workdir(arguments.command) / "slurm"
    more = dict(_pair(text) for text in arguments.set)
    more |= {"gpus_per_node": arguments.gpus} if arguments.gpus else {}
    more |= {"slurm_partition": arguments.partition} if arguments.partition else {}
    task = slurm.Task(arguments.command)
    minutes = max(1, round(arguments.hours * 60))
    job = slurm.submit(task, folder, arguments.cluster, arguments.name, arguments.nodes, arguments.tasks, minutes, more)
    print(f"job {job.job_id}: logs in {folder}/{job.job_id}_*_log.out")
    done = {"job": job.job_id, "folder": folder}
    if arguments.wait:
        faults = [error for error in (sub.exception() for sub in job._sub_jobs or [job]) if error is not None]
        if faults:
            return done | {"interrupted": f"job {job.job_id}: {slurm.reason(faults[0])}: see {folder}"}
    return done


def _pair(text: str) -> tuple[str, str | int]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: write NAME=VALUE")
    return name, int(value) if value.isdecimal() else value
