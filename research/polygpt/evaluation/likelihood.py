"""How well the model predicts the text: loss, perplexity, bits per byte, token accuracy.

The device gives the loss of every token; all sums are taken in float64 on the host. So a figure over a whole task does
not depend on how its examples are grouped into batches.
"""

import dataclasses
import math
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.sequence import Batch


@partial(jax.jit, static_argnames="model")
def token_scores(model, params, batch: Batch):
    """(loss_BT in nats, float32, 0 where nothing is predicted; correct_BT, bool: the target is the likeliest token)."""
    logits_BTV = model.apply(params, batch).logits_BTV.astype(jnp.float32)
    target_BT = jnp.take_along_axis(logits_BTV, batch.target_BT[..., None], axis=-1)[..., 0]
    predicted_BT = batch.weight_BT > 0
    loss_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT
    return jnp.where(predicted_BT, loss_BT, 0), predicted_BT & (logits_BTV.argmax(axis=-1) == batch.target_BT)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Sums over the predicted tokens of each example, float64 [n].

    Attributes:
        loss: of loss weight times loss, in nats.
        weight: of loss weights.
        bytes: of loss weight times UTF-8 bytes.
        correct: the number of tokens that were the likeliest.
        tokens: the number of tokens.
    """

    loss: np.ndarray
    weight: np.ndarray
    bytes: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray

    @property
    def mean_loss(self) -> np.ndarray:
        """Each example's loss a token, in nats."""
        return self.loss / self.weight

    def __getitem__(self, index) -> "Scores":
        return Scores(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    @classmethod
    def join(cls, scores: Iterable["Scores"]) -> "Scores":
        """All examples of several."""
        scores = list(scores)
        return cls(*(np.concatenate([getattr(s, f.name) for s in scores]) for f in dataclasses.fields(cls)))


def score(model, params, batch: Batch, rows: int, token_bytes: np.ndarray) -> Scores:
    """The scores of the first `rows` rows of a batch that holds one example a row."""
    loss_BT, correct_BT = (np.asarray(x)[:rows] for x in token_scores(model, params, batch))
    weight_BT = np.asarray(batch.weight_BT, np.float64)[:rows]
    bytes_BT = np.asarray(token_bytes, np.float64)[np.asarray(batch.target_BT)[:rows]]
    return Scores(
        loss=(weight_BT * loss_BT.astype(np.float64)).sum(axis=1),
        weight=weight_BT.sum(axis=1),
        bytes=(weight_BT * bytes_BT).sum(axis=1),
        correct=correct_BT.sum(axis=1, dtype=np.float64),
        tokens=(weight_BT > 0).sum(axis=1, dtype=np.float64),
    )


def summary(scores: Scores) -> dict[str, float | int]:
    """`loss` (nats a token), `perplexity`, `bits_per_byte` (absent where no text has bytes), `token_accuracy` and `n`.

    Loss weights count in all but the token accuracy.
    """
    loss = float(scores.loss.sum() / scores.weight.sum())
    figures = {"loss": loss, "perplexity": float(np.exp(loss))}
    if scores.bytes.sum() > 0:
        figures["bits_per_byte"] = float(scores.loss.sum() / scores.bytes.sum() / math.log(2))
    figures["token_accuracy"] = float(scores.correct.sum() / scores.tokens.sum())
    return figures | {"n": len(scores.loss)}
