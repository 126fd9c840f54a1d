"""Cached log-probabilities of other models (`data.scores`), as objectives read them from `Batch.extra`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.errors import SpecError
from polygpt.objectives.base import Objective, require_hidden_targets
from polygpt.sequence import INSIDE_SPAN, PREFERENCE, Batch, top_ids, top_log_p

TOP = 4
"""Number of likely tokens in `with_top`."""
REMAINDER = 0.1
"""The probability of all other tokens there."""


@dataclasses.dataclass(frozen=True)
class CachedDistillation(Objective):
    """Base of distillation from cached log-probabilities of a teacher, as `polygpt data score` writes them."""

    scores: str = "teacher"
    """Their name in `data.scores`."""
    temperature: float = 1.0
    """Divides what both models give."""

    def validate(self):
        self.require(self.temperature > 0, "temperature", "positive")

    @property
    def cached(self) -> tuple[str, ...]:
        return (self.scores,)

    def check_with(self, model, layout) -> None:
        require_hidden_targets(model)


def cached_log_p(batch: Batch, scores: str) -> jax.Array:
    """Log-probabilities of targets, or of spans of bytes at their last tokens: float32 [B, T]; 0 elsewhere.

    Raises:
        SpecError: if the batch has no such scores.
    """
    log_p_BT = _array(batch, scores, scores)
    return jnp.where(log_p_BT <= 0, log_p_BT, 0)  # false for NaN and INSIDE_SPAN


def span_ends(batch: Batch, scores: str) -> tuple[jax.Array, jax.Array]:
    """Whether a span of bytes ends with the target, and whether the target is in one: bool [B, T]."""
    log_p_BT = _array(batch, scores, scores)
    return log_p_BT <= 0, ~jnp.isnan(log_p_BT)


def cached_top(batch: Batch, scores: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The likely tokens, int32 [B, T, k], their log-probabilities, float32, 0 where there are none; and bool [B, T],
    where there are some.

    Raises:
        SpecError: if the batch has no such scores.
    """
    log_p_BTk = _array(batch, top_log_p(scores), scores, " without --top" if scores in batch.extra else "")
    known_BT = ~jnp.isnan(log_p_BTk[..., 0])
    return batch.extra[top_ids(scores)], jnp.where(known_BT[..., None], log_p_BTk, 0), known_BT


def _array(batch: Batch, name: str, scores: str, how: str = "") -> jax.Array:
    if name not in batch.extra:
        there = f"were written{how}" if how else "are not in data.scores"
        raise SpecError(
            f"the scores {scores!r} {there}: write them with polygpt data score{' --top 16' if how else ''}"
        )
    return jnp.asarray(batch.extra[name])


# --- to try objectives on small rows ----------------------------------------------------------------------------------


def with_log_p(batch: Batch, number_BT: np.ndarray, scores: str, spans: bool = False) -> Batch:
    """Adds log-probabilities drawn at random for each token of each example; see `Needs.rows`.

    Args:
        batch: rows of NumPy arrays.
        number_BT: numbers of the examples.
        scores: name of the scores.
        spans: whether tokens at odd positions are inside of a span that the next one ends.
    """
    signs_BT = batch.extra.get(PREFERENCE, np.zeros_like(number_BT))
    scored_BT = ((batch.weight_BT != 0) | (signs_BT != 0)) & (number_BT > 0)
    log_p_BT = np.full(number_BT.shape, np.nan, np.float32)
    for b, t in np.argwhere(scored_BT):
        log_p_BT[b, t] = -_rng(batch, number_BT, b, t).exponential(2.0)
        goes_on = t + 1 < number_BT.shape[1] and number_BT[b, t + 1] == number_BT[b, t] and scored_BT[b, t + 1]
        if spans and batch.position_BT[b, t] % 2 and goes_on:
            log_p_BT[b, t] = INSIDE_SPAN
    return batch.replace(extra={**batch.extra, scores: log_p_BT})


def with_top(batch: Batch, number_BT: np.ndarray, scores: str) -> Batch:
    """Adds `TOP` likely tokens, drawn at random for each token of each example; see `with_log_p`."""
    ids_BTk = np.zeros((*number_BT.shape, TOP), np.int32)
    log_p_BTk = np.full(ids_BTk.shape, np.nan, np.float32)
    for b, t in np.argwhere((batch.weight_BT != 0) & (number_BT > 0)):
        rng = _rng(batch, number_BT, b, t)
        ids_BTk[b, t] = rng.choice(256, TOP, replace=False)
        log_p_BTk[b, t] = np.log((1 - REMAINDER) * np.sort(rng.dirichlet(np.ones(TOP)))[::-1])
    extra = {top_ids(scores): ids_BTk, top_log_p(scores): log_p_BTk}
    return batch.replace(extra={**batch.extra, **extra})


def _rng(batch: Batch, number_BT: np.ndarray, b: int, t: int) -> np.random.Generator:
    """A generator for a token of an example, in whichever row it is packed."""
    return np.random.default_rng([int(number_BT[b, t]), int(batch.position_BT[b, t])])
