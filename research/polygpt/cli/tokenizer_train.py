"""polygpt tokenizer train FILES --out F: train a byte-level BPE tokenizer."""

from argparse import Namespace
from pathlib import Path

from polygpt.cli.arguments import Parser
from polygpt.errors import UserError

EXAMPLES = """\
examples:
  polygpt tokenizer train "texts/**/*.txt" --vocabulary 4096 --out texts/bpe.json

An experiment uses it with tokenizer=BPE("texts/bpe.json")."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES)
    words.add_argument("files", metavar="FILE", nargs="+", help="UTF-8 text files, or quoted glob patterns")
    words.add_argument(
        "--vocabulary", type=int, default=4096, metavar="V", help="maximum vocabulary size (default: 4096)"
    )
    words.add_argument("--out", required=True, metavar="F", help="JSON file to write")
    return words


def run(arguments: Namespace) -> dict:
    """Trains and writes the tokenizer; returns its path and size."""
    from polygpt.cli.progress import Progress
    from polygpt.data.sources.text_files import find_files
    from polygpt.data.tokenizers.bpe import train_bpe

    out = Path(arguments.out)
    if out.is_dir():
        raise UserError(f"tokenizer train: --out {out} is a folder: name a file, such as {out / 'bpe.json'}")
    files = find_files(arguments.files)
    with Progress("training") as progress:
        vocabulary = train_bpe(files, arguments.vocabulary, out, progress).build().vocabulary
    print(f"{out}: {vocabulary:,} token ids from {len(files)} file(s)")
    return {"file": out, "vocabulary": vocabulary, "files": len(files)}
