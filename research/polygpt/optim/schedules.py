"""Learning-rate schedules.

All begin with a linear warm-up: the rate of step t (from 0) is `peak_lr * (t + 1) / warmup` for t < warmup, so that no
step has rate 0. In the formulas below, t counts from the end of the warm-up and n is the number of remaining steps.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
import optax

from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Schedule(Spec):
    """Base of all schedules. A new one defines `after_warmup`."""

    peak_lr: float
    """The highest learning rate, reached at the end of the warm-up."""
    warmup: int = 0
    """Steps of linear warm-up; a shorter run warms up to its end."""

    def validate(self):
        self.require(self.peak_lr >= 0, "peak_lr", "at least 0")
        self.require(self.warmup >= 0, "warmup", "at least 0")

    def after_warmup(self, steps: int) -> optax.Schedule:
        """Learning rate by step, counted from the end of the warm-up, over `steps` steps."""
        raise NotImplementedError(f"{type(self).__name__} defines no after_warmup")

    def build(self, steps: int) -> optax.Schedule:
        """Learning rate by step, for a run of `steps` steps."""
        after = self.after_warmup(max(steps - self.warmup, 1))
        if not self.warmup:
            return after
        return optax.join_schedules([lambda t: self.peak_lr * (t + 1) / self.warmup, after], [self.warmup])


def extended(schedule: Schedule, first: int, steps: int, rewarm: int | None) -> optax.Schedule:
    """Learning rate by step of a schedule over `first` steps, in a run of `steps` steps.

    Later steps keep the last rate r. With `rewarm` = n, the k-th later step (from 0) has the rate
    `r + (s - r) * min((k + 1) / n, 1)`, where s is the rate at that step of the schedule stretched over `steps`.
    """
    before, whole = schedule.build(first), schedule.build(steps)

    def rate(t):
        kept = before(jnp.minimum(t, first - 1))
        if rewarm is None:
            return kept
        share = jnp.clip((t - first + 1) / rewarm, 0.0, 1.0)
        return kept + (whole(t) - kept) * share

    return rate


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """peak_lr."""

    def after_warmup(self, steps: int) -> optax.Schedule:
        return optax.constant_schedule(self.peak_lr)


@dataclasses.dataclass(frozen=True)
class Decaying(Schedule):
    """Base of the schedules that end at a fraction of the peak."""

    final: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""

    def validate(self):
        super().validate()
        self.require(0 <= self.final <= 1, "final", "from 0 to 1")


@dataclasses.dataclass(frozen=True)
class WarmupCosine(Decaying):
    """peak_lr * (final + (1 - final) * (1 + cos(pi t / n)) / 2)."""

    def after_warmup(self, steps: int) -> optax.Schedule:
        return optax.cosine_decay_schedule(self.peak_lr, steps, alpha=self.final)


@dataclasses.dataclass(frozen=True)
class WarmupLinear(Decaying):
    """peak_lr * (1 - (1 - final) * t / n)."""

    def after_warmup(self, steps: int) -> optax.Schedule:
        return optax.linear_schedule(self.peak_lr, self.peak_lr * self.final, steps)


@dataclasses.dataclass(frozen=True)
class WarmupExponential(Decaying):
    """peak_lr * final ** (t / n)."""

    def validate(self):
        super().validate()
        self.require(self.final > 0, "final", "above 0")

    def after_warmup(self, steps: int) -> optax.Schedule:
        return optax.exponential_decay(self.peak_lr, steps, self.final, end_value=self.peak_lr * self.final)


@dataclasses.dataclass(frozen=True)
class WSD(Decaying):
    """Warm-up, stable, decay: constant at the peak, then a decay over the last fraction of the run.

    Hu et al. 2024, MiniCPM (2404.06395), section 4; the square root is from Hägele et al. 2024 (2405.18392), section 3.
    With x from 0 to 1 over the decay, the rate moves from the peak to its final fraction as 1 - x (`linear`) or
    1 - sqrt(x) (`sqrt`).
    """

    decay: float = 0.2
    """Fraction of all steps that the decay takes; less if the warm-up leaves less."""
    shape: Literal["linear", "sqrt"] = "linear"
    """Shape of the decay."""

    def validate(self):
        super().validate()
        self.require(0 < self.decay <= 1, "decay", "above 0 and at most 1")

    def build(self, steps: int) -> optax.Schedule:
        start = max(steps - max(round(self.decay * steps), 1), self.warmup)
        fall = max(steps - start, 1)
        stable = Constant(self.peak_lr, self.warmup).build(steps)

        def down(t):
            x = jnp.clip(t / fall, 0.0, 1.0)
            share = 1 - (jnp.sqrt(x) if self.shape == "sqrt" else x)
            return self.peak_lr * (self.final + (1 - self.final) * share)

        return optax.join_schedules([stable, down], [start])


@dataclasses.dataclass(frozen=True)
class SGDR(Schedule):
    """Cosine decay with warm restarts. Loshchilov and Hutter 2017 (1608.03983), eq. 5.

    Cycle i lasts `period * stretch ** i` steps and falls from `peak_lr * shrink ** i` to `peak_lr * final`.
    """

    final: float = 0.0
    """Learning rate at the end of each cycle, as a fraction of the peak."""
    period: int = 1000
    """Steps in the first cycle, T_0."""
    stretch: float = 2.0
    """Length of each cycle relative to the one before, T_mult."""
    shrink: float = 1.0
    """Peak of each cycle relative to the one before."""

    def validate(self):
        super().validate()
        self.require(0 <= self.final <= 1, "final", "from 0 to 1")
        self.require(self.period > 0, "period", "above 0")
        self.require(self.stretch >= 1, "stretch", "at least 1")
        self.require(0 < self.shrink <= 1, "shrink", "above 0 and at most 1")

    def after_warmup(self, steps: int) -> optax.Schedule:
        starts = [0]
        while starts[-1] < steps:
            starts.append(starts[-1] + round(self.period * self.stretch ** (len(starts) - 1)))
        starts = np.asarray(starts, np.int32)

        def rate(t):
            t = jnp.minimum(t, starts[-1] - 1)
            cycle = jnp.searchsorted(starts, t, side="right") - 1
            begin, end = jnp.asarray(starts)[cycle], jnp.asarray(starts)[cycle + 1]
            low, high = self.peak_lr * self.final, self.peak_lr * self.shrink**cycle
            return low + (high - low) * (1 + jnp.cos(jnp.pi * (t - begin) / (end - begin))) / 2

        return rate
