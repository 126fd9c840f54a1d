"""The table of ablations in experiments/README.md, from their own READMEs."""

import dataclasses
import re
from pathlib import Path

from polygpt.ablation.readme import README, command
from polygpt.ablation.study import FILE, PLACE, load_ablation
from polygpt.errors import UserError
from polygpt.files import write_atomically
from polygpt.markup import escaped_markdown

MARKS = ("<!-- ablations: written by polygpt ablate -->", "<!-- end of ablations -->")


@dataclasses.dataclass(frozen=True)
class Entry:
    """An ablation.

    Attributes:
        slug: name of its folder.
        question, verdict, cost: one sentence each, in Markdown; verdict and cost are "" before the first run.
        command: the command that runs it.
    """

    slug: str
    question: str
    verdict: str
    cost: str
    command: str


def entries(experiments: Path) -> list[Entry]:
    """The ablations of a folder `experiments`, by name."""
    found = []
    for file in sorted((experiments / PLACE.name).glob(f"*/{FILE}")):
        text = path.read_text(encoding="utf-8") if (path := file.with_name(README)).is_file() else ""
        said = dict(re.findall(r"^\*\*(\w+)\.\*\* (.*)$", text, re.MULTILINE))
        question = said.get("Question") or escaped_markdown(load_ablation(file).question)
        verdict, cost = said.get("Verdict", ""), said.get("Cost", "")
        found.append(Entry(file.parent.name, question, verdict, cost, command(file.parent)))
    return found


def write(experiments: Path) -> Path | None:
    """Updates the table between its markers in the folder's README; None if there are no markers.

    Raises:
        UserError: one of the two markers is missing.
    """
    path = experiments / README
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not any(mark in text for mark in MARKS):
        return None
    write_atomically(path, _replaced(path, text, experiments))
    return path


def stale(experiments: Path) -> bool:
    """Whether `write` would change the file."""
    path = experiments / README
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return any(mark in text for mark in MARKS) and _replaced(path, text, experiments) != text


def table(found: list[Entry]) -> str:
    """The table in Markdown."""
    lines = ["| ablation | question | verdict | cost | command |", "|---|---|---|---|---|"]
    for one in found:
        link = f"[{one.slug}]({PLACE.name}/{one.slug})"
        lines.append(
            f"| {link} | {one.question} | {one.verdict or 'not run yet'} | {one.cost or '–'} | `{one.command}` |"
        )
    return "\n".join(lines)


def _replaced(path: Path, text: str, experiments: Path) -> str:
    begin, end = MARKS
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{path}: the table of ablations must be between {begin} and {end}: one of them is missing")
    return f"{before}{begin}\n{table(entries(experiments))}\n{end}{after}"
