"""`polygpt attention check`: measures every property of a variant and compares it with its bound.

To add a property, write a function `(Subject) -> Measured` and list it in `PROPERTIES`.
"""

import contextvars
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Collection

from polygpt.attention.contract import Attention
from polygpt.errors import SpecError
from polygpt.lab.blame import told
from polygpt.lab.layout import LEAST
from polygpt.lab.measured import Measured
from polygpt.lab.properties import (
    agreement,
    compilation,
    construction,
    memory,
    meshes,
    numerics,
    slopes,
    variations,
    visibility,
)
from polygpt.lab.subject import WIDTH, Subject

BUILDS, MESH, TPU = "builds and runs", "two devices = one", "compiles for TPU"
LIMIT = 300.0
"""Time limit per property, in seconds."""
PROPERTIES: dict[str, Callable[[Subject], Measured]] = {
    BUILDS: construction.builds_and_runs,
    "causality": visibility.causality,
    "segments isolated": visibility.segments_isolated,
    "mask honoured": visibility.mask_honoured,
    "spans bidirectional": visibility.spans_bidirectional,
    "full cache = no cache": memory.full_cache,
    "ring cache = no cache": memory.ring_cache,
    "ragged decoding = each alone": memory.ragged_decoding,
    "row and cache of any size": memory.any_size,
    "chunked = reference": functools.partial(agreement.backend, "chunked"),
    "flex = reference": functools.partial(agreement.backend, "flex"),
    "library = reference": functools.partial(agreement.backend, "library"),
    "packed examples in any order": agreement.examples_in_any_order,
    "padding without effect": agreement.padding_without_effect,
    "half batch = full batch": agreement.rows_alone,
    "weights are those of the output": variations.weights_of_output,
    "grouped heads": variations.grouped_heads,
    "ALiBi as well as Rope": variations.second_position,
    "mask honoured in long rows": visibility.honoured_in_long_rows,
    "packed in any order, long rows": functools.partial(variations.in_long_rows, agreement.examples_in_any_order),
    "full cache = no cache, long rows": functools.partial(variations.in_long_rows, memory.full_cache),
    "positions told apart": variations.positions_told_apart,
    "every parameter learns": variations.parameters_learn,
    "finite gradients beside padding": numerics.finite_gradients,
    "gradient = finite differences": slopes.finite_differences,
    "bfloat16 near float32": numerics.bfloat16,
    "long rows in bfloat16": numerics.long_rows,
    "jit": agreement.jit,
    "vmap": agreement.vmap,
    "scan and remat": agreement.scan_and_remat,
    "pmap": agreement.pmap,
    MESH: meshes.two_devices,
    "JSON round trip": agreement.json_round_trip,
    TPU: compilation.tpu,
}
"""The properties by name, in the order of the table."""


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


def check(
    spec: Attention,
    width: int = WIDTH,
    length: int | None = None,
    chosen: Collection[str] = tuple(PROPERTIES),
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    limit: float = LIMIT,
) -> tuple[Subject | None, list[Finding]]:
    """Measures the chosen properties of a variant. If the first property of all fails, measures only that one.

    A property that exceeds its time limit fails and is the last: a hanging program keeps a core busy and may hold
    locks.

    Args:
        spec: the variant.
        width: the model width.
        length: positions per row; None derives it from the variant's own sizes.
        chosen: names of the properties to measure.
        progress: called at the start of each property with its name, the number done and the total number.
        limit: time limit per property, in seconds.

    Returns:
        (the subject, None if it could not be built; the findings).

    Raises:
        SpecError: if the variant cannot be built. An exception raised by a property becomes a failed finding.
    """
    if length is not None and length < LEAST:
        raise SpecError(f"a check of {length} positions: it needs at least {LEAST}")
    subject = None

    def begin() -> Measured:
        nonlocal subject
        subject = Subject(spec, width, length)
        return PROPERTIES[BUILDS](subject)

    progress(BUILDS, 0, len(chosen))
    first = _examine(BUILDS, begin, type(spec), limit)
    if isinstance(first.exception, SpecError):
        raise first.exception
    if first.passed is False:
        return subject, [first]
    found = []
    for name in chosen:
        progress(name, len(found), len(chosen))
        measure = functools.partial(PROPERTIES[name], subject)
        found.append(first if name == BUILDS else _examine(name, measure, type(spec), limit))
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


def _examine(name: str, measure: Callable[[], Measured], cls: type[Attention], limit: float) -> Finding:
    begin = time.monotonic()
    try:
        measured = _within(limit, measure)
    except Exception as error:
        return Finding(name, False, None, None, told(error, cls), time.monotonic() - begin, error)
    return Finding(name, measured.holds, measured.error, measured.bound, measured.note, time.monotonic() - begin)
