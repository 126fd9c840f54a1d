"""Whether the data has what objectives score, checked before a run begins."""

import logging

import jax
import jax.numpy as jnp

from polygpt.data.loader import train_batches
from polygpt.errors import UserError
from polygpt.objectives.base import BatchObjective, Objective
from polygpt.training.experiment import Experiment

BATCHES = 32
"""The first batch usually has something to score for every objective; after this many without, the run is refused."""


LEFT_OUT = "objectives.%s leaves out %d of %d examples in the first %d rows: raise its limit, such as per_row"

log = logging.getLogger(__name__)


def require_scored(*phases: Experiment) -> None:
    """Raises UserError if an objective finds nothing to score in the first batches, such as a contrast without images.

    Warns if one leaves out examples of the first batch, because of a limit of its own. Objectives that score tokens by
    their loss weights are not checked: every example has such tokens, or a label.

    Args:
        phases: the experiment of each phase of a run. Each is checked that scores other things, or other data.
    """
    seen = []
    for number, experiment in enumerate(phases):
        scoring = {
            name: objective
            for name, (objective, weight) in experiment.objectives.items()
            if weight and type(objective).weight is not Objective.weight
        }
        read = scoring, experiment.data.tasks, experiment.data.layout
        if scoring and read not in seen:
            seen.append(read)
            _require_scored(experiment, scoring, f"train.phases.{number - 1}: " if number else "")


def _require_scored(experiment: Experiment, missing: dict[str, Objective], where: str) -> None:
    keys_B = jax.random.split(jax.random.key(experiment.seed), experiment.data.batch_size)

    @jax.jit
    def weights(batch):
        views = {objective.view for objective in missing.values()}
        seen = {view: batch if view is None else view(batch, keys_B) for view in views}
        return {name: _scored(objective, seen[objective.view]) for name, objective in missing.items()}

    data, found = experiment.data.replace(workers=0), set()
    batches = train_batches(data, experiment.tokenizer.build(), experiment.model.adapters, seed=experiment.seed)
    try:
        for number in range(BATCHES):
            counts = weights(next(batches))
            for name, (weight, left_out) in counts.items():
                if number == 0 and left_out > 0:
                    log.warning(LEFT_OUT, name, int(left_out), int(weight + left_out), experiment.data.batch_size)
            found |= {name for name, (weight, _) in counts.items() if weight > 0}
            if found == missing.keys():
                return
    finally:
        batches.close()
    name = min(missing.keys() - found)
    lacks, rows = missing[name].scored(experiment.model), BATCHES * data.batch_size
    raise UserError(
        f"{where}objectives.{name} finds nothing to score in the first {rows:,} rows of data.tasks: "
        f"{type(missing[name]).__name__} needs {lacks}; change the data, or remove the objective"
    )


def _scored(objective: Objective, batch) -> tuple[jax.Array, jax.Array]:
    """(weight, number of examples that it leaves out)."""
    left_out = objective.left_out(batch) if isinstance(objective, BatchObjective) else jnp.zeros(())
    return objective.weight(batch), left_out
