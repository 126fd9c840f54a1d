"""Tables as Markdown and LaTeX, and numbers as text with as many digits as their interval supports."""

import dataclasses
import math
import re
from collections.abc import Sequence

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "≥": r"$\geq$",
        "–": "--",
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
)
_NEGATIVE = re.compile(r"(?<![\w.)])-(?=[\d.])")
"""The sign of a negative number, which LaTeX would set as a hyphen."""
_MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\|*_<"})
_MOST = 10
"""Maximum number of decimals."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: what it shows.
        columns: column headings.
        rows: one cell per column.
        bold: highlighted cells, (row, column).
        code: columns whose cells are code.
        prose: columns whose cells are sentences; like the first column they are left-aligned.
        notes: sentences below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]] = frozenset()
    code: frozenset[int] = frozenset()
    prose: frozenset[int] = frozenset()
    notes: Sequence[str] = ()


def markdown(table: Table) -> str:
    """The table alone, without title and notes."""

    def cell(i: int, j: int, text: str) -> str:
        if j in table.code:
            return f"`{text.replace('|', chr(92) + '|')}`" if text else ""
        text = escaped_markdown(text)
        return f"**{text}**" if (i, j) in table.bold else text

    lines = [
        [escaped_markdown(column) for column in table.columns],
        ["---" if side == "l" else "---:" for side in _sides(table)],
        *([cell(i, j, text) for j, text in enumerate(row)] for i, row in enumerate(table.rows)),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(table: Table) -> str:
    """The table as a `tabular` of the package booktabs, its title and notes as comments above."""

    def cell(i: int, j: int, text: str) -> str:
        text = escaped_latex(text)
        if j in table.code:
            return rf"\texttt{{{text}}}"
        return rf"\textbf{{{text}}}" if (i, j) in table.bold else text

    lines = [f"% {line}" for line in (table.title, *table.notes)]
    lines += [rf"\begin{{tabular}}{{{_sides(table)}}}", r"\toprule"]
    lines += [" & ".join(map(escaped_latex, table.columns)) + r" \\", r"\midrule"]
    lines += [" & ".join(cell(i, j, text) for j, text in enumerate(row)) + r" \\" for i, row in enumerate(table.rows)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def escaped_latex(text: str) -> str:
    """Text escaped for LaTeX."""
    return _NEGATIVE.sub("$-$", text.translate(_LATEX))


def escaped_markdown(text: str) -> str:
    """Text escaped for Markdown, on one line."""
    return " ".join(text.split()).translate(_MARKDOWN)


def plain_text(text: str) -> str:
    """Inverse of `escaped_markdown`."""
    return re.sub(r"\\([\\|*_<])", r"\1", text)


def with_interval(value: float | None, interval: tuple[float, float]) -> str:
    """A value and its symmetric interval: "1.2346 ± 0.0012", to two significant digits of the half width.

    The value alone where the interval is the whole line; "–" where there is no value.
    """
    if value is None:
        return "–"
    half = (interval[1] - interval[0]) / 2
    if not math.isfinite(half):
        return alone(value)
    if half == 0:
        return f"{alone(value, 6)} ± 0"
    decimals = _decimals(half)
    return f"{_fixed(value, decimals)} ± {_fixed(half, decimals)}"


def span(interval: tuple[float, float]) -> str:
    """An interval: "1.2334 to 1.2358", to two significant digits of its half width; "–" for the whole line."""
    half = (interval[1] - interval[0]) / 2
    if not math.isfinite(half):
        return "–"
    if half == 0:
        return alone(interval[0], 6)
    return " to ".join(_fixed(end, _decimals(half)) for end in interval)


def alone(value: float | None, digits: int = 4) -> str:
    """A value with this many significant digits, without an exponent from 0.0001 up."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0 or abs(value) < 1e-4:
        return f"{value:.{digits}g}"
    return _fixed(value, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def value_text(value: int | float | str | None) -> str:
    """The value of a factor as text."""
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def as_written(value: float | None) -> str:
    """A value from a paper, with its original digits."""
    return "–" if value is None else f"{value:,.10g}"


def probability(p: float | None) -> str:
    """A p-value or a share: "0.012", "< 0.001"."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def short(value: float) -> str:
    """A large count: "1.23 M", "45.6 G"."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A time: "45 s", "12 min", "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _sides(table: Table) -> str:
    """Alignment of each column: l or r."""
    return "".join("l" if j == 0 or j in table.prose else "r" for j in range(len(table.columns)))


def _decimals(half: float) -> int:
    return min(_MOST, 1 - int(f"{half:.1e}".partition("e")[2]))


def _fixed(value: float, decimals: int) -> str:
    text = f"{round(value, decimals):,.{max(0, decimals)}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.,") else text  # no minus zero
