"""`polygpt objective check`: measures every property of an objective and compares it with its bound.

To add a property, write a function `(Subject) -> Measured` and list it in `PROPERTIES`.
"""

from collections.abc import Callable, Collection

from polygpt.lab import findings
from polygpt.lab.findings import LIMIT, Finding
from polygpt.lab.measured import Measured
from polygpt.lab.objective import construction, devices, invariance, numerics, targets, weights
from polygpt.lab.objective.subject import Subject
from polygpt.objectives.base import Objective

BUILDS, DEVICES = "builds and runs", "eight devices = one"
PROPERTIES: dict[str, Callable[[Subject], Measured]] = {
    BUILDS: construction.builds_and_runs,
    "targets unseen": targets.unseen,
    "view hides targets": targets.hidden_by_view,
    "view keeps examples apart": targets.examples_apart,
    "view of a row alone": invariance.view_of_rows,
    "views differ between steps": invariance.view_of_steps,
    "nothing without weight": weights.without_weight,
    "twice the weights, same mean": weights.doubled,
    "linear in the weights": weights.linear,
    "finite without any weight": weights.nothing,
    "rows add up": invariance.rows_add_up,
    "packed = alone": invariance.packed_equals_alone,
    "padding without effect": invariance.padding,
    "finite without media": numerics.without_media,
    "finite if certain": numerics.certain,
    "bfloat16 near float32": numerics.bfloat16,
    "gradient = finite differences": numerics.finite_differences,
    "same every time": invariance.same_every_time,
    "microbatches = one batch": invariance.microbatches,
    "in blocks = all logits": invariance.in_blocks,
    "seeds together = each alone": invariance.seeds_together,
    DEVICES: devices.eight_devices,
    "JSON round trip": invariance.json_round_trip,
}
"""The properties by name, in the order of the table."""


def check(
    objective: Objective,
    chosen: Collection[str] = tuple(PROPERTIES),
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    limit: float = LIMIT,
) -> list[Finding]:
    """Measures the chosen properties of an objective, see `findings.measure`.

    Raises:
        SpecError: if no model can be built for it, or it refuses the model.
    """
    return findings.measure(BUILDS, lambda: Subject(objective), PROPERTIES, chosen, type(objective), progress, limit)[1]
