"""Parameter groups: assign optimisation rules to parameters by regular expressions over their paths.

A group may take some layers of a stack only. Where a stack is scanned, its layers are the first axis of one parameter,
whose rule is then a `ByLayer`.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from polygpt.columns import aligned
from polygpt.errors import SpecError
from polygpt.optim.schedules import Schedule
from polygpt.parameters import SomeLayers, Traits, name_of, paths
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
    layers: tuple[int, int] | None = None
    """Only these layers of a stack of blocks, from 0, the last excluded: [0, 4] are the first four; null for all layers
    and for parameters outside of stacks."""
    layer_decay: float | None = None
    """Layer-wise decay of the learning rate: layer l of L, from 0, has the factor `layer_decay ** (L - l)`, as in BEiT
    (2106.08254), appendix H; parameters outside of stacks keep theirs. There, embeddings have the factor
    `layer_decay ** (L + 1)`: give them a group with that `learning_rate`. null: none."""

    def validate(self):
        check_pattern(self, "pattern")
        whole = self.layers is None or 0 <= self.layers[0] < self.layers[1]
        self.require(whole, "layers", "null, or the first layer and, above it, the last one, excluded")
        decays = self.layer_decay is None or 0 < self.layer_decay <= 1
        self.require(decays, "layer_decay", "null, or above 0 and at most 1")
        self.require(self.learning_rate >= 0, "learning_rate", "at least 0")
        self.require(self.weight_decay is None or self.weight_decay >= 0, "weight_decay", "null or at least 0")

    @property
    def name(self) -> str:
        """Its name in messages and tables."""
        span = None if self.layers is None else (self.layers[0], self.layers[1] - 1)
        of = "" if span is None else f", layer {span[0]}" if span[0] == span[1] else f", layers {span[0]} to {span[1]}"
        return (self.pattern or "(all others)") + of

    def takes(self, name: str, layer: int | None) -> bool:
        """Whether it matches a parameter, in this layer of its stack; None outside of stacks."""
        inside = self.layers is None or (layer is not None and self.layers[0] <= layer < self.layers[1])
        return inside and re.search(self.pattern, name) is not None


REST = Group("")
"""The group of all parameters that match no other group."""
CONSTANTS = Group("", freeze=True)
"""The group of all variables that are not trained: see `Traits.trained`."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A group, with what it means for some of its parameters.

    Attributes:
        index: number of the group.
        group: the group.
        weight_decay: weight decay.
        width_factor: factor on the learning rate by muP.
        layer_factor: factor on the learning rate by `Group.layer_decay`.
        since: number of steps before the parameters were trained: see `training/phase.py`.
    """

    index: int
    group: Group = dataclasses.field(compare=False)
    weight_decay: float
    width_factor: float = 1.0
    layer_factor: float = 1.0
    since: int = 0

    def widened(self, factor: float) -> "Rule":
        """Multiplies the learning rate by muP's factor and divides the weight decay by it, to keep their product."""
        if self.group.freeze:
            return self
        return dataclasses.replace(self, weight_decay=self.weight_decay / factor, width_factor=factor)


@dataclasses.dataclass(frozen=True)
class ByLayer:
    """The rules of a stacked parameter whose layers differ: (begin, end, rule) of ranges of its first axis."""

    parts: tuple[tuple[int, int, Rule], ...]

    def widened(self, factor: float) -> "ByLayer":
        """See `Rule.widened`."""
        return ByLayer(tuple((begin, end, rule.widened(factor)) for begin, end, rule in self.parts))


def parts_of(rule: Rule | ByLayer, shape: tuple[int, ...]) -> list[tuple[Rule, tuple[int, ...]]]:
    """The rules of a parameter of this shape, each with the shape of the part that it is for."""
    if isinstance(rule, Rule):
        return [(rule, tuple(shape))]
    return [(own, (end - begin, *shape[1:])) for begin, end, own in rule.parts]


def assign(traits, groups: tuple[Group, ...], weight_decay: float, no_decay: str | None, since=None):
    """The rule of each parameter, in a tree like `traits` (`Model.traits`).

    Args:
        traits: a tree of `Traits`.
        groups: a parameter, or a layer of a stacked one, takes the first that matches. Constants take none.
        weight_decay: default for parameters that decay and whose group does not set one.
        no_decay: regular expression; matching parameters have no weight decay unless their group sets one.
        since: for each parameter, by name, `Rule.since` of each of its layers; default: 0.

    Raises:
        SpecError: for a group that matches no parameter, or only parameters of earlier groups; or if all are frozen.
    """

    leaves, structure = jax.tree_util.tree_flatten_with_path(traits)
    names = {name_of(path): own for path, own in leaves if own.trained}

    def rule(name: str, own: Traits, layer: int | None, since: int) -> Rule:
        if not own.trained:
            return Rule(len(groups) + 1, CONSTANTS, 0.0)
        matching = (i for i, group in enumerate(groups) if group.takes(name, layer))
        index = next(matching, len(groups))
        group = (*groups, REST)[index]
        decay = group.weight_decay
        if decay is None:
            decay = 0.0 if not own.decays or (no_decay and re.search(no_decay, name)) else weight_decay
        if group.freeze:
            return Rule(index, group, decay)
        factor = 1.0 if group.layer_decay is None or layer is None else group.layer_decay ** (own.depth - layer)
        return Rule(index, group, decay, layer_factor=factor, since=since)

    def rules_of(name: str, own: Traits) -> Rule | ByLayer:
        layers = own.layers or (None,)
        starts = since[name] if since else (0,) * len(layers)
        found = [rule(name, own, *pair) for pair in zip(layers, starts, strict=True)]
        changes = [i for i in range(1, len(found)) if found[i] != found[i - 1]]
        if not changes:
            return found[0]
        bounds = zip([0, *changes], [*changes, len(found)], strict=True)
        return ByLayer(tuple((begin, end, found[begin]) for begin, end in bounds))

    rules = [rules_of(name_of(path), own) for path, own in leaves]
    found = [part for rule, (_, own) in zip(rules, leaves, strict=True) for part, _ in parts_of(rule, own.shape)]
    for index in sorted(set(range(len(groups))) - {rule.index for rule in found}):
        raise SpecError(f"optim.groups: the group {groups[index].pattern!r} {_why_unused(index, groups, names)}")
    if all(rule.group.freeze for rule in found if rule.index <= len(groups)):
        raise SpecError("optim.groups freezes all that the model trains, so nothing learns: leave some of it to train")
    for index, group in enumerate(groups):
        factors = {rule.layer_factor for rule in found if rule.index == index and not rule.group.freeze}
        if group.layer_decay not in (None, 1.0) and factors == {1.0}:
            raise SpecError(f"optim.groups: the group {group.pattern!r} has a layer_decay and takes no stacked layer")
    return jax.tree.unflatten(structure, rules)


