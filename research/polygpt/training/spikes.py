"""Loss spikes: when a step's loss stands out from those before it, and what becomes of its update."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from polygpt.errors import Diverged
from polygpt.spec import Spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """What a step is compared with; a part of the training state.

    Attributes:
        recent: float32 [measures, window], those of the last steps that were no spikes, in a ring.
        entered: int32, how many steps have entered since the window was last begun.
        spikes: int32, spikes so far.
        in_row: int32, how many of them the last steps were.
    """

    recent: jax.Array
    entered: jax.Array
    spikes: jax.Array
    in_row: jax.Array


@dataclasses.dataclass(frozen=True)
class Rewound:
    """What was undone; in the data of every checkpoint.

    Attributes:
        times: rewinds so far.
        spikes: spikes that the window at hand has not counted, as they were in what was undone.
    """

    times: int = 0
    spikes: int = 0


@dataclasses.dataclass(frozen=True)
class SpikeSpec(Spec):
    """A step is a spike if its loss is `sigmas` standard deviations above the mean of the last `window` steps.

    The update of a spike is left out, so that it leaves no trace in the parameters or in the optimizer's moments.
    A rewind does what PaLM did by hand (arXiv:2204.02311, section 5.1): training starts again from a checkpoint before
    the spikes and leaves out the batches seen before and during them. The criterion is the z-score of ZClip
    (arXiv:2504.02507), here over a window, and one-sided: a fall is no harm.
    """

    window: int = 128
    """Steps that a step is compared with; until so many have been taken nothing is a spike."""
    sigmas: float = 6.0
    """Standard deviations above the mean from which on a step is a spike."""
    gradient_norm: bool = False
    """Whether a gradient norm that stands out makes a spike too."""
    action: Literal["skip", "rewind"] = "skip"
    """What follows `patience` spikes in a row. skip: their level is taken for the new one, the window is begun anew.
    rewind: back to the last checkpoint, and on with the data after the last spike."""
    patience: int = 10
    """Spikes in a row after which it follows."""
    rewinds: int = 5
    """Rewinds after which further ones are an error that ends the run."""

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

        Only global values go in, and the window is the same everywhere: all devices and processes decide alike.

        Args:
            window: the window before the step.
            loss, gradient_norm: the step's, over the global batch.
            finite: whether all of the step is finite. If not it is no spike, and the window stays as it is.
        """
        measures = jnp.stack([loss, gradient_norm])[: 1 + self.gradient_norm].astype(jnp.float32)
        limit = window.recent.mean(axis=1) + self.sigmas * window.recent.std(axis=1)
        spike = finite & (window.entered >= self.window) & jnp.any(measures > limit)
        enters = finite & ~spike
        recent = jnp.where(enters, window.recent.at[:, window.entered % self.window].set(measures), window.recent)
        in_row = jnp.where(finite, jnp.where(spike, window.in_row + 1, 0), window.in_row)
        entered = window.entered + enters
        if self.action == "skip":  # or a level that has shifted for good would leave out every update from here on
            entered = jnp.where(in_row >= self.patience, 0, entered)
        return spike, Window(recent, entered, window.spikes + spike, in_row)


class Rewinds:
    """The rewinds of a run: whether one is due, and what was undone.

    Args:
        spec: what a spike is; None: there are none.
        undone: as the checkpoint has it that the run goes on from.
    """

    def __init__(self, spec: SpikeSpec | None, undone: Rewound = Rewound()):
        self.spec, self.undone = spec, undone
        self._spiked: tuple[int, Any, int] | None = None  # step, place in the data, spikes

    @property
    def due(self) -> bool:
        """Whether the loop has to go back."""
        return self._spiked is not None

    def see(self, step: int, place: Any, metrics: dict[str, float]) -> None:
        """Notes if a rewind is due after a step, and completes its metrics by what was before the last rewind.

        Args:
            step: its number.
            place: in the data, after its batch.
            metrics: its own; "spikes" and "rewinds" become those of the whole run.
        """
        if self.spec is None:
            return
        if self.spec.action == "rewind" and metrics["spikes_in_row"] >= self.spec.patience:
            self._spiked = step, place, int(metrics["spikes"])
        metrics["spikes"] += self.undone.spikes
        metrics["rewinds"] = float(self.undone.times)

    def begin(self) -> tuple[int, Any]:
        """The step of the last spike, and the place in the data after it. Raises Diverged if there were too many."""
        step, place, _ = self._spiked
        if self.undone.times == self.spec.rewinds:
            raise Diverged(
                f"step {step}: the loss spiked {self.spec.patience} times in a row, after {self.spec.rewinds} rewinds: "
                "lower the learning rate or look at the data (train.spikes.rewinds sets this limit)"
            )
        return step, place

    def end(self, spikes: int) -> None:
        """The loop is back, at a state whose window has counted so many spikes."""
        lost = self._spiked[2] - spikes
        self.undone, self._spiked = Rewound(self.undone.times + 1, self.undone.spikes + lost), None
