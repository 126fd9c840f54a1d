"""Plain English text: a third of it the King James Bible, chapter by chapter, the rest WordNet's definitions."""

import re
import subprocess
from pathlib import Path

from voices import number

# Narrative and verse that read well alone; the held-out books are whole books.
BIBLE = "genesis exodus ruth 1samuel 2samuel job psalms proverbs ecclesiastes jonah matthew mark luke john acts".split()
HELD_OUT_BOOKS = {"ruth", "jonah", "ecclesiastes"}
DEFINITIONS = 24_000


def documents(work: Path):
    """Yields (manifest row, text): chapters of the Bible, and WordNet entries fifty to a document."""
    for book in BIBLE:
        text = subprocess.run(["bible", "-f", book], check=True, capture_output=True, text=True).stdout
        chapters: dict[int, list[str]] = {}
        for line in text.splitlines():
            chapter, verse = re.match(r"\S+?(\d+):\d+ (.*)", line).groups()
            chapters.setdefault(int(chapter), []).append(verse)
        for chapter, verses in chapters.items():
            split = "test" if book in HELD_OUT_BOOKS else "train"
            yield {"file": f"bible/{book}-{chapter:03d}.txt", "split": split, "source": "bible"}, " ".join(verses)
    entries = sorted(definitions(work), key=lambda entry: number(entry))[:DEFINITIONS]
    for start in range(0, len(entries), 50):
        split = "test" if start // 50 % 20 == 19 else "train"
        row = {"file": f"wordnet/{start // 50:04d}.txt", "split": split, "source": "wordnet"}
        yield row, "\n".join(entries[start : start + 50])


def definitions(work: Path):
    """Yields "word: definition" lines, plain ASCII, of lower-case words."""
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
