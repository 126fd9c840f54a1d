"""polygpt launch gke --on SLICE -- train FILE: print a JobSet and an xpk command."""

from argparse import Namespace

from polygpt.cli.launch import LaunchParser, count, require_many

EXAMPLES = """\
examples:
  polygpt launch gke --on v5e:16x16 --image IMAGE --bucket B -- train mine.py --train.parallel auto > mine.yaml
  polygpt launch gke --on v5p:8x8x8 --slices 2 --name big -- train mine.py --train.parallel sharded

Prints a JobSet for kubectl; its first lines have the equivalent xpk command. Nothing is submitted."""


def parser(prog: str, about: str) -> LaunchParser:
    """The verb's arguments."""
    words = LaunchParser(prog, about, EXAMPLES)
    words.add_argument("--on", metavar="SLICE", required=True, help="TPU slice, such as v5e:16x16 or v5p:4x4x8")
    words.add_argument("--slices", metavar="N", type=count, default=1, help="number of slices (default: 1)")
    words.add_argument("--name", metavar="NAME", default="polygpt", help="job name (default: polygpt)")
    words.add_argument("--image", metavar="IMAGE", help="container image with polygpt and the experiment file")
    words.add_argument("--bucket", metavar="BUCKET", help="bucket to mount at /runs")
    for name in ("cluster", "project", "zone"):
        words.add_argument(f"--{name}", metavar=name.upper(), help=f"for xpk: the {name}")
    return words


def run(arguments: Namespace) -> dict:
    """Prints the manifest and returns it."""
    from polygpt.scale.launch import templates

    names = ("image", "bucket", "cluster", "project", "zone")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    slice = templates.Slice(arguments.on)
    require_many(arguments.command, slice.hosts * arguments.slices)
    text = templates.gke(arguments.command, slice, arguments.slices, arguments.name, **given)
    print(text, end="")
    return {"template": text}
