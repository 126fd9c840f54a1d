"""Plain English: searches the tree for banned turns of phrase and suggests better wording."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COUNTS = "tokens|steps|bytes|bits|nats|times|rows|positions|choices|chips|cores|devices|links|GPUs|FLOPs|[GMk]B|ms"
UNITS = "second|step|device|row|position|chip|core|link|GPU|token|byte|host|process|seed|variant|layer|block|query"
BANNED = {
    rf"\b({COUNTS}) an? ({UNITS})\b(?! (time|later))": "per",
    r"\bto be had\b": "available",
    r"\bcomputed (again|anew)\b": "recomputed",
    r"\bgo(es)? on (from|at|with)\b": "resumes at, continues with",
    r"\banew\b": "again",
    r"\b(makes? up|making up) for\b": "reruns",
    r"\bgives? up (runs|trials)\b": "prunes",
    r"\bholds? no\b": "has no",
    r"\bthere is no place for\b": "unexpected",
    r"\bheld to\b": "checked against",
    r"\bwhat no run\b": "name the bound",
    r"\b(is|are) told (of|how|what|when|where|that)\b": "is notified of, receives, is called with",
    r"\bknows? nothing of\b": "is independent of",
    r"\bpassed over\b": "skipped",
    r"\bunder way\b": "in progress, running",
    r"\bto the bit\b": "bit-identical, bit-exact",
    r"\bwithout a word\b": "silently",
    r"\bthere is no \w+ more\b": "is gone",
    r"\bgone on with\b": "resumed",
    r"\bcome what may\b": "always",
    r"\b(is|are|was|were) at fault\b": "is invalid",
    r"\b(is|are) no (run|trial|class|name|number|term|attention|object|range)\b": "is not a",
    r"\ball the same\b": "still, anyway",
    r"\bfor people\b": "readable",
    r"\bwhoever\b": "name the reader or caller",
    r"\bso many\b(?! (of|that))": "this many, up to N",
    r"\bin the course of\b": "during",
    r"\bthe like\b": "similar",
    r"\bwants? to (know|have)\b": "needs",
    r"\b(number|table|slope|decay|gate|vector) an? (head|query|key|position|channel)\b(?! (time|later))": "per",
    r"\bwhat becomes of\b": "name the result",
    r"\bwho sees whom\b": "visible pairs",
    r"\bforgets everything\b": "resets",
    r"\blies? whole\b": "is replicated",
    r"\b(are turned|turns? (queries|keys|pairs))\b": "rotates",
    r"\bcomes? out even\b": "divides evenly",
}
"""Regular expressions and the wording to use instead."""
GENERATED = ("experiments/ablations", "experiments/plans")
"""Folders whose Markdown is written from results."""


def faults(text: str, name: str) -> list[str]:
    """ "NAME:LINE: 'phrase': write ..." for each banned phrase, also where it wraps over two lines."""
    found = []
    for pattern, better in BANNED.items():
        for match in re.finditer(pattern.replace(" ", r"(?:\s+(?:# )?)"), text, re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{name}:{line}: {' '.join(match[0].split())!r}: write {better}")
    return found


def files() -> list[Path]:
    some = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    for folder in ("research", "experiments"):
        some += [path for suffix in ("py", "md") for path in sorted((ROOT / folder).rglob(f"*.{suffix}"))]
    names = {path: path.relative_to(ROOT).as_posix() for path in some}
    return [path for path, name in names.items() if not (path.suffix == ".md" and name.startswith(GENERATED))]


def test_the_tree_is_in_plain_english():
    found = [fault for path in files() for fault in faults(path.read_text("utf-8"), path.relative_to(ROOT).as_posix())]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text",
    ["tokens a second", "It goes on\n    from step 3", "computed again", "holds no whole checkpoint", "GB a\n# second"],
)
def test_a_banned_phrase_is_found(text):
    (fault,) = faults(f"first line\n{text}", "file")
    assert fault.startswith("file:2: ")


def test_plain_wording_is_not_a_fault():
    assert faults("tokens per second, resumed at step 3; a second time; units a step later", "file") == []
