"""Numbers as text, and tables as Markdown and LaTeX."""

import math

import pytest

from polygpt import markup
from polygpt.markup import Table, latex, markdown

LINE = (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (1.234567, (1.233333, 1.235801), "1.2346 ± 0.0012"),
        (1.234567, (1.2, 1.269134), "1.235 ± 0.035"),
        (-0.04, (-0.0996 - 0.04, 0.0996 - 0.04), "-0.04 ± 0.10"),
        (12345.6, (12345.6 - 789, 12345.6 + 789), "12,350 ± 790"),
        (-0.0001, (-0.5001, 0.4999), "0.00 ± 0.50"),
        (0.5, (0.5, 0.5), "0.500000 ± 0"),
        (1.23456, LINE, "1.235"),
        (None, LINE, "–"),
    ],
)
def test_a_value_has_the_digits_that_its_interval_bears_out(value, interval, text):
    assert markup.with_interval(value, interval) == text


@pytest.mark.parametrize(
    ("interval", "text"),
    [((1.23334, 1.23582), "1.2333 to 1.2358"), ((-1.0, 3.0), "-1.0 to 3.0"), ((2.0, 2.0), "2.00000"), (LINE, "–")],
)
def test_an_interval_has_two_digits_of_its_half_width(interval, text):
    assert markup.span(interval) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5678, "1,235"), (0.012344, "0.01234"), (0.0, "0"), (3.2e-7, "3.2e-07"), (math.inf, "∞"), (math.nan, "–")],
)
def test_a_value_alone(value, text):
    assert markup.alone(value) == text


def test_counts_times_and_probabilities():
    assert [markup.short(x) for x in (950, 1.234e6, 4.56e13)] == ["950", "1.23 M", "45.6 T"]
    assert [markup.duration(x) for x in (1.5, 45, 720, 12000)] == ["1.5 s", "45 s", "12 min", "3.3 h"]
    assert [markup.probability(p) for p in (0.0004, 0.0421, 0.5, None)] == ["< 0.001", "0.042", "0.50", "–"]
    assert [markup.as_written(x) for x in (1.99, 2.0, 27.5, None)] == ["1.99", "2", "27.5", "–"]


TABLE = Table(
    "of_all", ["a_b", "x | y", "code"], [["50 % & #1", "-0.5 ± 0.1", "a < b"], ["~^{}\\", "3-4", "a_b | c"]],
    bold=frozenset({(0, 1)}), code=frozenset({2}), prose=frozenset({1}), notes=["100 %."],
)  # fmt: skip


def test_latex_is_escaped_and_best_is_bold():
    lines = latex(TABLE).splitlines()
    assert lines[:4] == ["% of_all", "% 100 %.", r"\begin{tabular}{llr}", r"\toprule"]
    assert lines[4] == r"a\_b & x \textbar{} y & code \\"
    assert lines[6] == r"50 \% \& \#1 & \textbf{$-$0.5 $\pm$ 0.1} & \texttt{a $<$ b} \\"
    assert lines[7] == r"\textasciitilde{}\textasciicircum{}\{\}\textbackslash{} & 3-4 & \texttt{a\_b \textbar{} c} \\"
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]


def test_markdown_is_escaped_and_best_is_bold():
    lines = markdown(TABLE).splitlines()
    assert lines[:2] == [r"| a\_b | x \| y | code |", "| --- | --- | ---: |"]
    assert lines[2] == "| 50 % & #1 | **-0.5 ± 0.1** | `a < b` |"
    assert lines[3] == r"| ~^{}\\ | 3-4 | `a_b \| c` |"


def test_text_of_two_lines_stays_in_its_cell():
    assert markup.escaped_markdown("a\n b <br> *c*") == r"a b \<br> \*c\*"


def test_what_was_escaped_is_read_back():
    for text in ("a_b | <c> *d*", "back\\slash_", "5 % & #1"):
        assert markup.plain_text(markup.escaped_markdown(text)) == text
