"""What the vectors of a position have read and are scored on, by the gradient of a loss that is no sum over positions.

A loss that ignores the loss weights cannot be split by them. But its gradient with respect to the hidden vector of a
position is another one if the token that the position is scored on is another: for a cross entropy it is the predicted
probabilities minus the target. Only its line counts, because a factor may depend on all tokens, even in its sign: the
margin of a pair in DPO (2305.18290), equation 7, and in IPO (2310.12036), equation 17.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.lab.measured import EPSILON
from polygpt.lab.objective.subject import Subject
from polygpt.models.functional import Model
from polygpt.sequence import Batch

READ = 1e-5
"""The change of a vector, relative to the largest of all positions, that counts as a dependence."""
TURNED = 1e-3
"""The change of the direction of a gradient that counts as one, and the smallest gradient that counts, relative to the
largest."""


class Probed:
    """A model to whose hidden vectors something is added, in every pass; it keeps the sums."""

    def __init__(self, model: Model, probe_KBTD: jax.Array | None = None):
        self._model, self._probe_KBTD, self.passes = model, probe_KBTD, []

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def hidden(self, params: Any, batch: Batch, key: jax.Array | None = None, **options) -> tuple:
        """As `Model.hidden`."""
        hidden_BTD, *rest = self._model.hidden(params, batch, key, **options)
        if self._probe_KBTD is not None:
            hidden_BTD = hidden_BTD + self._probe_KBTD[len(self.passes)].astype(hidden_BTD.dtype)
        self.passes.append(hidden_BTD)
        return hidden_BTD, *rest


def vectors(subject: Subject, seen: Batch) -> Callable[[tuple, Batch], tuple] | None:
    """Gives the hidden vectors of all passes and the gradient of the total with respect to them, both [K, B, T, D].

    The arguments are the parameters with those of the other models, and what the objective reads; `seen` has their
    shapes. None if the objective reads no hidden vectors of these rows.
    """
    found = []

    def shapes(params, others):
        model = Probed(subject.model)
        subject.pair(params, others, seen, model=model)
        found.extend(one.shape for one in model.passes)
        return ()

    jax.eval_shape(shapes, subject.params, subject.others)
    if not found or any(shape[:2] != seen.shape or shape != found[0] for shape in found):
        return None

    def both(models, seen):
        def total(probe_KBTD):
            model = Probed(subject.model, probe_KBTD)
            return subject.pair(*models, seen, model=model)[0], jnp.stack(model.passes)

        slope_KBTD, hidden_KBTD = jax.grad(total, has_aux=True)(jnp.zeros((len(found), *found[0])))
        return hidden_KBTD, slope_KBTD

    return both


def read(hidden_KTD: np.ndarray, usual_KTD: np.ndarray) -> np.ndarray:
    """bool [K, T]: which vectors of a row differ from the usual ones."""
    change_KT = np.abs(hidden_KTD - usual_KTD).max(axis=-1)
    return ~(change_KT <= READ * (np.abs(usual_KTD).max() + EPSILON))


def scored(slope_KTD: np.ndarray, usual_KTD: np.ndarray) -> np.ndarray:
    """bool [K, T]: at which positions of a row the gradient is on another line than usual."""
    sizes = [np.linalg.norm(x, axis=-1, keepdims=True) for x in (slope_KTD, usual_KTD)]
    least = TURNED * (sizes[1].max() + EPSILON)
    units = [x / np.maximum(size, least) for x, size in zip((slope_KTD, usual_KTD), sizes, strict=True)]
    counts_KT = np.minimum(*sizes)[..., 0] > least
    turned_KT = np.minimum(*(np.linalg.norm(units[0] + sign * units[1], axis=-1) for sign in (1, -1)))
    return counts_KT & ~(turned_KT <= TURNED)


def rewarded(slope_KTD: np.ndarray, usual_KTD: np.ndarray, towards_D: np.ndarray) -> np.ndarray:
    """bool [K, T]: at which positions the loss falls when a vector is moved `towards` a token, because of that token.

    Args:
        slope_KTD: the gradient if another token is in its place.
        usual_KTD: the gradient.
        towards_D: the token's row of the output head minus that of the other.
    """
    return (usual_KTD - slope_KTD) @ towards_D < 0
