"""UL2: a mixture of denoisers, each announced by a mode token."""

import dataclasses

import numpy as np

from polygpt.data.example import Example
from polygpt.data.transforms.base import Transform, Unit, token
from polygpt.data.transforms.prefix_lm import PrefixLM
from polygpt.data.transforms.span_corruption import SpanCorruption
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Denoiser(Spec):
    """One member of the mixture."""

    mode: str
    """The special token at the beginning of the example, which says what kind of denoiser follows."""
    transform: Transform
    """The transformation."""
    weight: float = 1.0
    """Sampling weight, relative to the others'."""

    def validate(self):
        self.require(bool(self.mode), "mode", "a name")
        self.require(self.weight > 0, "weight", "positive")


def denoisers(unit: Unit = "word", sentinels: int = 100) -> tuple[Denoiser, ...]:
    """The paper's seven, in equal parts: 2205.05131, Table 1. The prefix of S is three quarters long on average."""
    regular = [SpanCorruption(0.15, mean_span, unit, sentinels) for mean_span in (3, 8)]
    extreme = [SpanCorruption(0.5, mean_span, unit, sentinels) for mean_span in (3, 8)]
    extreme += [SpanCorruption(density, 64, unit, sentinels) for density in (0.15, 0.5)]
    return (
        *(Denoiser("[R]", one) for one in regular),
        Denoiser("[S]", PrefixLM((0.5, 1.0), unit)),
        *(Denoiser("[X]", one) for one in extreme),
    )


@dataclasses.dataclass(frozen=True)
class UL2(Transform):
    """Applies a denoiser drawn at random, after a token that names its mode. Tay et al. (2205.05131), section 3.

    A prompt that begins with a mode token, such as `Text("[S]", 0.0, special=True)`, asks for that mode.
    """

    denoisers: tuple[Denoiser, ...] = denoisers()
    """The denoisers."""

    def validate(self):
        self.require(len(self.denoisers) > 0, "denoisers", "at least one denoiser")

    @property
    def special(self) -> tuple[str, ...]:
        names = [one.mode for one in self.denoisers]
        return tuple(dict.fromkeys(names + [name for one in self.denoisers for name in one.transform.special]))

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        weights = np.array([one.weight for one in self.denoisers])
        chosen = self.denoisers[rng.choice(len(weights), p=weights / weights.sum())]
        example = chosen.transform(example, rng)
        return dataclasses.replace(example, parts=(token(chosen.mode), *example.parts))
