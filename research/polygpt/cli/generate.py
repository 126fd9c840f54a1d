"""polygpt generate RUN: the model's continuation of texts, pictures and recordings."""

import argparse
import sys
from argparse import Namespace
from pathlib import Path

from polygpt.cli.arguments import Parser, change
from polygpt.cli.evaluate import add_run
from polygpt.errors import UserError

EXAMPLES = """\
examples:
  polygpt generate runs/quickstart --text "Once upon a time" --temperature 0.8 --top_p 0.95
  polygpt generate runs/quickstart --image digit.png --text " plus " --audio seven.wav --text " is " --temperature 0
  polygpt generate runs/quickstart --interactive

The parts of the prompt are read in the order in which they stand on the command line."""

HELP = """Type a text and press Return: the model goes on from it. Before it, in any order:
  /image FILE    put a picture into the prompt
  /audio FILE    put a recording into the prompt
  /text TEXT     put a text into the prompt, and go on with it
  /go            let the model go on from what is there
  /clear         forget the prompt        /quit or Ctrl-D    leave"""


class Part(argparse.Action):
    """Appends (kind, value) to `parts`, so that the order of different options is kept."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.parts = [*namespace.parts, (self.dest, values)]


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, _sampling)
    add_run(words)
    words.set_defaults(parts=[])
    words.add_argument("--text", action=Part, metavar="TEXT", help="a text of the prompt")
    words.add_argument("--image", action=Part, metavar="FILE", help="a picture of the prompt")
    words.add_argument("--audio", action=Part, metavar="FILE", help="a recording of the prompt")
    words.add_argument("--interactive", action="store_true", help="prompt after prompt, typed")
    return words


def _sampling(run, changes, options):
    from polygpt.generation.sampling import Sampling

    return change(Sampling(), changes, options)


def run(arguments: Namespace) -> dict:
    """Generates; returns the text and why it ended."""
    from polygpt.generation.generate import generate, stream
    from polygpt.training.run import open_run

    sampling = _sampling(arguments.run, arguments.changes, arguments.options)
    if not arguments.interactive and not arguments.parts:
        raise UserError("generate: an empty prompt: give --text, --image or --audio, or --interactive")
    if arguments.interactive and arguments.json:
        raise UserError("generate: --interactive and --json exclude each other: leave one out")
    prompt = [_part(kind, value) for kind, value in arguments.parts]
    opened = open_run(arguments.run, arguments.checkpoint, arguments.spread)
    given = (opened.model, opened.params, opened.tokenizer)
    layout = opened.experiment.data.layout

    def show(parts) -> None:
        for piece in stream(*given, parts, layout, sampling):
            print(piece, end="", flush=True)
        print()

    if arguments.interactive:
        _converse(show, prompt)
        return {}
    if not arguments.json:
        show(prompt)
        return {}
    (written,) = generate(*given, [prompt], layout, sampling)
    return {
        "step": opened.step,
        "prompt": [{kind: value} for kind, value in arguments.parts],
        "text": written.text,
        "tokens": len(written.tokens),
        "finish": written.finish,
    }


def _part(kind: str, value: str):
    from polygpt.data.example import Medium, Text

    if kind == "text":
        return Text(value)
    path = Path(value)
    if not path.is_file():
        raise UserError(f"--{kind} {value}: no such file: give the path of a file")
    return Medium(kind, path)


def _converse(show, prompt: list) -> None:
    """Reads lines, each a text or a command, until the end; an error is told and the conversation goes on."""
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        command, _, value = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/clear":
                prompt = []
            elif command in ("/image", "/audio", "/text"):
                prompt = [*prompt, _part(command[1:], value.strip() if command != "/text" else value)]
            elif command.startswith("/") and command != "/go":
                print(HELP, file=sys.stderr)
            else:
                show(prompt if command == "/go" else [*prompt, _part("text", line)])
                prompt = []
        except UserError as error:
            print(error, file=sys.stderr)
