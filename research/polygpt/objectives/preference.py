"""What preference objectives score: the log-probabilities of the two answers of each pair in packed rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.errors import SpecError
from polygpt.objectives.base import Objective, require_blind, require_hidden_targets
from polygpt.objectives.cached import cached_log_p, with_log_p
from polygpt.objectives.forward import Forward
from polygpt.objectives.needs import Needs
from polygpt.objectives.positions import log_probability, per_position
from polygpt.sequence import FIRST, PREFERENCE, Batch

SHORTEST = 4
"""No pair has fewer positions: `bos` and `eos` of both answers."""
NO_PAIRS = "a preference objective needs pairs of answers: set data.layout.pairs to true"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Log-probabilities in nats of the answers given their prompts, by row and pair, float32 [B, P].

    Attributes:
        chosen: of the preferred answers, the sum over their tokens, `eos` included.
        rejected: of the rejected answers.
        chosen_length: number of tokens of the preferred answers, 0 where there is no pair.
        rejected_length: of the rejected answers.
    """

    chosen: jax.Array
    rejected: jax.Array
    chosen_length: jax.Array
    rejected_length: jax.Array

    @property
    def valid(self) -> jax.Array:
        """bool, whether there is a pair."""
        return (self.chosen_length > 0) & (self.rejected_length > 0)

    @property
    def mean_chosen(self) -> jax.Array:
        """Per token of the preferred answers."""
        return self.chosen / jnp.maximum(self.chosen_length, 1)

    @property
    def mean_rejected(self) -> jax.Array:
        """Per token of the rejected answers."""
        return self.rejected / jnp.maximum(self.rejected_length, 1)


def score(outputs: Forward, batch: Batch) -> Pairs:
    """The scores of all pairs under a model; objectives share them."""

    def compute():
        return _pairs(batch, per_position(log_probability, (outputs,), _signs(batch) != 0, batch.target_BT))

    return outputs.once("pairs", compute)


def _signs(batch: Batch) -> jax.Array:
    if PREFERENCE not in batch.extra:
        raise SpecError(NO_PAIRS)
    return batch.extra[PREFERENCE]


def _pairs(batch: Batch, value_BT: jax.Array) -> Pairs:
    """Sums over the answers of each pair. A comparison fuses with the sum, unlike a scatter."""
    number_11P = jnp.arange(max(1, batch.shape[1] // SHORTEST))[None, None]
    signs_BT = _signs(batch)
    here_BTP = jnp.cumsum(signs_BT == FIRST, axis=1)[..., None] == 1 + number_11P

    def total(used_BT, value_BT):
        return jnp.sum(jnp.where(here_BTP & used_BT[..., None], value_BT[..., None], 0.0), axis=1)

    answers = signs_BT > 0, signs_BT < 0
    ones_BT = jnp.ones(batch.shape, jnp.float32)
    return Pairs(*(total(used_BT, value_BT) for used_BT in answers), *(total(used_BT, ones_BT) for used_BT in answers))


@dataclasses.dataclass(frozen=True)
class PreferenceObjective(Objective):
    """Base of objectives of pairs: the mean over pairs of `per_pair`. The data have pairs (`data.layout.pairs`)."""

    reference: str | None = "reference"
    """Name in `references` of the model that the policy is compared with; null for none."""
    scores: str | None = None
    """Name in `data.scores` of cached log-probabilities of the answers under that model; null to run the model."""

    @property
    def others(self) -> tuple[str, ...]:
        return () if self.reference is None or self.scores is not None else (self.reference,)

    @property
    def cached(self) -> tuple[str, ...]:
        return () if self.reference is None or self.scores is None else (self.scores,)

    @property
    def needs(self) -> Needs:
        if not self.cached:
            return Needs("pairs of answers", rows=_as_pairs, together=2)

        def scored_pairs(batch: Batch, number_BT: np.ndarray) -> Batch:
            return with_log_p(_as_pairs(batch, number_BT), number_BT, self.scores)

        return Needs(f"pairs of answers, the scores {self.scores!r}", rows=scored_pairs, together=2)

    def check_with(self, model, layout) -> None:
        require_hidden_targets(model)
        if not layout.pairs:
            raise SpecError(NO_PAIRS)

    def check_other(self, other, model) -> None:
        require_blind(other, "it scores")

    def per_pair(self, own: Pairs, reference: Pairs | None) -> jax.Array:
        """The loss of each pair, float32 [B, P], given the scores of the model and of the reference."""
        raise NotImplementedError(f"{type(self).__name__} defines no per_pair")

    def total(self, outputs, batch: Batch) -> jax.Array:
        own = score(outputs, batch)
        reference = None
        if self.cached:
            reference = _pairs(batch, cached_log_p(batch, self.scores))
        elif self.others:
            reference = score(outputs.other(self.reference), batch)
        return jnp.sum(jnp.where(own.valid, self.per_pair(own, reference), 0))

    def weight(self, batch: Batch) -> jax.Array:
        return jnp.sum(_pairs(batch, jnp.zeros(batch.shape, jnp.float32)).valid, dtype=jnp.float32)


def _as_pairs(batch: Batch, number_BT: np.ndarray) -> Batch:
    """The batch whose examples are alternately preferred and rejected answers."""
    preferred_BT = number_BT % 2 == 1
    signs_BT = np.where(batch.weight_BT > 0, np.where(preferred_BT, 1, -1), 0).astype(np.int32)
    answer_BT = np.where(signs_BT > 0, number_BT, 0)
    first = np.unique(answer_BT, return_index=True)[1]
    signs_BT.ravel()[first] *= np.where(signs_BT.ravel()[first] > 0, FIRST, 1)
    weight_BT = np.where(preferred_BT, batch.weight_BT, 0).astype(np.float32)
    return batch.replace(weight_BT=weight_BT, extra={**batch.extra, PREFERENCE: signs_BT})


def margin(own: Pairs, reference: Pairs | None) -> jax.Array:
    """How much more the model prefers the preferred answer than the reference does, in nats, float32 [B, P]."""
    found = own.chosen - own.rejected
    return found if reference is None else found - (reference.chosen - reference.rejected)
