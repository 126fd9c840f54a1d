"""polygpt launch local | slurm | gke | skypilot ... -- train FILE: the same command, in many processes."""

import os
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

from polygpt.cli.arguments import Parser
from polygpt.errors import UserError

EXAMPLES = {
    "local": """\
examples:
  polygpt launch local -n 2 -- train experiments/quickstart.py --train.parallel sharded
  polygpt launch local -n 4 --devices 2 -- train mine.py --workdir runs/mine

Process 0 prints here; each one writes to W/logs/p<number>.log, W being the run folder. When one of them dies, the
others end too, and the same command goes on where they were; another -n goes on as well, the data divided anew.""",
    "slurm": """\
examples:
  polygpt launch slurm --nodes 4 --gpus 8 --hours 24 --partition gpu -- train mine.py --train.parallel sharded
  polygpt launch slurm --nodes 2 --set slurm_account=lab --set cpus_per_task=32 -- train mine.py
  polygpt launch slurm --cluster local --tasks 2 -- train mine.py        the same, tried on this machine

One process runs on each node, with all its GPUs. Before the time is up, or when the job is preempted, the run saves,
and the job is queued again; it resumes. The run folder and the logs must lie where all nodes see them.""",
    "gke": """\
examples:
  polygpt launch gke --on v5e:16x16 --image IMAGE --bucket BUCKET -- train mine.py > polygpt.yaml
  polygpt launch gke --on v5p:8x8x8 --slices 2 --name big -- train mine.py --train.parallel sharded

Prints a JobSet for kubectl, with the xpk command of the same run in its first lines. Nothing is sent anywhere.""",
    "skypilot": """\
examples:
  polygpt launch skypilot --on v5e:4x8 --bucket BUCKET -- train mine.py > mine.yaml && sky jobs launch mine.yaml
  polygpt launch skypilot --on H100:8 --nodes 4 --spot -- train mine.py --train.parallel sharded

Prints a task for `sky`. Nothing is sent anywhere.""",
}


