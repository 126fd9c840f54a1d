"""The training batches on their way to the devices, and the position in the data."""

from collections.abc import Callable, Sequence
from typing import Any

from polygpt.data.loader import TrainBatches, train_batches
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.training.data_shards import gather_positions
from polygpt.training.prefetch import Checks, Fed, Prefetch
from polygpt.training.program import Program
from polygpt.training.seeds import Streams


class Feed:
    """Feeds a run. Call `start` before `take`.

    Attributes:
        place: position in the data after the last batch that counts, which the loop sets; batches taken ahead of the
            loop are beyond it.

    Args:
        program: whose experiment has the data.
        tokenizer: the tokenizer.
    """

    def __init__(self, program: Program, tokenizer: Tokenizer):
        self._program, self._tokenizer = program, tokenizer
        self._batches = self._opened()
        self._ahead: Prefetch | None = None
        self.place: dict[str, Any] = self._batches.get_state()

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Moves to the position of a checkpoint, given that of every data shard."""
        self._batches.set_state(states)
        self.place = self._batches.get_state()

    def start(self) -> None:
        """Starts to fetch batches ahead."""
        checks = Checks(self._tokenizer.vocabulary, self._program.model.positions)
        ahead = self._program.experiment.train.prefetch
        self._ahead = Prefetch(self._batches, self._program.parallel.put, checks, ahead)

    def take(self, stop: Callable[[], bool]) -> Fed | None:
        """See `Prefetch.take`."""
        return self._ahead.take(stop)

    @property
    def ready(self) -> bool:
        """Whether the next batch is ready."""
        return self._ahead.ready

    def close(self) -> None:
        """Stops fetching."""
        if not self._ahead.close():  # its thread still reads; whatever it yields is discarded
            self._batches = self._opened()

    def follow(self, program: Program) -> None:
        """Changes to the data of another phase, at its beginning. Call it while nothing is fetched."""
        self._program = program
        self._batches = self._batches.under(program.experiment.data, program.experiment.model.adapters)

    def go_on(self, place: dict[str, Any]) -> None:
        """Moves to a position of this process and starts. All processes must call it."""
        self._batches.set_state(gather_positions(place))
        self.place = place
        self.start()

    def _opened(self) -> TrainBatches | Streams:
        experiment, runs = self._program.experiment, self._program.parallel
        given = experiment.data, self._tokenizer, experiment.model.adapters
        if self._program.seeds:
            return Streams(*given, self._program.seeds)
        shard = {"data_shard": runs.data_shard, "data_shards": runs.data_shards}
        return train_batches(*given, seed=experiment.seed, **shard)
