"""Groups of parameters: which rule takes which, told by regular expressions over parameter paths."""

import dataclasses
import math
import re

import jax

from polygpt.errors import SpecError
from polygpt.optim.paths import name_of
from polygpt.optim.schedules import Schedule
from polygpt.spec import Spec


def check_pattern(spec: Spec, field: str) -> None:
    """Raises SpecError unless the field holds a regular expression."""
    try:
        re.compile(getattr(spec, field))
    except re.error as error:
        spec.require(False, field, f"a regular expression ({error})")


@dataclasses.dataclass(frozen=True)
class Group(Spec):
    """What holds for the parameters whose path matches, such as "decoder/.*kernel$". The first match wins."""

    pattern: str
    """Regular expression, searched in the path."""
    learning_rate: float = 1.0
    """Factor on the schedule."""
    weight_decay: float | None = None
    """Weight decay instead of the usual one."""
    schedule: Schedule | None = None
    """Schedule instead of the usual one."""
    freeze: bool = False
    """Whether these parameters stay as they are; no gradient is computed for them."""

    def validate(self):
        check_pattern(self, "pattern")
        self.require(self.learning_rate >= 0, "learning_rate", "at least 0")
        self.require(self.weight_decay is None or self.weight_decay >= 0, "weight_decay", "null or at least 0")


REST = Group("")
"""Takes what no other group took."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A group and the weight decay that some of its parameters take."""

    index: int
    group: Group = dataclasses.field(compare=False)
    weight_decay: float


def assign(params, groups: tuple[Group, ...], weight_decay: float, no_decay: str):
    """The rule of each parameter, in a tree like `params` (arrays or their shapes).

    Args:
        weight_decay: of parameters whose group says none.
        no_decay: regular expression: parameters whose path matches, and whose group says none, take no weight decay.

    Raises:
        SpecError: for a group that takes no parameter.
    """

    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [name_of(path) for path, _ in leaves]

    def rule(name: str) -> Rule:
        matching = (i for i, group in enumerate(groups) if re.search(group.pattern, name))
        index = next(matching, len(groups))
        group = (*groups, REST)[index]
        decay = group.weight_decay
        if decay is None:
            decay = 0.0 if re.search(no_decay, name) else weight_decay
        return Rule(index, group, decay)

    rules = [rule(name) for name in names]
    idle = set(range(len(groups))) - {rule.index for rule in rules}
    for index in sorted(idle):
        pattern = groups[index].pattern
        earlier = [name for name in names if re.search(pattern, name)]
        why = f"an earlier group takes {earlier[0]}" if earlier else f"paths look like {names[0]}"
        raise SpecError(f"optim.groups: the group {pattern!r} takes no parameter: {why}")
    return jax.tree.unflatten(structure, rules)


def table(params, rules) -> str:
    """Which rule took how many parameters, one a line, in columns."""
    rows = [("group", "learning rate", "weight decay", "tensors", "parameters")]
    leaves = list(zip(jax.tree.leaves(rules), jax.tree.leaves(params), strict=True))
    for rule in dict.fromkeys(rule for rule, _ in leaves):
        taken = [leaf for other, leaf in leaves if other == rule]
        schedule = type(rule.group.schedule).__name__ if rule.group.schedule else "schedule"
        rate = "frozen" if rule.group.freeze else f"{rule.group.learning_rate:g} x {schedule}"
        decay = "-" if rule.group.freeze else f"{rule.weight_decay:g}"
        count = sum(math.prod(leaf.shape) for leaf in taken)
        rows.append((rule.group.pattern or "(all others)", rate, decay, f"{len(taken):,}", f"{count:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
