"""polygpt generate RUN: generate text from a prompt of text, images, audio and other media."""

import argparse
import sys
import unicodedata
from argparse import Namespace
from pathlib import Path

from polygpt.cli.arguments import Parser, change
from polygpt.cli.evaluate import add_adapter, add_run, open_named
from polygpt.errors import UserError

EXAMPLES = """\
examples:
  polygpt generate runs/quickstart --text "Once upon a time" --temperature 0.8 --top_p 0.95
  polygpt generate runs/quickstart --image digit.png --text " plus " --audio seven.wav --text " is " --temperature 0
  polygpt generate runs/quadrants --medium point=point.bin
  polygpt generate runs/fill-in-the-middle --text "In the beginning God" --suffix " the heaven and the earth."
  polygpt generate runs/quickstart --adapter french.npz --text "Il "
  polygpt generate runs/quickstart --interactive

The prompt consists of these parts in the order given on the command line. Control characters in the generated text are
printed as escapes such as \\x1b; --json has the text itself."""

HELP = """Type text and press Return to generate a continuation. To build a longer prompt first, in any order:
  /image FILE             add an image
  /audio FILE             add a recording
  /medium NAME=FILE       add a media file for any adapter
  /text TEXT              add text
  /go                     generate from the prompt so far
  /clear                  discard the prompt          /quit or Ctrl-D    leave"""


class Part(argparse.Action):
    """Appends (kind, value) to `parts`, which keeps the order of different options."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.parts = [*namespace.parts, (self.dest, values)]


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, _sampling)
    add_run(words)
    add_adapter(words)
    words.set_defaults(parts=[])
    words.add_argument("--text", action=Part, metavar="TEXT", help="add text to the prompt")
    words.add_argument("--image", action=Part, metavar="FILE", help="add an image: short for --medium image=FILE")
    words.add_argument("--audio", action=Part, metavar="FILE", help="add a recording: short for --medium audio=FILE")
    anything = "add a media file to the prompt: the name of an adapter of the model, and a file that it can decode"
    words.add_argument("--medium", action=Part, metavar="NAME=FILE", help=anything)
    between = "write what lies between the prompt and this text, if the model was trained to fill in the middle"
    words.add_argument("--suffix", metavar="TEXT", help=between)
    words.add_argument("--interactive", action="store_true", help="read prompts from the terminal, one after another")
    return words


def _sampling(run, changes, options):
    from polygpt.generation.sampling import Sampling

    return change(Sampling(), changes, options)


def run(arguments: Namespace) -> dict:
    """Generates; returns the text and the reason why it ended."""
    sampling = _sampling(arguments.run, arguments.changes, arguments.options)
    if not arguments.interactive and not arguments.parts and arguments.suffix is None:
        raise UserError("generate: empty prompt: give --text, --image, --audio or --medium, or --interactive")
    if arguments.interactive and arguments.json:
        raise UserError("generate: --interactive and --json cannot be combined")
    if arguments.interactive and arguments.suffix is not None:
        raise UserError("generate: --interactive and --suffix cannot be combined")
    prompt = [_part(kind, value) for kind, value in arguments.parts]

    from polygpt.generation.generate import stream

    opened = open_named(arguments)
    given = (opened.model, opened.params, opened.tokenizer)
    layout = opened.experiment.data.layout
    if arguments.suffix is not None:
        prompt = opened.infill_prompt(prompt, [_part("text", arguments.suffix)])

    def show(parts) -> None:
        for piece in stream(*given, parts, layout, sampling):
            print(printable(piece), end="", flush=True)
        print()

    if arguments.interactive:
        _converse(show, prompt)
        return {}
    if not arguments.json:
        show(prompt)
        return {}
    (written,) = opened.generate([prompt], sampling)
    return {
        "step": opened.step,
        "prompt": [{kind: value} for kind, value in arguments.parts],
        **({} if arguments.suffix is None else {"suffix": arguments.suffix}),
        "text": written.text,
        "tokens": len(written.tokens),
        "finish": written.finish,
    }


def printable(text: str) -> str:
    """A text for the terminal: control characters other than newline and tab are escaped, such as \\x1b."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def _part(kind: str, value: str):
    """A part of the prompt. The layout checks later whether the model has the adapter."""
    from polygpt.data.example import Medium, Text

    if kind == "text":
        return Text(value)
    name, file = kind, value
    if kind == "medium":
        name, _, file = value.partition("=")
        if not name or not file:
            raise UserError(f"--medium {value}: write NAME=FILE, such as image=digit.png")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--{kind} {value}: no such file: give the path of a file")
    return Medium(name, path)


def _converse(show, prompt: list) -> None:
    """Reads lines of text or commands until end of input. Errors are printed and do not end the session."""
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
            elif command in ("/image", "/audio", "/medium", "/text"):
                prompt = [*prompt, _part(command[1:], value.strip() if command != "/text" else value)]
            elif command.startswith("/") and command != "/go":
                print(HELP, file=sys.stderr)
            else:
                show(prompt if command == "/go" else [*prompt, _part("text", line)])
                prompt = []
        except UserError as error:
            print(error, file=sys.stderr)
