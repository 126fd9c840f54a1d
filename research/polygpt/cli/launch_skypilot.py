"""polygpt launch skypilot --on WHAT -- train FILE: print a SkyPilot task."""

from argparse import Namespace

from polygpt.cli.launch import LaunchParser, count, require_many

EXAMPLES = """\
examples:
  polygpt launch skypilot --on v5e:4x8 --bucket BUCKET -- train mine.py --train.parallel auto > mine.yaml
  sky jobs launch mine.yaml
  polygpt launch skypilot --on H100:8 --nodes 4 --spot -- train mine.py --train.parallel sharded

Prints a task for `sky`. Nothing is submitted."""


def parser(prog: str, about: str) -> LaunchParser:
    """The verb's arguments."""
    words = LaunchParser(prog, about, EXAMPLES)
    words.add_argument("--on", metavar="WHAT", required=True, help="TPU slice (v5e:4x8) or GPUs per node (H100:8)")
    words.add_argument("--nodes", metavar="N", type=count, default=1, help="number of GPU nodes (default: 1)")
    words.add_argument("--name", metavar="NAME", default="polygpt", help="task name (default: polygpt)")
    words.add_argument("--bucket", metavar="BUCKET", default="BUCKET", help="bucket to mount at /runs")
    words.add_argument("--spot", action="store_true", help="use preemptible machines")
    return words


def run(arguments: Namespace) -> dict:
    """Prints the task and returns it."""
    from polygpt.scale.launch import templates

    given = (arguments.command, arguments.on, arguments.nodes, arguments.name, arguments.bucket, arguments.spot)
    text = templates.skypilot(*given)  # validates --on
    require_many(arguments.command, templates.machines(arguments.on, arguments.nodes))
    print(text, end="")
    return {"template": text}