class LaunchParser(Parser):
    """Reads the launcher's own words up to `--`; what follows is the command, in `.command`."""

    def read(self, argv: list[str]) -> Namespace:
        """As Parser's. Raises UserError if the command is missing, or is none that runs in several processes."""
        cut = argv.index("--") if "--" in argv else len(argv)
        arguments = super().read(argv[:cut])
        arguments.command = argv[cut + 1 :]
        if arguments.command[:1] != ["train"]:
            given = f"{arguments.command[0]!r} follows" if arguments.command else "nothing follows"
            self.error(f"{given} the --: write the command after it, as in `{self.prog} ... -- train FILE`")
        return arguments


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments; which, its last word says."""
    place = prog.split()[-1]
    words = LaunchParser(prog, about, EXAMPLES[place])
    words.usage = f"{prog} [options] -- train FILE [--workdir W] [--name value ...]"
    words.set_defaults(place=place)
    {"local": _local_words, "slurm": _slurm_words, "gke": _gke_words, "skypilot": _skypilot_words}[place](words)
    return words


def run(arguments: Namespace) -> dict:
    """Starts the processes or prints the template; returns what was started or printed."""
    return {"local": _local, "slurm": _slurm, "gke": _gke, "skypilot": _skypilot}[arguments.place](arguments)


def _local_words(words: Parser) -> None:
    words.add_argument("-n", "--processes", metavar="N", type=_count, required=True, help="how many processes")
    words.add_argument("--devices", metavar="N", type=_count, default=1, help="devices for each (default: 1)")
    words.add_argument("--logs", metavar="DIR", help="where the logs go (default: logs in the run folder)")
    words.add_argument(
        "--grace",
        metavar="S",
        type=_count,
        default=20,
        help="seconds for the others to end when one died (default: 20)",
    )


def _local(arguments: Namespace) -> dict:
    from polygpt.scale.launch import local

    logs = Path(arguments.logs) if arguments.logs else _workdir(arguments.command) / "logs"
    outcome = local.run(arguments.command, arguments.processes, arguments.devices, logs, arguments.grace)
    done = {"codes": list(outcome.codes), "logs": logs}
    if outcome.cause is None:
        return done
    if outcome.ours:
        return done | {"interrupted": "the processes were interrupted: the same command goes on"}
    ended = f"{outcome.cause}: see {logs}"
    return done | ({"fault": ended} if 2 in outcome.codes else {"interrupted": f"{ended}; the same command resumes"})


def _slurm_words(words: Parser) -> None:
    words.add_argument("--nodes", metavar="N", type=_count, default=1, help="how many nodes (default: 1)")
    words.add_argument("--tasks", metavar="N", type=_count, default=1, help="processes on each node (default: 1)")
    words.add_argument("--gpus", metavar="N", type=_count, help="GPUs of each node")
    words.add_argument("--hours", metavar="H", type=float, default=1.0, help="the time limit (default: 1)")
    words.add_argument("--partition", metavar="P", help="SLURM's partition")
    words.add_argument("--name", metavar="NAME", default="polygpt", help="the job's name (default: polygpt)")
    words.add_argument("--folder", metavar="DIR", help="of script and logs (default: slurm in the run folder)")
    words.add_argument("--set", metavar="K=V", action="append", default=[], help="any other parameter of submitit")
    words.add_argument("--cluster", choices=("slurm", "local", "debug"), default="slurm", help="where (default: slurm)")
    words.add_argument("--wait", action="store_true", help="until the job has ended")


def _slurm(arguments: Namespace) -> dict:
    from polygpt.scale.launch import slurm

    folder = Path(arguments.folder) if arguments.folder else _workdir(arguments.command) / "slurm"
    more = dict(_pair(text) for text in arguments.set)
    more |= {"gpus_per_node": arguments.gpus} if arguments.gpus else {}
    more |= {"slurm_partition": arguments.partition} if arguments.partition else {}
    task = slurm.Task(arguments.command)
    minutes = max(1, round(arguments.hours * 60))
    job = slurm.submit(task, folder, arguments.cluster, arguments.name, arguments.nodes, arguments.tasks, minutes, more)
    print(f"job {job.job_id}: its logs are {folder}/{job.job_id}_*_log.out")
    done = {"job": job.job_id, "folder": folder}
    if arguments.wait:
        faults = [str(error) for error in (sub.exception() for sub in job._sub_jobs or [job]) if error is not None]
        if faults:
            lines = [line for line in faults[0].splitlines() if line.strip()]
            return done | {"interrupted": f"job {job.job_id}: {lines[-1]}: see {folder}"}
    return done


def _gke_words(words: Parser) -> None:
    words.add_argument("--on", metavar="SLICE", required=True, help="the TPU slice, such as v5e:16x16 or v5p:4x4x8")
    words.add_argument("--slices", metavar="N", type=_count, default=1, help="how many slices (default: 1)")
    words.add_argument("--name", metavar="NAME", default="polygpt", help="the job's name (default: polygpt)")
    words.add_argument("--image", metavar="IMAGE", help="a container image with polygpt and the experiment's file")
    words.add_argument("--bucket", metavar="BUCKET", help="the bucket that is mounted at /runs")
    for name in ("cluster", "project", "zone"):
        words.add_argument(f"--{name}", metavar=name.upper(), help=f"for xpk: the {name}")


def _gke(arguments: Namespace) -> dict:
    from polygpt.scale.launch import templates

    names = ("image", "bucket", "cluster", "project", "zone")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    slice = templates.Slice(arguments.on)
    return _printed(templates.gke(arguments.command, slice, arguments.slices, arguments.name, **given))


def _skypilot_words(words: Parser) -> None:
    words.add_argument("--on", metavar="WHAT", required=True, help="a TPU slice, v5e:4x8, or a node's GPUs, H100:8")
    words.add_argument("--nodes", metavar="N", type=_count, default=1, help="nodes with GPUs (default: 1)")
    words.add_argument("--name", metavar="NAME", default="polygpt", help="the task's name (default: polygpt)")
    words.add_argument("--bucket", metavar="BUCKET", default="BUCKET", help="the bucket that is mounted at /runs")
    words.add_argument("--spot", action="store_true", help="on machines that may be taken away")


def _skypilot(arguments: Namespace) -> dict:
    from polygpt.scale.launch import templates

    given = (arguments.command, arguments.on, arguments.nodes, arguments.name, arguments.bucket, arguments.spot)
    return _printed(templates.skypilot(*given))


def _printed(text: str) -> dict:
    print(text, end="")
    return {"template": text}


def _workdir(command: list[str]) -> Path:
    """The run folder of a `train` command, as that verb would find it."""
    from polygpt.cli import experiment, train

    arguments = train.parser("polygpt train", "train").read(command[1:])
    return Path(arguments.workdir or Path("runs") / experiment.load(arguments.file, arguments.changes).name)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _pair(text: str) -> tuple[str, str | int]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: write NAME=VALUE")
    return name, int(value) if value.isdecimal() else os.path.expandvars(value)
