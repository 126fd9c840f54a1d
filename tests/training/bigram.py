"""A model of the two tokens before, small enough that a step compiles at once, batches and an objective for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.objectives.base import BatchObjective
from polygpt.sequence import Batch

VOCABULARY, WIDTH = 13, 8


@dataclasses.dataclass(frozen=True)
class Bigram:
    """Predicts from the token and its predecessor; `dropout` is applied to the hidden layer when a key is given."""

    dropout: float = 0.0

    def init(self, key):
        keys = jax.random.split(key, 3)
        return {
            "embedding": jax.random.normal(keys[0], (VOCABULARY, WIDTH)),
            "hidden": {"kernel": jax.random.normal(keys[1], (WIDTH, WIDTH)), "bias": jnp.zeros(WIDTH)},
            "head": {"kernel": jax.random.normal(keys[2], (WIDTH, VOCABULARY))},
        }

    def hidden(self, params, batch, key=None):
        x_BTD = params["embedding"][batch.tokens_BT]
        x_BTD = x_BTD + 0.5 * jnp.pad(x_BTD, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        bias = params["hidden"]["bias"].reshape(1, 1, -1)
        x_BTD = jnp.tanh(jnp.einsum("btd,de->bte", x_BTD, params["hidden"]["kernel"]) + bias)
        if key is not None and self.dropout:
            x_BTD = jnp.where(jax.random.bernoulli(key, 1 - self.dropout, x_BTD.shape), x_BTD / (1 - self.dropout), 0)
        return x_BTD, {}

    def logits(self, params, hidden_BTD):
        return jnp.einsum("btd,dv->btv", hidden_BTD, params["head"]["kernel"])


@dataclasses.dataclass(frozen=True)
class Apart(BatchObjective):
    """Pushes the mean vectors of rows apart: the sum over rows of the log of the summed similarities."""

    def embed(self, outputs, batch):
        return {"mean": jnp.mean(outputs.hidden_BTD, axis=1), "scale_B": jnp.full(batch.shape[0], 2.0)}

    def compare(self, embedded):
        x_BD = embedded["mean"]
        return jnp.sum(jax.nn.logsumexp(jnp.mean(embedded["scale_B"]) * x_BD @ x_BD.T, axis=1))

    def weight(self, batch):
        return jnp.float32(batch.shape[0])


def random_batch(rows=8, length=6, seed=0, weight=None) -> Batch:
    """Text rows whose loss weights differ from row to row, so that means of means would be wrong."""
    rng = np.random.default_rng(seed)
    tokens_BT = rng.integers(0, VOCABULARY, (rows, length), np.int32)
    zeros_BT = np.zeros((rows, length), np.int32)
    position_BT = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    if weight is None:
        weight = (np.arange(length) < rng.integers(0, length + 1, (rows, 1))).astype(np.float32)
    return Batch(
        tokens_BT=tokens_BT,
        modality_BT=np.zeros((rows, length), np.int8),
        slot_BT=zeros_BT,
        position_BT=position_BT,
        segment_BT=np.ones((rows, length), np.int32),
        span_BT=zeros_BT,
        target_BT=np.roll(tokens_BT, -1, 1),
        weight_BT=np.broadcast_to(np.float32(weight), (rows, length)),
        media={},
        coordinate_BT3=np.stack([position_BT] * 3, axis=-1),
    )
