"""Labels: numbers that positions of a row have besides their token, for heads of the model to predict."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from polygpt.errors import BadRecord
from polygpt.spec import Spec, nearest


@dataclasses.dataclass(frozen=True)
class Label(Spec):
    """What labels of one name look like."""

    shape: tuple[int, ...] = ()
    """Shape of one label: [] for a number, [3] for a list of three."""
    classes: int | None = None
    """Number of classes: labels are whole numbers from 0 to classes - 1. null: any finite numbers."""
    minimum: float | None = None
    """The smallest number that a label may be, such as 0 for counts; null for none."""

    def validate(self):
        self.require(all(size >= 1 for size in self.shape), "shape", "sizes of at least 1")
        # float32 holds larger whole numbers inexactly
        self.require(self.classes is None or 2 <= self.classes <= 2**24, "classes", "null, or from 2 to 2 ** 24")

    def array(self, value: Any) -> np.ndarray:
        """A label as float32 of `shape`, with NaN for None. Raises ValueError if it is not one."""
        given = np.asarray(value)
        if given.dtype.kind not in "biufO" or given.shape != self.shape:
            raise ValueError
        with np.errstate(over="ignore"):  # becomes infinite, and is refused
            array = given.astype(np.float32)  # raises TypeError or ValueError for objects that are no numbers
        known = array[~np.isnan(array)]
        if np.isinf(known).any():
            raise ValueError
        if self.minimum is not None and (known < self.minimum).any():
            raise ValueError
        if self.classes is not None and ((known % 1 != 0) | (known < 0) | (known >= self.classes)).any():
            raise ValueError
        return array

    @property
    def whole(self) -> bool:
        """Whether a label is one whole number, which masks can read."""
        return self.shape == () and self.classes is not None

    @property
    def allowed(self) -> str:
        """What labels must be, for messages."""
        least = "" if self.minimum is None else f" of at least {self.minimum:g}"
        number = f"a finite number{least}" if self.classes is None else f"a whole number from 0 to {self.classes - 1}"
        return f"{number}, or null" if self.shape == () else f"of shape {list(self.shape)}, each {number} or null"


def label_arrays(
    declared: Mapping[str, Label], given: Iterable[tuple[slice, Mapping[str, Any]]], length: int, place: str
) -> dict[str, np.ndarray]:
    """The labels of a row: float32 [length, ...] by name, NaN where there is none.

    Args:
        declared: all labels, by name.
        given: labels by name, and the positions that have them; later ones replace earlier ones.
        length: number of positions.
        place: the record, for messages.

    Raises:
        BadRecord: for a label that is not declared, or not what it is declared to be.
    """
    arrays = {name: np.full((length, *label.shape), np.nan, np.float32) for name, label in declared.items()}
    for positions, labels in given:
        for name, value in labels.items():
            if name not in declared:
                known = nearest(name, declared) if declared else "there are none"
                remedy = f"{known}; declare it in data.layout.labels"
                raise BadRecord("undeclared label", place, f"{name!r} is not in data.layout.labels: {remedy}")
            try:
                arrays[name][positions] = declared[name].array(value)
            except (ValueError, TypeError):
                must = f"it must be {declared[name].allowed}: mend the record, or change data.layout.labels"
                raise BadRecord("malformed label", place, f"{name!r} is {value!r}: {must}") from None
    return arrays
