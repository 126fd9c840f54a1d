"""Whether the data has what objectives score, checked before a run begins."""

import jax

from polygpt.data.loader import train_batches
from polygpt.errors import UserError
from polygpt.objectives.base import Objective
from polygpt.training.experiment import Experiment

BATCHES = 32
"""The first batch usually has something to score for every objective; after this many without, the run is refused."""


def require_scored(experiment: Experiment) -> None:
    """Raises UserError if an objective finds nothing to score in the first batches, such as a contrast without images.

    Objectives that score tokens by their loss weights are not checked: every example has such tokens, or a label.
    """
    missing = {
        name: objective
        for name, (objective, weight) in experiment.objectives.items()
        if weight and type(objective).weight is not Objective.weight
    }
    if not missing:
        return
    keys_B = jax.random.split(jax.random.key(experiment.seed), experiment.data.batch_size)

    @jax.jit
    def weights(batch):
        views = {objective.view for objective in missing.values()}
        seen = {view: batch if view is None else view(batch, keys_B) for view in views}
        return {name: objective.weight(seen[objective.view]) for name, objective in missing.items()}

    data, found = experiment.data.replace(workers=0), set()
    batches = train_batches(data, experiment.tokenizer.build(), experiment.model.adapters, seed=experiment.seed)
    try:
        for _ in range(BATCHES):
            found |= {name for name, weight in weights(next(batches)).items() if weight > 0}
            if found == missing.keys():
                return
    finally:
        batches.close()
    name = min(missing.keys() - found)
    lacks = missing[name].needs.about or "other data"
    raise UserError(
        f"objectives.{name} finds nothing to score in the first {BATCHES * data.batch_size:,} rows of data.tasks: "
        f"{type(missing[name]).__name__} needs {lacks}; change the data, or remove the objective"
    )
