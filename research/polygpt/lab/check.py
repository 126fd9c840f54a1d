"""`polygpt attention check`: measures every property of a variant and compares it with its bound.

To add a property, write a function `(Subject) -> Measured` and list it in `PROPERTIES`.
"""

import functools
from collections.abc import Callable, Collection

from polygpt.attention.contract import Attention
from polygpt.errors import SpecError
from polygpt.lab import findings
from polygpt.lab.findings import LIMIT, Finding
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
    return findings.measure(
        BUILDS, lambda: Subject(spec, width, length), PROPERTIES, chosen, type(spec), progress, limit
    )
