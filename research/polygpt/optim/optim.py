"""The specification of optimisation: optimizer, schedule, groups, clipping, accumulation and averaging."""

import dataclasses

import jax
import optax

from polygpt.optim.by_layer import labels, partition
from polygpt.optim.groups import Group, assign, table, trained
from polygpt.optim.optimizers import AdamW, Optimizer
from polygpt.optim.schedules import Schedule, extended
from polygpt.parameters import name_of
from polygpt.spec import Spec, check_pattern


@dataclasses.dataclass(frozen=True)
class Optim(Spec):
    """How to turn gradients into parameter updates."""

    schedule: Schedule
    """Learning rate by step."""
    optimizer: Optimizer = AdamW()
    """The update rule."""
    clip: float | None = 1.0
    """Maximum global gradient norm; null disables clipping."""
    accumulate: int = 1
    """Number of microbatches per batch. Gradients are accumulated exactly, as for the whole batch."""
    groups: tuple[Group, ...] = ()
    """Rules for parts of the model; a parameter takes the first group whose pattern matches its path."""
    no_decay: str | None = None
    """Regular expression of further paths without weight decay, unless a group sets one. Vectors, embeddings and tables
    have none by default: see `decays` in `polygpt/parameters.py`."""
    ema: float | None = None
    """Decay of an exponential moving average of the parameters, which evaluation then uses; null disables it."""
    schedule_steps: int | None = None
    """Number of steps that the schedule spans; null for `train.steps`. Later steps keep its last learning rate, unless
    `rewarm` is set. Use this to extend a finished run without a jump in the learning rate."""
    rewarm: int | None = None
    """Number of steps after `schedule_steps` over which the learning rate moves linearly from its last value to the
    schedule stretched over `train.steps`; null keeps the last value."""

    def validate(self):
        check_pattern(self, "no_decay")
        self.require(self.clip is None or self.clip > 0, "clip", "null or above 0")
        self.require(self.accumulate >= 1, "accumulate", "at least 1")
        self.require(self.ema is None or 0 <= self.ema < 1, "ema", "null, or at least 0 and below 1")
        self.require(self.schedule_steps is None or self.schedule_steps >= 1, "schedule_steps", "null or at least 1")
        self.require(self.rewarm is None or self.rewarm >= 1, "rewarm", "null or at least 1")
        self.require(
            self.rewarm is None or self.schedule_steps is not None, "rewarm", "null without optim.schedule_steps"
        )

    def learning_rate(self, steps: int, schedule: Schedule | None = None) -> optax.Schedule:
        """Learning rate by step in a run of `steps` steps; `schedule` overrides the default for a group."""
        schedule = schedule or self.schedule
        if self.schedule_steps is None:
            return schedule.build(steps)
        return extended(schedule, self.schedule_steps, steps, self.rewarm)

    def rules(self, traits, growth=None, since=None):
        """The rule of each parameter, in a tree like `traits`. Raises SpecError for a group that takes no parameter.

        Args:
            traits: `Model.traits`, a tree of `Traits`.
            growth: `Model.growth`, a tree of `Growth` if the model uses muP; None for the standard parametrization.
            since: for runs in phases, see `groups.trained_since`.
        """
        rules = assign(traits, self.groups, self.optimizer.weight_decay, self.no_decay, since)
        if growth is None:
            return rules

        def widened(path, rule, growth):
            return rule.widened(self.optimizer.width_factor(name_of(path), growth))

        return jax.tree_util.tree_map_with_path(widened, rules, growth)

    def trainable(self, traits):
        """A tree like `traits` of bool: False for frozen parameters and constants. `SomeLayers` where layers differ."""
        return jax.tree.map(trained, self.rules(traits))

    def table(self, traits, growth=None) -> str:
        """A table of the parameters of each rule, one rule per line."""
        return table(traits, self.rules(traits, growth), growth)

    def build(self, traits, steps: int, growth=None, since=None) -> optax.GradientTransformation:
        """The transformation of gradients to additive updates, for a run of `steps` steps.

        `traits`, `growth` and `since` are as in `rules`. The gradients of what is frozen must be 0.
        """
        rules = self.rules(traits, growth, since)

        def transform(rule) -> optax.GradientTransformation:
            if rule.group.freeze:
                return optax.set_to_zero()
            schedule = self.learning_rate(steps, rule.group.schedule)
            factor = rule.group.learning_rate * rule.width_factor * rule.layer_factor
            return self.optimizer.build(lambda t: factor * schedule(t), rule.weight_decay)

        clip = optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
        return optax.chain(clip, partition(rules, {rule: transform(rule) for rule in labels(rules)}))
