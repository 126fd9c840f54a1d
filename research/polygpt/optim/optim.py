"""The whole of optimisation as one specification."""

import dataclasses

import jax
import optax

from polygpt.optim.groups import Group, assign, check_pattern, table
from polygpt.optim.optimizers import AdamW, Optimizer
from polygpt.optim.schedules import Schedule, extended
from polygpt.parameters import name_of
from polygpt.spec import Spec

NO_DECAY = (
    r"(^|/)(\w+_)?(bias|scale|table|alpha|sink|A_log|D|u|v|vectors|before|after)$"  # the parameter's own name
    r"|norm/\w+$|(^|/)(embed|position)\w*(/\w+)?$|^modality/"  # or that of the layer right above it
)
"""Vectors, tables and mixing matrices of heads. Names farther up, such as a user's adapter, decide nothing."""


@dataclasses.dataclass(frozen=True)
class Optim(Spec):
    """How gradients become new parameters."""

    schedule: Schedule
    """Learning rate by step."""
    optimizer: Optimizer = AdamW()
    """The update rule."""
    clip: float | None = 1.0
    """Bound of the global norm of the gradient; null for none."""
    accumulate: int = 1
    """Microbatches that a batch is split into; their gradients are summed, as if the batch were whole."""
    groups: tuple[Group, ...] = ()
    """Rules for parts of the model; the first whose pattern is found in a parameter's path takes it."""
    no_decay: str = NO_DECAY
    """Regular expression of paths without weight decay, unless a group says one: biases, norms, embeddings, gates."""
    ema: float | None = None
    """Decay of an exponential moving average of the parameters, with which the model is evaluated; null for none."""
    schedule_steps: int | None = None
    """Steps that the schedule spans; null for `train.steps`. The steps after them keep its last learning rate, unless
    `rewarm` is set: this is how a finished run is trained further without a jump."""
    rewarm: int | None = None
    """Steps after `schedule_steps` in which the learning rate goes linearly from the last one to that of the schedule
    stretched over `train.steps`; null to keep the last one."""

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
        """Learning rate by step in a run of `steps` steps, by a group's schedule or that of all others."""
        schedule = schedule or self.schedule
        if self.schedule_steps is None:
            return schedule.build(steps)
        return extended(schedule, self.schedule_steps, steps, self.rewarm)

    def rules(self, params, growth=None):
        """The rule of each parameter, in a tree like `params`. Raises SpecError for a group that takes none.

        Args:
            params: arrays or their shapes.
            growth: `Model.growth`, a tree of `Growth` where the model has muP; None is the standard parametrization.
        """
        rules = assign(params, self.groups, self.optimizer.weight_decay, self.no_decay)
        if growth is None:
            return rules

        def widened(path, rule, growth):
            return rule.widened(self.optimizer.width_factor(name_of(path), growth))

        return jax.tree_util.tree_map_with_path(widened, rules, growth)

    def trainable(self, params):
        """A tree like `params` of bool: False for frozen parameters."""
        return jax.tree.map(lambda rule: not rule.group.freeze, self.rules(params))

    def table(self, params, growth=None) -> str:
        """Which rule took how many parameters, one a line."""
        return table(params, self.rules(params, growth), growth)

    def build(self, params, steps: int, growth=None) -> optax.GradientTransformation:
        """Turns gradients into updates to be added to the parameters, in a run of `steps` steps.

        `params` and `growth` are those of `rules`. The gradients of frozen parameters must be 0.
        """
        rules = self.rules(params, growth)

        def transform(rule) -> optax.GradientTransformation:
            if rule.group.freeze:
                return optax.set_to_zero()
            schedule = self.learning_rate(steps, rule.group.schedule)
            factor = rule.group.learning_rate * rule.width_factor
            return self.optimizer.build(lambda t: factor * schedule(t), rule.weight_decay)

        clip = optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
        # Labels are numbers, so that the optimizer state has short names and needs no order among rules.
        number = {rule: str(i) for i, rule in enumerate(dict.fromkeys(jax.tree.leaves(rules)))}
        labels = jax.tree.map(number.__getitem__, rules)
        return optax.chain(clip, optax.partition({number[rule]: transform(rule) for rule in number}, labels))
