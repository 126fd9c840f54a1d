"""The objective contract: a sum and a weight, so that the mean over the global batch is exact however it is split."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from polygpt.errors import SpecError
from polygpt.objectives.needs import Needs
from polygpt.objectives.view import View
from polygpt.sequence import Batch
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Objective(Spec):
    """Base of all objectives. A new one is a file with a subclass that defines `total`.

    The loss is `total / weight`, each first summed over all microbatches and devices. The weight must depend only on
    the batch, never on the model's outputs, because it is needed before the first gradient is computed.
    """

    @property
    def view(self) -> View | None:
        """How the batch that this objective reads is derived from that of the data; None reads the data's own.

        Objectives with equal views share a forward pass.
        """
        return None

    @property
    def others(self) -> tuple[str, ...]:
        """Names of the models that are not trained and whose passes it reads, see `Forward.other`."""
        return ()

    @property
    def cached(self) -> tuple[str, ...]:
        """Names in `data.scores` of the cached log-probabilities that it reads instead of running a model."""
        return ()

    @property
    def captures(self) -> Mapping[str, Sequence[str]]:
        """Sites inside models that it reads with `Forward.captured`, by the name of the model: one of `others`, or ""
        for the trained one."""
        return {}

    def check_with(self, model, layout) -> None:
        """Called before an experiment is built, with its `ModelSpec` and `LayoutSpec`.

        Raises:
            SpecError: if the objective reads something that they lack.
        """

    def check_other(self, other, model) -> None:
        """Called before a run begins with the `ModelSpec` of each of `others` that is another model, and its own.

        Raises:
            SpecError: if the objective cannot learn from that model.
        """

    @property
    def needs(self) -> Needs:
        """What it needs of the model and of the rows besides tokens, targets and loss weights."""
        return Needs()

    def scored(self, model) -> str:
        """What it scores, in a few words for messages, given the `ModelSpec`."""
        return self.needs.about or "other data"

    @classmethod
    def small(cls) -> "Objective":
        """An instance to try on a small model, whose ids go from 0 to 511 and whose text is bytes.

        A class whose fields do not all have defaults defines it.
        """
        return cls()

    def total(self, outputs, batch: Batch) -> jax.Array:
        """The weighted sum of the loss over the positions of `batch`: float32 scalar.

        `outputs` is the `Forward` of the model over `batch`, which is the view if there is one.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no total")

    def weight(self, batch: Batch) -> jax.Array:
        """The denominator of the loss: float32 scalar, by default the sum of the loss weights."""
        return jnp.sum(batch.weight_BT, dtype=jnp.float32)

    def __call__(self, outputs, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum, weight), float32 scalars."""
        return self.total(outputs, batch), self.weight(batch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """What a prediction says about its target, for any number of positions.

    Attributes:
        log_z: float32, logarithm of the sum of the exponentials of the logits.
        target: float32, the logit of the target.
        mean: float32, the mean of the logits, or None if no objective uses it.
    """

    log_z: jax.Array
    target: jax.Array
    mean: jax.Array | None


def scores_and_best(logits_BTV: jax.Array, target_BT: jax.Array) -> tuple[TokenScores, jax.Array]:
    """The scores of the targets, without means, and the most likely tokens, int32 [B, T]; for evaluation."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    target = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    return TokenScores(jax.nn.logsumexp(logits_BTV, axis=-1), target, None), logits_BTV.argmax(axis=-1)


@dataclasses.dataclass(frozen=True)
class TokenObjective(Objective):
    """An objective that depends on the logits of a position only through its `TokenScores`.

    Such an objective never needs the logits of a whole batch: see `blocked.py`.
    """

    @property
    def uses_mean(self) -> bool:
        """Whether `per_token` reads the mean of the logits, which takes another pass over them."""
        return False

    def per_token(self, scores: TokenScores) -> jax.Array:
        """The loss of each position, before its weight: float32, of the shape of `scores.log_z`."""
        raise NotImplementedError(f"{type(self).__name__} defines no per_token")

    def check_with(self, model, layout) -> None:
        if self.view is None:
            require_hidden_targets(model)

    def total(self, outputs, batch: Batch) -> jax.Array:
        logits_BTV = weighted_logits(outputs, batch)
        # A one-hot comparison fuses with the sum; the gradient of a gather would be a scatter.
        at_target_BTV = jax.nn.one_hot(batch.target_BT, logits_BTV.shape[-1], dtype=bool)
        target_BT = jnp.sum(jnp.where(at_target_BTV, logits_BTV, 0.0), axis=-1)
        mean_BT = jnp.mean(logits_BTV, axis=-1) if self.uses_mean else None
        scores = TokenScores(jax.nn.logsumexp(logits_BTV, axis=-1), target_BT, mean_BT)
        return jnp.sum(batch.weight_BT * self.per_token(scores))


@dataclasses.dataclass(frozen=True)
class BatchObjective(Objective):
    """An objective that compares rows of the whole global batch, such as a contrastive loss.

    It sees all rows, however they are split over devices and microbatches. With microbatches, each is embedded twice:
    once to compare all rows, and once for the gradient (GradCache: Gao et al., 2101.06983, section 3).
    """

    def left_out(self, batch: Batch) -> jax.Array:
        """Number of examples of `batch` that a limit of the objective keeps from being compared, float32 scalar."""
        return jnp.zeros(())

    def embed(self, outputs, batch: Batch):
        """What is compared: a tree of float32 arrays [B, ...]."""
        raise NotImplementedError(f"{type(self).__name__} defines no embed")

    def compare(self, embedded) -> jax.Array:
        """The sum of the loss over all rows, given `embed` of the whole batch: float32 scalar."""
        raise NotImplementedError(f"{type(self).__name__} defines no compare")

    def total(self, outputs, batch: Batch) -> jax.Array:
        return self.compare(self.embed(outputs, batch))


def require_hidden_targets(model) -> None:
    """Raises SpecError if positions of the model (`ModelSpec`) see the next token, which an objective predicts."""
    if model.decoder.mask == "bidirectional":
        raise SpecError(
            "it predicts the next token, which model.decoder.mask 'bidirectional' shows: set that to 'causal' or "
            "'spans', or use MaskedLM"
        )


def require_blind(other, what: str) -> None:
    """Raises SpecError if a model that is not trained (`ModelSpec`) sees the next token. `what` names its purpose."""
    if other.decoder.mask == "bidirectional":
        raise SpecError(
            f"its model.decoder.mask is 'bidirectional', which shows it the tokens that {what}: name a model with "
            "'causal' or 'spans'"
        )


def depends_on_scores_only(objective: Objective) -> bool:
    """Whether `per_token` defines the objective: it is a `TokenObjective` that keeps the definition of `total`."""
    return isinstance(objective, TokenObjective) and type(objective).total is TokenObjective.total


def own_weight(batch: Batch) -> jax.Array:
    """The loss weight of each token itself, [B, T]: `weight_BT` is that of the next one."""
    return jnp.pad(jnp.asarray(batch.weight_BT), ((0, 0), (1, 0)))[:, :-1]


def weighted_logits(outputs, batch: Batch) -> jax.Array:
    """float32 [B, T, V]: the logits, set to 0 where the loss weight is 0.

    This keeps positions without weight, even NaN ones, out of the sum and of all gradients.
    """
    return jnp.where((batch.weight_BT != 0)[..., None], outputs.logits_BTV.astype(jnp.float32), 0.0)
