"""Likelihood of the text: loss, perplexity, bits per byte, token accuracy.

The device computes the loss of every token; sums are in float64 on the host. So metrics of a task do not depend on how
its examples are batched.
"""

import dataclasses
import math
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.evaluation.metric import Measure
from polygpt.models.multimodal import ModelSpec
from polygpt.sequence import Batch

MEASURES = (
    Measure("loss", "lower", unit="nats per token", needs="likelihood"),
    Measure("perplexity", "lower", brief=False, needs="likelihood"),
    Measure("bits_per_byte", "lower", needs="likelihood"),
    Measure("token_accuracy", "higher", share=True, needs="likelihood"),
)
"""Measures of every task, without generated answers."""
UNSCORED = "next tokens are not scored: model.decoder.mask 'bidirectional' shows them to the model"
"""Why there are none of these."""
COUNTS = {"n": "examples", "skipped": "skipped", "cut": "answers cut"}
"""Further entries in the results of a task, with headings: examples used and skipped, and answers that ended because
there was no room for more. The last two are absent if 0."""


@partial(jax.jit, static_argnames="model")
def token_scores(model, params, batch: Batch):
    """(loss_BT in nats, float32, 0 without a target; correct_BT, bool: the target is the most likely token)."""
    scores, best_BT = model.token_scores(params, batch)
    predicted_BT = batch.weight_BT > 0
    correct_BT = predicted_BT & (best_BT == batch.target_BT)
    loss_BT = scores.log_z - scores.target
    return model.replicated((jnp.where(predicted_BT, loss_BT, 0), correct_BT))


@dataclasses.dataclass(frozen=True)
class Likelihoods:
    """Sums over the predicted tokens of each example, float64 [n].

    Attributes:
        loss: of loss weight times loss, in nats.
        weight: of loss weights.
        bytes: of loss weight times UTF-8 bytes.
        correct: number of tokens that were the most likely.
        tokens: number of tokens.
    """

    loss: np.ndarray
    weight: np.ndarray
    bytes: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray

    @property
    def mean_loss(self) -> np.ndarray:
        """Loss per token of each example, in nats."""
        return self.loss / self.weight

    def __getitem__(self, index) -> "Likelihoods":
        return Likelihoods(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    @classmethod
    def join(cls, scores: Iterable["Likelihoods"]) -> "Likelihoods":
        """Concatenates several."""
        scores = list(scores)
        return cls(*(np.concatenate([getattr(s, f.name) for s in scores]) for f in dataclasses.fields(cls)))


def score(model, params, batch: Batch, token_bytes: np.ndarray, last: int | None = None) -> Likelihoods:
    """Scores of the examples in a batch, ordered by row, then by segment.

    With `last`, only that many final targets of each example count. A bidirectional decoder sees its targets, so none
    counts.
    """
    weight_BT, segment_BT = np.asarray(batch.weight_BT, np.float64), np.asarray(batch.segment_BT)
    if predicts_text(model.spec):
        loss_BT, correct_BT = map(np.asarray, token_scores(model, params, batch))
    else:
        weight_BT, loss_BT, correct_BT = np.zeros((3, *segment_BT.shape), np.float32)
    bytes_BT = np.asarray(token_bytes, np.float64)[np.asarray(batch.target_BT)]
    size = segment_BT.max() + 1
    key_BT = np.arange(len(segment_BT))[:, None] * size + segment_BT
    examples = np.unique(key_BT[segment_BT > 0])
    if last is not None:
        for example in examples:
            rows, positions = np.nonzero((key_BT == example) & (weight_BT > 0))
            weight_BT[rows[:-last], positions[:-last]] = 0
        correct_BT = correct_BT & (weight_BT > 0)

    def total(value_BT):
        return np.bincount(key_BT.ravel(), value_BT.ravel(), minlength=size * len(segment_BT))[examples]

    return Likelihoods(
        loss=total(weight_BT * loss_BT.astype(np.float64)),
        weight=total(weight_BT),
        bytes=total(weight_BT * bytes_BT),
        correct=total(correct_BT.astype(np.float64)),
        tokens=total((weight_BT > 0).astype(np.float64)),
    )


def predicts_text(spec: ModelSpec) -> bool:
    """Whether positions of a model do not see the next token, so that it can be scored."""
    return spec.decoder.mask != "bidirectional"


def summary(scores: Likelihoods) -> dict[str, float | int]:
    """The values of MEASURES, and `n`; without `bits_per_byte` if no text has bytes, only `n` if no text is predicted.

    All except the token accuracy use loss weights.
    """
    if not scores.weight.any():
        return {"n": len(scores.loss)}
    loss = float(scores.loss.sum() / scores.weight.sum())
    with np.errstate(over="ignore"):  # infinite above 709 nats
        figures = {"loss": loss, "perplexity": float(np.exp(loss))}
    if scores.bytes.sum() > 0:
        figures["bits_per_byte"] = float(scores.loss.sum() / scores.bytes.sum() / math.log(2))
    figures["token_accuracy"] = float(scores.correct.sum() / scores.tokens.sum())
    return figures | {"n": len(scores.loss)}
