"""Regularisation of the softmax normaliser."""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.objectives.base import TokenObjective, TokenScores


@dataclasses.dataclass(frozen=True)
class ZLoss(TokenObjective):
    """log² Z, where Z is the softmax normaliser (Chowdhery et al. 2022, PaLM, section 5, weight 1e-4)."""

    def check_with(self, model, layout) -> None:
        """Takes any model: it has no target that positions could see."""

    def per_token(self, scores: TokenScores) -> jax.Array:
        return jnp.square(scores.log_z)
