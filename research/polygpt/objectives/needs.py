"""What an objective needs besides the tokens of the rows, by which a model and rows to try it on are made."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from polygpt.sequence import Batch


@dataclasses.dataclass(frozen=True)
class Needs:
    """What an objective needs of the model and of the rows. `polygpt objective list` names it, `check` provides it.

    The models that it reads besides the trained one are named by `Objective.others`.

    Attributes:
        about: what it needs, in a few words, such as "a routed layer".
        model: fields of the model by dotted name, as text, as on the command line behind `--model.`.
        rows: adds what it reads, such as labels, to a batch of NumPy arrays [B, T]. The second argument, int [B, T],
            numbers the examples, 0 for padding: an example has the same number in whichever row it is packed.
        together: number of packed examples that belong together, such as 2 for pairs.
        whole_rows: whether the loss is a statistic of whole rows, such as the load of experts, so that it depends on
            which examples are packed into a row.
    """

    about: str = ""
    model: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rows: Callable[[Batch, np.ndarray], Batch] | None = None
    together: int = 1
    whole_rows: bool = False
