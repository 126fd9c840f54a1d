"""Parameter groups: assign optimisation rules to parameters by regular expressions over their paths."""

import dataclasses
import math
import re

import jax

from polygpt.columns import aligned
from polygpt.errors import SpecError
from polygpt.optim.schedules import Schedule
from polygpt.parameters import Traits, name_of
from polygpt.spec import Spec, check_pattern


@dataclasses.dataclass(frozen=True)
class Group(Spec):
    """Settings for the parameters whose path matches, such as "decoder/.*kernel$". The first match wins."""

    pattern: str
    """Regular expression, searched in the path."""
    learning_rate: float = 1.0
    """Factor on the schedule."""
    weight_decay: float | None = None
    """Weight decay of the group; null uses the optimizer's."""
    schedule: Schedule | None = None
    """Schedule of the group; null uses `optim.schedule`."""
    freeze: bool = False
    """Whether to freeze these parameters; no gradient is computed for them."""

    def validate(self):
        check_pattern(self, "pattern")
        self.require(self.learning_rate >= 0, "learning_rate", "at least 0")
        self.require(self.weight_decay is None or self.weight_decay >= 0, "weight_decay", "null or at least 0")


REST = Group("")
"""The group of all parameters that match no other group."""
CONSTANTS = Group("", freeze=True)
"""The group of all variables that are not trained: see `Traits.trained`."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A group, with the weight decay and the learning-rate factor of some of its parameters."""

    index: int
    group: Group = dataclasses.field(compare=False)
    weight_decay: float
    width_factor: float = 1.0

    def widened(self, factor: float) -> "Rule":
        """Multiplies the learning rate by muP's factor and divides the weight decay by it, to keep their product."""
        if self.group.freeze:
            return self
        return dataclasses.replace(self, weight_decay=self.weight_decay / factor, width_factor=factor)


def assign(traits, groups: tuple[Group, ...], weight_decay: float, no_decay: str | None):
    """The rule of each parameter, in a tree like `traits` (`Model.traits`).

    Args:
        traits: a tree of `Traits`.
        groups: a parameter takes the first whose pattern matches its path. Constants take none.
        weight_decay: default for parameters that decay and whose group does not set one.
        no_decay: regular expression; matching parameters have no weight decay unless their group sets one.

    Raises:
        SpecError: for a group that matches no parameter, or only parameters of earlier groups.
    """

    leaves, structure = jax.tree_util.tree_flatten_with_path(traits)
    names = [name_of(path) for path, own in leaves if own.trained]

    def rule(name: str, own: Traits) -> Rule:
        if not own.trained:
            return Rule(len(groups) + 1, CONSTANTS, 0.0)
        matching = (i for i, group in enumerate(groups) if re.search(group.pattern, name))
        index = next(matching, len(groups))
        group = (*groups, REST)[index]
        decay = group.weight_decay
        if decay is None:
            decay = 0.0 if not own.decays or (no_decay and re.search(no_decay, name)) else weight_decay
        return Rule(index, group, decay)

    rules = [rule(name_of(path), own) for path, own in leaves]
    unused = set(range(len(groups))) - {rule.index for rule in rules}
    for index in sorted(unused):
        pattern = groups[index].pattern
        earlier = [name for name in names if re.search(pattern, name)]
        why = f"an earlier group takes {earlier[0]}" if earlier else f"paths look like {names[0]}"
        raise SpecError(f"optim.groups: the group {pattern!r} takes no parameter: {why}")
    return jax.tree.unflatten(structure, rules)


def table(traits, rules, growth=None) -> str:
    """A table of the parameters of each rule, one rule per line; given a tree of `Growth`, with muP's factors."""
    mup = ("muP", "rate", "initial") if growth is not None else ()
    rows = [("group", "learning rate", *mup, "weight decay", "tensors", "parameters")]
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(traits)]
    kinds = [(leaf.kind, f"x {leaf.initial:.3g}") for leaf in jax.tree.leaves(growth)] if mup else [()] * len(sizes)
    keys = list(zip(jax.tree.leaves(rules), kinds, strict=True))
    decays = {(rule.index, rule.weight_decay > 0) for rule, _ in keys}
    for key in dict.fromkeys(keys):
        taken = [size for other, size in zip(keys, sizes, strict=True) if other == key]
        rule, kind = key
        schedule = type(rule.group.schedule).__name__ if rule.group.schedule else "schedule"
        rate = "frozen" if rule.group.freeze else f"{rule.group.learning_rate:g} x {schedule}"
        decay = "-" if rule.group.freeze else f"{rule.weight_decay:g}"
        if kind:
            kind = (kind[0], "-" if rule.group.freeze else f"x {rule.width_factor:.3g}", kind[1])
        name = "(not trained)" if rule.group is CONSTANTS else rule.group.pattern or "(all others)"
        if {(rule.index, True), (rule.index, False)} <= decays:  # a group with parameters of both kinds has two rows
            name += ", decayed" if rule.weight_decay else ", not decayed"
        rows.append((name, rate, *kind, decay, f"{len(taken):,}", f"{sum(taken):,}"))
    return aligned(rows, texts=3 if mup else 2)
