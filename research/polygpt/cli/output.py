"""What the command line prints: JSON alone on stdout where asked for, tables, and silence from the libraries."""

import contextlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from polygpt.errors import one_line
from polygpt.files import plain
from polygpt.markup import Table


@contextlib.contextmanager
def json_alone(wanted: bool) -> Iterator[Callable[[Any], None]]:
    """Gives a function that takes a verb's result. Where JSON is wanted it is printed, and is all that stdout gets.

    Everything else that is written to stdout meanwhile, by libraries and child processes too, goes to stderr.
    """
    if not wanted:
        yield lambda result: None
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    results = []
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield results.append
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
    print(json.dumps(plain(results[0]), allow_nan=False), flush=True)


class Warnings(logging.Handler):
    """This package's warnings as every other line for a person."""

    def emit(self, record: logging.LogRecord) -> None:
        """On stderr as it is now: a progress bar takes its place while it is drawn."""
        print(one_line(record.getMessage()), file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the libraries' own log lines; their errors are exceptions and ours to tell, and so are our warnings."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    with contextlib.suppress(ImportError):  # `doctor` runs where packages are missing
        import absl.logging

        absl.logging.set_verbosity(absl.logging.ERROR)
    for name in ("jax", "orbax", "tensorflow_datasets", "grain", "etils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ours, handler = logging.getLogger("polygpt"), Warnings(logging.WARNING)
    ours.addHandler(handler)
    spread, ours.propagate = ours.propagate, False  # a library may have given the root a handler, to say it once more
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ours.propagate = spread
        ours.removeHandler(handler)


def show_table(table: Table) -> None:
    """A table on stdout: `print_table`, which breaks its code and its sentences where they are too long."""
    print_table(table.title, table.columns, table.rows, table.prose | table.code)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], prose: Collection[int] = ()) -> None:
    """A table on stdout; the first column is left-aligned, and so are those of prose, which may take several lines."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn

    drawn = Drawn(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        # Where a terminal is too narrow names and prose give way, and figures stay whole.
        figures = i > 0 and i not in prose
        whole = max(len(row[i]) for row in [columns, *rows]) if figures else None
        drawn.add_column(column, justify="right" if figures else "left", no_wrap=i not in prose, min_width=whole)
    for row in rows:
        drawn.add_row(*row)
    plainly = {"highlight": False, "markup": False, "emoji": False}  # "[tpu]" and ":x:" are text
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140, **plainly)
    console.print(title, style="bold")
    console.print(drawn)


def figure(value: Any) -> str:
    """A number as a table shows it."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
