"""polygpt launch local -n N -- train FILE: a command in several processes on this machine."""

from argparse import Namespace
from pathlib import Path

from polygpt.cli.launch import LaunchParser, count, require_many, workdir

EXAMPLES = """\
examples:
  polygpt launch local -n 2 -- train experiments/quickstart.py --train.parallel sharded
  polygpt launch local -n 4 --devices 2 -- train mine.py --train.parallel auto --workdir runs/mine

Process 0 prints here, and each process writes W/logs/p<rank>.log, where W is the run folder. When one of them dies, the
others exit too, and the same command resumes. It also resumes with a different -n: the data is then divided again."""


def parser(prog: str, about: str) -> LaunchParser:
    """The verb's arguments."""
    words = LaunchParser(prog, about, EXAMPLES)
    words.add_argument("-n", "--processes", metavar="N", type=count, required=True, help="how many processes")
    words.add_argument("--devices", metavar="N", type=count, default=1, help="devices per process (default: 1)")
    words.add_argument("--logs", metavar="DIR", help="folder of the logs (default: logs in the run folder)")
    words.add_argument(
        "--grace",
        metavar="S",
        type=count,
        default=20,
        help="seconds for the others to exit when one has died (default: 20)",
    )
    return words


def run(arguments: Namespace) -> dict:
    """Runs the processes until the last one has exited; returns their exit codes and the folder of their logs."""
    from polygpt.scale.launch import local

    require_many(arguments.command, arguments.processes)
    logs = Path(arguments.logs) if arguments.logs else workdir(arguments.command) / "logs"
    outcome = local.run(arguments.command, arguments.processes, arguments.devices, logs, arguments.grace)
    done = {"codes": list(outcome.codes), "logs": logs}
    if outcome.cause is None:
        return done
    if outcome.asked:
        return done | {"interrupted": "the processes were interrupted: the same command resumes"}
    if local.AT_FAULT in outcome.codes:
        return done | {"fault": f"the processes have exited: see the logs in {logs}"}
    return done | {"interrupted": f"{outcome.cause}: see {logs}; the same command resumes"}
