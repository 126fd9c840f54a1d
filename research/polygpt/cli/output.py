"""Output of the command line: JSON alone on stdout on request, tables, and muted library logs."""

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
    """Yields a function that takes a verb's result and, if `wanted`, prints it as the only output on stdout.

    Everything else written to stdout meanwhile, including by libraries and child processes, goes to stderr.
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
    """Prints this package's warnings like its other messages."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes to the current stderr, which a progress bar may have replaced."""
        print(one_line(record.getMessage()), file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Mutes the logs of libraries; their errors are exceptions, which we report, as we do our own warnings."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    with contextlib.suppress(ImportError):  # `doctor` must run even if packages are missing
        import absl.logging

        absl.logging.set_verbosity(absl.logging.ERROR)
    for name in ("jax", "orbax", "tensorflow_datasets", "grain", "etils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ours, handler = logging.getLogger("polygpt"), Warnings(logging.WARNING)
    ours.addHandler(handler)
    spread, ours.propagate = ours.propagate, False  # a library's root handler would repeat our messages
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ours.propagate = spread
        ours.removeHandler(handler)


def show_table(table: Table) -> None:
    """Prints a table on stdout with `print_table`, wrapping long code and sentences."""
    print_table(table.title, table.columns, table.rows, table.prose | table.code)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], prose: Collection[int] = ()) -> None:
    """Prints a table on stdout. The first column and the `prose` columns are left-aligned; prose may wrap."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn

    drawn = Drawn(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        # On a narrow terminal, names and prose wrap; numbers do not.
        figures = i > 0 and i not in prose
        whole = max(len(row[i]) for row in [columns, *rows]) if figures else None
        drawn.add_column(column, justify="right" if figures else "left", no_wrap=i not in prose, min_width=whole)
    for row in rows:
        drawn.add_row(*row)
    plainly = {"highlight": False, "markup": False, "emoji": False}  # print "[tpu]" and ":x:" literally
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140, **plainly)
    console.print(title, style="bold")
    console.print(drawn)


def figure(value: Any) -> str:
    """Formats a number for a table."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
