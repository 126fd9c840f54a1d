"""Shared by the `launch` verbs: the launcher's arguments end at `--`, where the command begins."""

from argparse import ArgumentTypeError, Namespace
from pathlib import Path

from polygpt.cli.arguments import Parser


class LaunchParser(Parser):
    """Parses the launcher's own arguments up to `--`; the command that follows is in `.command`."""

    def __init__(self, prog: str, about: str, epilog: str):
        super().__init__(prog, about, epilog)
        self.usage = f"{prog} [options] -- train FILE [--workdir W] [--name value ...]"

    def read(self, argv: list[str]) -> Namespace:
        """Like `Parser.read`. Raises UserError if the command is missing or is not `train`."""
        cut = argv.index("--") if "--" in argv else len(argv)
        arguments = super().read(argv[:cut])
        arguments.command = argv[cut + 1 :]
        if arguments.command[:1] != ["train"]:
            given = f"{arguments.command[0]!r} follows" if arguments.command else "nothing follows"
            self.error(f"{given} the --: write the command after it, as in `{self.prog} ... -- train FILE`")
        return arguments


def workdir(command: list[str]) -> Path:
    """The run folder that a `train` command would use."""
    from polygpt.cli import experiment, train

    arguments = train.parser("polygpt train", "train").read(command[1:])
    return Path(arguments.workdir or Path("runs") / experiment.load(arguments.file, arguments.changes).name)


def require_many(command: list[str], processes: int) -> None:
    """Rejects, before anything starts, an experiment that cannot run in that many processes. A file that exists only on
    the remote machine is not checked.

    Raises:
        UserError: the experiment is for a single device, or is invalid.
    """
    from polygpt.cli import experiment, train

    arguments = train.parser("polygpt train", "train").read(command[1:])
    if processes > 1 and Path(arguments.file).is_file():
        from polygpt.training import parallel

        parallel.require_many(experiment.load(arguments.file, arguments.changes).train.parallel, processes)


def count(text: str) -> int:
    """An argparse type: a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
