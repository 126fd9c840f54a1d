"""A model whose hidden vectors are parameters, to test objectives of one or several passes against formulas."""

import dataclasses

import jax
import numpy as np

from polygpt.objectives.forward import Forward


@dataclasses.dataclass(frozen=True)
class Given:
    """With a key, the hidden vectors are noisy."""

    def hidden(self, params, batch, key=None):
        noise = 0 if key is None else jax.random.normal(key, params["hidden"].shape)
        return params["hidden"] + noise, {}

    def logits(self, params, hidden_BTD):
        return hidden_BTD @ params["head"]


def given(B: int, T: int, V: int, D: int = 6, seed: int = 0) -> dict:
    """Random parameters."""
    rng = np.random.default_rng(seed)
    return {"hidden": np.float32(rng.normal(size=(B, T, D))), "head": np.float32(rng.normal(size=(D, V)))}


def total(objective, params, batch, others=None, block=None, key=None) -> jax.Array:
    """The objective's total, given parameters of the other models by name."""
    models = {name: (Given(), own) for name, own in (others or {}).items()}
    return objective.total(Forward(Given(), params, batch, key, models, block), batch)


def value_and_gradient(objective, params, batch, others=None, block=None, key=None):
    """The total, and its gradient with respect to `params`."""
    return jax.jit(jax.value_and_grad(lambda params: total(objective, params, batch, others, block, key)))(params)


def log_softmax(params) -> np.ndarray:
    """float64 log-probabilities [B, T, V]."""
    logits_BTV = np.float64(params["hidden"]) @ np.float64(params["head"])
    return logits_BTV - np.log(np.exp(logits_BTV).sum(axis=-1, keepdims=True))


def close(ours, theirs, off: float):
    """Relative distances of all arrays of two trees are below `off`."""
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        one, other = np.float64(one), np.float64(other)
        assert np.linalg.norm(one - other) <= off * np.linalg.norm(other), (one, other)