def _why_unused(index: int, groups: tuple[Group, ...], names: dict[str, Traits]) -> str:
    """Why a group takes no parameter. `names` has the traits of all trained parameters."""
    group = groups[index]
    said = "takes no parameter" if group.layers is None else f"takes nothing in the layers {list(group.layers)}"
    matching = [name for name in names if re.search(group.pattern, name)]
    if not matching:
        return f"{said}: paths look like {next(iter(names))}"
    if group.layers is not None and not any(group.takes(name, i) for name in matching for i in names[name].layers):
        depth = max(names[name].depth for name in matching)
        return f"{said}: " + (f"there are the layers 0 to {depth - 1}" if depth else f"{matching[0]} is in no stack")
    return f"{said}: an earlier group takes {matching[0]}"


def trained_since(rules: Sequence[Any], starts: Sequence[int], traits) -> dict[str, tuple[int, ...]]:
    """`Rule.since` of each layer of each parameter, by name, in the last of several phases.

    Args:
        rules: the rules in each phase, trees like `traits`.
        starts: number of steps before each phase.
        traits: a tree of `Traits`.
    """
    layers = {name: len(own.layers) or 1 for name, own in paths(traits).items()}
    since = {name: (0,) * number for name, number in layers.items()}
    frozen = [{name: _frozen(rule, layers[name]) for name, rule in paths(one).items()} for one in rules]
    for start, before, after in zip(starts[1:], frozen, frozen[1:], strict=False):
        for name, own in since.items():
            thawed = zip(own, before[name], after[name], strict=True)
            since[name] = tuple(start if was and not now else old for old, was, now in thawed)
    return since


def _frozen(rule: Rule | ByLayer, layers: int) -> list[bool]:
    """Whether each layer is frozen."""
    if isinstance(rule, Rule):
        return [rule.group.freeze] * layers
    return [own.group.freeze for begin, end, own in rule.parts for _ in range(begin, end)]


def trained(rule: Rule | ByLayer) -> bool | SomeLayers:
    """Whether a parameter is trained, or which of its layers are."""
    if isinstance(rule, Rule):
        return not rule.group.freeze
    found = tuple(not frozen for frozen in _frozen(rule, 0))
    return SomeLayers(found) if len(set(found)) > 1 else found[0]


def table(traits, rules, growth=None) -> str:
    """A table of the parameters of each rule, one rule per line; given a tree of `Growth`, with muP's factors."""
    mup = ("muP", "rate", "initial") if growth is not None else ()
    rows = [("group", "learning rate", *mup, "weight decay", "tensors", "parameters")]
    leaves = list(zip(jax.tree.leaves(traits), jax.tree.leaves(rules), strict=True))
    kinds = [(leaf.kind, f"x {leaf.initial:.3g}") for leaf in jax.tree.leaves(growth)] if mup else [()] * len(leaves)
    sizes: dict[Any, list[int]] = {}
    for (leaf, own), kind in zip(leaves, kinds, strict=True):
        for rule, shape in parts_of(own, leaf.shape):
            # Layers that differ in their factor only, or in when they were first trained, share a line.
            key = dataclasses.replace(rule, layer_factor=1.0, since=0), kind
            sizes.setdefault(key, []).append(math.prod(shape))
    decays = {(rule.index, rule.weight_decay > 0) for rule, _ in sizes}
    for (rule, kind), taken in sizes.items():
        group = rule.group
        schedule = type(group.schedule).__name__ if group.schedule else "schedule"
        layered = "" if group.layer_decay is None else f"{group.layer_decay:g}^(L - layer) x "
        rate = "frozen" if group.freeze else f"{group.learning_rate:g} x {layered}{schedule}"
        decay = "-" if group.freeze else f"{rule.weight_decay:g}"
        if kind:
            kind = (kind[0], "-" if group.freeze else f"x {rule.width_factor:.3g}", kind[1])
        name = "(not trained)" if group is CONSTANTS else group.name
        if {(rule.index, True), (rule.index, False)} <= decays:  # a group with parameters of both kinds has two rows
            name += ", decayed" if rule.weight_decay else ", not decayed"
        rows.append((name, rate, *kind, decay, f"{len(taken):,}", f"{sum(taken):,}"))
    return aligned(rows, texts=3 if mup else 2)
