"""Runs properties one after the other, each within a time limit, and keeps what was found."""

import contextvars
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from polygpt.errors import SpecError
from polygpt.lab.blame import told
from polygpt.lab.measured import Measured

S = TypeVar("S")

LIMIT = 300.0
"""Time limit per property, in seconds."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one property.

    Attributes:
        name: the name of the property.
        passed: whether it holds; None if it does not apply.
        error, bound: the measured error and its bound; None if nothing was measured.
        note: why it does not apply, where it fails, or the error that it raised.
        seconds: duration.
        exception: the exception that it raised, if any.
    """

    name: str
    passed: bool | None
    error: float | None
    bound: float | None
    note: str
    seconds: float
    exception: Exception | None = None

    @property
    def result(self) -> str:
        """The result as shown in the table."""
        return {True: "pass", False: "FAIL", None: "n/a"}[self.passed]

    def to_json(self) -> dict:
        """The finding as JSON data."""
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "exception"
        }


def measure(
    first: str,
    build: Callable[[], S],
    properties: Mapping[str, Callable[[S], Measured]],
    chosen: Collection[str],
    cls: type,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    limit: float = LIMIT,
) -> tuple[S | None, list[Finding]]:
    """Builds a subject and measures its properties. If the first property of all fails, measures only that one.

    A property that exceeds its time limit fails and is the last: a hanging program keeps a core busy and may hold
    locks.

    Args:
        first: the name of the first property, which is always measured.
        build: builds the subject; counts as part of the first property.
        properties: all properties by name.
        chosen: names of the properties to measure.
        cls: the user's class, for messages.
        progress: called at the start of each property with its name, the number done and the total number.
        limit: time limit per property, in seconds.

    Returns:
        (the subject, None if it could not be built; the findings).

    Raises:
        SpecError: if the subject cannot be built. An exception raised by a property becomes a failed finding.
    """
    subject = None

    def begin() -> Measured:
        nonlocal subject
        subject = build()
        return properties[first](subject)

    progress(first, 0, len(chosen))
    basis = _examine(first, begin, cls, limit)
    if isinstance(basis.exception, SpecError):
        raise basis.exception
    if basis.passed is False:
        return subject, [basis]
    found = []
    for name in chosen:
        progress(name, len(found), len(chosen))
        found.append(
            basis if name == first else _examine(name, functools.partial(properties[name], subject), cls, limit)
        )
        if isinstance(found[-1].exception, Hangs):
            break
    return subject, found


class Hangs(Exception):
    """A property exceeded its time limit."""


def _within(limit: float, measure: Callable[[], Measured]) -> Measured:
    """Runs `measure`; raises `Hangs` if it takes longer than `limit` seconds.

    It runs in a thread, because a compiled program that does not end cannot be interrupted.
    """
    outcome: list[tuple[Measured | None, Exception | None]] = []

    def work():
        try:
            outcome.append((measure(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), name="property", daemon=True)
    thread.start()
    thread.join(limit)
    if not outcome:
        raise Hangs(f"not done after {limit:g} s: it hangs or is very slow; later properties were not measured")
    measured, error = outcome[0]
    if error is not None:
        raise error
    return measured


def _examine(name: str, measure: Callable[[], Measured], cls: type, limit: float) -> Finding:
    begin = time.monotonic()
    try:
        measured = _within(limit, measure)
    except Exception as error:
        return Finding(name, False, None, None, told(error, cls), time.monotonic() - begin, error)
    return Finding(name, measured.holds, measured.error, measured.bound, measured.note, time.monotonic() - begin)
