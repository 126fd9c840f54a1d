"""Loss spikes: detecting them, and skipping or rewinding the affected updates."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from polygpt.errors import Diverged
from polygpt.spec import Spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """The recent steps that a step is compared with; part of the training state.

    Attributes:
        recent: float32 [measures, window], a ring buffer of the last steps that were not spikes.
        entered: int32, steps entered since the window was last reset.
        spikes: int32, spikes so far.
        in_row: int32, consecutive spikes up to the last step.
    """

    recent: jax.Array
    entered: jax.Array
    spikes: jax.Array
    in_row: jax.Array


@dataclasses.dataclass(frozen=True)
class Rewound:
    """Bookkeeping of rewinds; stored in every checkpoint.

    Attributes:
        times: rewinds so far.
        spikes: spikes in discarded steps, which the current window has not counted.
    """

    times: int = 0
    spikes: int = 0


@dataclasses.dataclass(frozen=True)
class SpikeSpec(Spec):
    """A step is a spike if its loss is `sigmas` standard deviations above the mean of the last `window` steps.

    The update of a spike is skipped: it affects neither the parameters nor the optimizer's moments. A rewind automates
    what PaLM did by hand (arXiv:2204.02311, section 5.1): training restarts from a checkpoint before the spikes and
    skips the batches seen before and during them. The criterion is the z-score of ZClip (arXiv:2504.02507), here over a
    window, and one-sided: a drop is harmless.
    """

    window: int = 128
    """Number of steps that a step is compared with; no spikes are detected until the window is full."""
    sigmas: float = 6.0
    """Standard deviations above the mean at which a step becomes a spike."""
    gradient_norm: bool = False
    """Whether to detect spikes of the gradient norm as well."""
    action: Literal["skip", "rewind"] = "skip"
    """Response to `patience` consecutive spikes. skip: accept the new level and reset the window. rewind: go back to
    the last checkpoint and continue with the data after the last spike."""
    patience: int = 10
    """Consecutive spikes that trigger `action`."""
    rewinds: int = 5
    """Maximum number of rewinds; the next one fails the run."""

    def validate(self):
        self.require(self.window >= 2, "window", "at least 2")
        self.require(self.sigmas > 0, "sigmas", "positive")
        self.require(self.patience >= 1, "patience", "at least 1")
        self.require(self.rewinds >= 0, "rewinds", "at least 0")

    def begin(self) -> Window:
        """An empty window."""
        zero = jnp.zeros((), jnp.int32)
        return Window(jnp.zeros((1 + self.gradient_norm, self.window), jnp.float32), zero, zero, zero)

    def judge(
        self, window: Window, loss: jax.Array, gradient_norm: jax.Array, finite: jax.Array
    ) -> tuple[jax.Array, Window]:
        """Whether a step is a spike, and the window after it.

        Inputs are global and the window is replicated, so all devices and processes make the same decision.

        Args:
            window: the window before the step.
            loss, gradient_norm: of the step, over the global batch.
            finite: whether the whole step is finite. If not, it is not a spike, and the window is unchanged.
        """
        measures = jnp.stack([loss, gradient_norm])[: 1 + self.gradient_norm].astype(jnp.float32)
        limit = window.recent.mean(axis=1) + self.sigmas * window.recent.std(axis=1)
        spike = finite & (window.entered >= self.window) & jnp.any(measures > limit)
        enters = finite & ~spike
        recent = jnp.where(enters, window.recent.at[:, window.entered % self.window].set(measures), window.recent)
        in_row = jnp.where(finite, jnp.where(spike, window.in_row + 1, 0), window.in_row)
        entered = window.entered + enters
        if self.action == "skip":  # otherwise a permanent shift of the level would skip every later update
            entered = jnp.where(in_row >= self.patience, 0, entered)
        return spike, Window(recent, entered, window.spikes + spike, in_row)


class Rewinds:
    """Tracks the rewinds of a run.

    Args:
        spec: when a step is a spike; None for no detection.
        totals: as stored in the checkpoint that the run resumes from.
    """

    def __init__(self, spec: SpikeSpec | None, totals: Rewound = Rewound()):
        self.spec, self.totals = spec, totals
        self._spiked: tuple[int, Any, int] | None = None  # step, place in the data, spikes

    @property
    def due(self) -> bool:
        """Whether the loop must rewind."""
        return self._spiked is not None

    def observe(self, step: int, place: Any, metrics: dict[str, float]) -> None:
        """Records whether a rewind is due after a step, and adds the counts from before the last rewind to its metrics.

        Args:
            step: the step.
            place: position in the data after its batch.
            metrics: of the step; updated in place: "spikes" and "rewinds" become totals of the whole run.
        """
        if self.spec is None:
            return
        if self.spec.action == "rewind" and metrics["spikes_in_row"] >= self.spec.patience:
            self._spiked = step, place, int(metrics["spikes"])
        metrics["spikes"] += self.totals.spikes
        metrics["rewinds"] = float(self.totals.times)

    def begin(self) -> tuple[int, Any]:
        """The step of the last spike and the position in the data after it. Raises Diverged after too many rewinds."""
        step, place, _ = self._spiked
        if self.totals.times == self.spec.rewinds:
            raise Diverged(
                f"step {step}: the loss spiked {self.spec.patience} times in a row, after {self.spec.rewinds} rewinds: "
                "lower the learning rate or look at the data (train.spikes.rewinds sets this limit)"
            )
        return step, place

    def end(self, spikes: int) -> None:
        """Called after the rewind, with the number of spikes counted by the restored window."""
        lost = self._spiked[2] - spikes
        self.totals, self._spiked = Rewound(self.totals.times + 1, self.totals.spikes + lost), None
