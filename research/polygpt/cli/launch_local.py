"""polygpt launch local -n N -- train FILE: a command in several processes on this machine."""

from argparse import Namespace
from pathlib import Path

from polygpt.cli.launch import LaunchParser, count, require_many, workdir

EXAMPLES = """\
examples:
  polygpt launch local -n 2 -- train experiments/quickstart.py --train.parallel sharded
  polygpt launch local -n 4 --devices 2 -- train mine.py --train.parallel auto --workdir runs/mine

Process 0 prints here; each one writes to W/logs/p<number>.log, W being the run folder. When one of them dies, the
others end too, and the same command goes on where they were; another -n goes on as well, the data divided anew."""


def parser(prog: str, about: str) -> LaunchParser:
    """The verb's arguments."""
    words = LaunchParser(prog, about, EXAMPLES)
    words.add_argument("-n", "--processes", metavar="N", type=count, required=True, help="how many processes")
    words.add_argument("--devices", metavar="N", type=count, default=1, help="devices for each (default: 1)")
    words.add_argument("--logs", metavar="DIR", help="where the logs go (default: logs in the run folder)")
    words.add_argument(
        "--grace",
        metavar="S",
        type=count,
        default=20,
        help="seconds for the others to end when one died (default: 20)",
    )
    return words


def run(arguments: Namespace) -> dict:
    """Runs the processes until the last one has ended; returns their exit codes and the place of their logs."""
    from polygpt.scale.launch import local

    require_many(arguments.command, arguments.processes)
    logs = Path(arguments.logs) if arguments.logs else workdir(arguments.command) / "logs"
    outcome = local.run(arguments.command, arguments.processes, arguments.devices, logs, arguments.grace)
    done = {"codes": list(outcome.codes), "logs": logs}
    if outcome.cause is None:
        return done
    if outcome.ours:
        return done | {"interrupted": "the processes were interrupted: the same command goes on"}
    if local.AT_FAULT in outcome.codes:
        return done | {"fault": f"the processes have ended: their logs are in {logs}"}
    return done | {"interrupted": f"{outcome.cause}: see {logs}; the same command resumes"}
