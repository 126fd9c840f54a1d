"""Masked language modelling: predicts tokens from those on both sides."""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.errors import SpecError
from polygpt.objectives.base import TokenObjective, TokenScores, own_weight
from polygpt.objectives.view import View, uniform
from polygpt.sequence import Batch


@dataclasses.dataclass(frozen=True)
class MaskTokens(View):
    """Replaces some tokens and makes them the targets; every position sees all others of its example.

    Only tokens with a loss weight are chosen, so prompts and media stay as they are. The model must have an attention
    that respects bidirectional spans.
    """

    mask_token: int
    """Id of the token that takes the place of others."""
    vocabulary: int
    """Ids below this one are drawn as random tokens."""
    rate: float = 0.15
    """Fraction of tokens, or of words, that are chosen."""
    masked: float = 0.8
    """Fraction of the chosen tokens that become `mask_token`."""
    random: float = 0.1
    """Fraction of the chosen tokens that become a random token. The rest stay as they are."""
    word_ends: tuple[int, ...] = ()
    """Ids of tokens that end a word, such as 32 (space) for bytes: whole words are then chosen. () chooses tokens."""
    keep: tuple[int, ...] = ()
    """Ids of tokens that are never chosen, such as `eos`, which is easy to predict."""

    def validate(self):
        self.require(self.mask_token >= 0, "mask_token", "at least 0")
        self.require(self.vocabulary >= 1, "vocabulary", "at least 1")
        self.require(0 < self.rate <= 1, "rate", "above 0, at most 1")
        self.require(0 <= self.masked <= 1, "masked", "in 0..1")
        self.require(0 <= self.random <= 1 - self.masked, "random", "at least 0, and with masked at most 1")

    @property
    def shown(self) -> float:
        return 1 - self.masked - self.random + self.random / self.vocabulary  # the latter are drawn at random

    def __call__(self, batch: Batch, keys_B: jax.Array) -> Batch:
        chance_BT, kind_BT, token_BT = jnp.moveaxis(uniform(keys_B, 3, batch.shape[1]), 1, 0)
        weight_BT = own_weight(batch)
        if self.keep:
            weight_BT = jnp.where(jnp.isin(batch.tokens_BT, jnp.array(self.keep)), 0.0, weight_BT)
        if self.word_ends:
            ends_BT = jnp.isin(batch.tokens_BT, jnp.array(self.word_ends)) | (weight_BT == 0)
            word_BT = jnp.cumsum(jnp.pad(ends_BT, ((0, 0), (1, 0)))[:, :-1], axis=1)  # an end belongs to its word
            chance_BT = jnp.take_along_axis(chance_BT, word_BT, axis=1)
        chosen_BT = (chance_BT < self.rate) & (weight_BT != 0)
        random_BT = jnp.minimum(jnp.floor(token_BT * self.vocabulary), self.vocabulary - 1).astype(jnp.int32)
        new_BT = jnp.where(kind_BT < self.masked, self.mask_token, random_BT)
        replaced_BT = chosen_BT & (kind_BT < self.masked + self.random)
        return batch.replace(
            tokens_BT=jnp.where(replaced_BT, new_BT, batch.tokens_BT),
            span_BT=(batch.segment_BT > 0).astype(batch.span_BT.dtype),
            target_BT=batch.tokens_BT,
            weight_BT=jnp.where(chosen_BT, weight_BT, 0.0),
        )


@dataclasses.dataclass(frozen=True)
class MaskedLM(TokenObjective):
    """Cross entropy of masked tokens in nats: BERT, Devlin et al. (1810.04805), section 3.1, task 1; with `word_ends`
    whole words, as in the authors' later models."""

    tokens: MaskTokens
    """Which tokens are masked, and how."""

    @classmethod
    def small(cls) -> "MaskedLM":
        return cls(MaskTokens(mask_token=258, vocabulary=256, rate=0.4))

    @property
    def view(self) -> MaskTokens:
        return self.tokens

    def check_with(self, model, layout) -> None:
        if model.decoder.mask == "causal":
            raise SpecError("it reads tokens on both sides: set model.decoder.mask to 'spans' or 'bidirectional'")

    def per_token(self, scores: TokenScores) -> jax.Array:
        return scores.log_z - scores.target
