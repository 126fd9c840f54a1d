"""polygpt launch local -n N -- train FILE: run a command in several processes on this machine."""

from argparse import Namespace
from pathlib import Path

from polygpt.cli.launch import LaunchParser, count, require_many, workdir

EXAMPLES = """\
examples:
  polygpt launch local -n 2 -- train experiments/quickstart.py --train.parallel sharded
  polygpt launch local -n 4 --devices 2 -- train mine.py --train.parallel auto --workdir runs/mine

Process 0 prints to this terminal. Each process writes W/logs/p<rank>.log, where W is the run folder. If one dies, the
others exit too. The same command resumes, also with a different -n: the data is then resharded."""


def parser(prog: str, about: str) -> LaunchParser:
    """The verb's arguments."""
    words = LaunchParser(prog, about, EXAMPLES)
    words.add_argument("-n", "--processes", metavar="N", type=count, required=True, help="number of processes")
    words.add_argument("--devices", metavar="N", type=count, default=1, help="devices per process (default: 1)")
    words.add_argument("--logs", metavar="DIR", help="folder for logs (default: logs in the run folder)")
    words.add_argument(
        "--grace",
        metavar="S",
        type=count,
        default=20,
        help="seconds for the others to exit after one died (default: 20)",
    )
    return words


def run(arguments: Namespace) -> dict:
    """Runs the processes until all have exited; returns their exit codes and the log folder."""
    from polygpt.scale.launch import local

    require_many(arguments.command, arguments.processes)
    logs = Path(arguments.logs) if arguments.logs else workdir(arguments.command) / "logs"
    outcome = local.run(arguments.command, arguments.processes, arguments.devices, logs, arguments.grace)
    done = {"codes": list(outcome.exit_codes), "logs": logs}
    if outcome.cause is None:
        return done
    if outcome.stopped:
        return done | {"interrupted": "interrupted: the same command resumes"}
    if local.INVALID_INPUT in outcome.exit_codes:
        return done | {"fault": f"the processes exited: see the logs in {logs}"}
    return done | {"interrupted": f"{outcome.cause}: see {logs}; the same command resumes"}
