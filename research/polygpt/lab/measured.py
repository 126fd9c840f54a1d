"""What a property finds out, and what rounding alone explains."""

import dataclasses

import jax
import numpy as np

EPSILON = float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class Measured:
    """An error beside its bound; or nothing, where the property does not apply.

    Attributes:
        error: what was measured; None where the property does not apply.
        bound: what it may be.
        note: what else there is to say; why the property does not apply.
    """

    error: float | None
    bound: float | None = None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the error is within the bound (NaN is not); None where the property does not apply."""
        return None if self.error is None else bool(self.error <= self.bound)


def absent(reason: str) -> Measured:
    """The property does not apply."""
    return Measured(None, None, reason)


def rounding(positions: int, width: int) -> float:
    """How far two float32 results may lie apart that differ in the order of their sums alone.

    A sum of n terms is off by n epsilon of its largest terms at worst (Higham, 2002, section 4.2). An attention layer
    has four in a row: projection, scores or state, mixing of values, output.
    """
    return 4 * (positions + width) * EPSILON


def difference(got, expected) -> float:
    """The largest difference of any entry of two pytrees, relative to the largest entry of `expected`; or NaN."""
    got, expected = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (got, expected))
    largest = np.max(np.abs(expected), initial=0.0)
    return float(np.max(np.abs(got - expected), initial=0.0) / (largest + np.finfo(np.float32).tiny))
