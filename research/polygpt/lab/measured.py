"""The result of measuring a property, and bounds on rounding errors."""

import dataclasses

import jax
import numpy as np

EPSILON = float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class Measured:
    """An error and its bound; or nothing, if the property does not apply.

    Attributes:
        error: the measured error; None if the property does not apply.
        bound: the largest error allowed.
        note: additional information, such as why the property does not apply.
    """

    error: float | None
    bound: float | None = None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the error is within the bound (NaN is not); None if the property does not apply."""
        return None if self.error is None else bool(self.error <= self.bound)


def absent(reason: str) -> Measured:
    """The result of a property that does not apply."""
    return Measured(None, None, reason)


def rounding(positions: int, width: int) -> float:
    """A bound on the difference of two float32 results that differ only in the order of summation.

    The error of a sum of n terms is at most n epsilon relative to its largest terms (Higham, 2002, section 4.2). An
    attention layer has four sums in sequence: projection, scores or state, mixing of values, output.
    """
    return 4 * (positions + width) * EPSILON


def difference(got, expected) -> float:
    """The largest difference of any entry of two pytrees, relative to the largest entry of `expected`; or NaN."""
    got, expected = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (got, expected))
    largest = np.max(np.abs(expected), initial=0.0)
    return float(np.max(np.abs(got - expected), initial=0.0) / (largest + np.finfo(np.float32).tiny))
