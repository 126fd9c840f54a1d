"""Choose the next token from logits: pure functions of `logits_BV`, in the order in which they are applied.

Repetition penalty, temperature, top-k, top-p and min-p, in the order of transformers and vLLM. A filter also keeps each
token that ties with the last one it keeps, so that the result never depends on how tokens are numbered.
"""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Sampling(Spec):
    """How to generate text. The defaults sample from the model's own distribution; temperature 0 is greedy."""

    temperature: float = 1.0
    """Divides the logits; values below 1 sharpen the distribution, 0 always takes the likeliest token (greedy)."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probability sums to at least this (nucleus sampling); 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as probable as the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens of the prompt and of the text so far less likely; 1 has no effect."""
    max_tokens: int | None = None
    """Stop after this many tokens; null to stop only where the row is full."""
    stop: tuple[str, ...] = ()
    """Stop as soon as one of these strings appears; it is not part of the text."""
    seed: int = 0
    """The same seed gives the same text for the same prompt at the same index in the list."""

    def validate(self) -> None:
        self.require(self.temperature >= 0, "temperature", "at least 0")
        self.require(self.top_k >= 0, "top_k", "at least 0 (0 keeps all tokens)")
        self.require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        self.require(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        self.require(self.repetition_penalty > 0, "repetition_penalty", "above 0")
        self.require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "null or at least 1")
        self.require(all(self.stop), "stop", "non-empty strings")
        self.require(0 <= self.seed < 2**32, "seed", "between 0 and 2**32 - 1")

    def choice(self) -> "Sampling":
        """Only the fields that determine how a token is chosen, which compiled programs depend on."""
        return self.replace(max_tokens=None, stop=(), seed=0)


GREEDY = Sampling(temperature=0.0)
"""The likeliest token at every step."""


def penalize_repetition(logits_BV, seen_BV, penalty: float):
    """Makes seen tokens less likely: divides a positive logit by `penalty`, multiplies a negative one.

    Keskar et al. 2019 (CTRL), section 4.1, always divide, which makes a token with a negative logit likelier. Later
    implementations take the sign into account.

    Args:
        logits_BV: the logits.
        seen_BV: bool, the tokens that already occur in the row.
        penalty: theta in the paper; 1 has no effect.
    """
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def keep_top_k(logits_BV, k: int):
    """-inf for all but the `k` likeliest tokens and those that tie with the k-th (Fan et al. 2018)."""
    k = min(k, logits_BV.shape[-1])
    return _keep_from(logits_BV, jax.lax.top_k(logits_BV, k)[0][:, -1:])


def keep_top_p(logits_BV, p: float):
    """-inf for all but the nucleus: the fewest likeliest tokens whose probabilities sum to at least `p`, and ties.

    Holtzman et al. 2020, section 3.1.
    """
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    mass_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1)
    before_BV = jnp.pad(mass_BV[:, :-1], ((0, 0), (1, 0)))  # the mass of the likelier tokens: the first is always kept
    return _keep_from(logits_BV, jnp.where(before_BV < p, sorted_BV, jnp.inf).min(axis=-1, keepdims=True))


def keep_min_p(logits_BV, p: float):
    """-inf for tokens less than `p` times as probable as the likeliest (Nguyen et al. 2024, section 3)."""
    return _keep_from(logits_BV, logits_BV.max(axis=-1, keepdims=True) + jnp.log(p))


def _keep_from(logits_BV, threshold_B1):
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)


def adjust(logits_BV, seen_BV, sampling: Sampling):
    """The logits that tokens are sampled from: -inf where a filter drops a token.

    Args:
        logits_BV: float32 logits of the model.
        seen_BV: bool, the tokens that already occur in the row; not read if the repetition penalty is 1.
        sampling: static; with temperature 0 neither the scale nor the filters apply.
    """
    if sampling.repetition_penalty != 1:
        logits_BV = penalize_repetition(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_BV
    # Subtract the maximum first: at a tiny temperature the other logits overflow to -inf and the likeliest stays 0.
    below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = jnp.where(below_BV == 0, 0.0, below_BV / sampling.temperature)
    if sampling.top_k:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    if sampling.min_p:
        logits_BV = keep_min_p(logits_BV, sampling.min_p)
    return logits_BV


def choose(logits_BV, seen_BV, keys_B, sampling: Sampling):
    """The next token of each row, int32 [B]. Each row has its own key, which makes rows independent."""
    logits_BV = adjust(logits_BV.astype(jnp.float32), seen_BV, sampling)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
