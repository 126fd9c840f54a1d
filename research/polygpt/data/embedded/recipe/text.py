"""Plain English text: half chapters of the King James Bible, half WordNet definitions."""

import re
import subprocess
from pathlib import Path

from voices import number

BOOKS = "Ge Exo Ruth 1Sm 2Sm Job Prv Eccl Jonah Mat Luke John Acts".split()  # narrative and verse
HELD_OUT_BOOKS = {"Ruth", "Eccl", "Jonah"}
DEFINITIONS = 16_000


def documents(work: Path):
    """Yields (manifest row, text): chapters of the Bible, and WordNet entries fifty to a document."""
    lines = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True).stdout
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in lines.splitlines():
        book, chapter, verse = re.match(r"(\d?[A-Za-z]+)(\d+):\d+ (.*)", line).groups()
        if book in BOOKS:
            chapters.setdefault((book, int(chapter)), []).append(verse)
    for (book, chapter), verses in chapters.items():
        split = "test" if book in HELD_OUT_BOOKS else "train"
        yield {"file": f"bible/{book}-{chapter:03d}.txt", "split": split, "source": "bible"}, " ".join(verses)
    entries = sorted(definitions(work), key=lambda entry: number(entry))[:DEFINITIONS]
    for start in range(0, len(entries), 50):
        split = "test" if start // 50 % 20 == 19 else "train"
        row = {"file": f"wordnet/{start // 50:04d}.txt", "split": split, "source": "wordnet"}
        yield row, "\n".join(entries[start : start + 50])


def definitions(work: Path):
    """Yields "word: definition" lines in plain ASCII for lower-case words."""
    for part in ("noun", "verb", "adj", "adv"):
        path = work / "wordnet-base/usr/share/wordnet" / f"data.{part}"
        for line in path.read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):  # the licence, which ATTRIBUTION.md repeats
                continue
            synset, _, gloss = line.partition(" | ")
            word = re.sub(r"\(.*\)", "", synset.split()[4]).replace("_", " ")
            gloss = " ".join(gloss.split()).rstrip(";")
            if word.isascii() and word.islower() and gloss.isascii() and gloss.count('"') % 2 == 0 and len(gloss) < 300:
                yield f"{word}: {gloss}"
