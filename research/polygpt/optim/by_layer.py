"""Different update rules for the layers of stacked parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from polygpt.optim.groups import ByLayer, Rule


def partition(rules: Any, transforms: Mapping[Rule, optax.GradientTransformation]) -> optax.GradientTransformation:
    """Applies to each parameter the transformation of its rule, and to each range of layers that of its own.

    A range of layers of a stacked parameter [L, ...] is treated as a parameter of its own. Its state is like that of a
    parameter; the k-th ranges of all parameters are in the k-th part of the state.

    Args:
        rules: a tree of `Rule` and `ByLayer` like the parameters.
        transforms: by rule.
    """
    number = labels(rules)
    parts = max(_count(rule) for rule in jax.tree.leaves(rules))

    def part(k: int) -> optax.GradientTransformation:
        chosen = jax.tree.map(lambda rule: _at(rule, k, lambda begin, end, own: number[own], number.get), rules)
        present = set(jax.tree.leaves(chosen))
        return optax.partition({number[own]: transforms[own] for own in number if number[own] in present}, chosen)

    whole = [part(k) for k in range(parts)]
    if parts == 1:
        return whole[0]

    def split(tree: Any, k: int) -> Any:
        def of(rule, x):
            return _at(rule, k, lambda begin, end, own: x[begin:end], lambda own: x)

        return jax.tree.map(of, rules, tree)

    def join(rule, *updates):
        return updates[0] if isinstance(rule, Rule) else jnp.concatenate(updates[: len(rule.parts)])

    def init(params):
        return tuple(one.init(split(params, k)) for k, one in enumerate(whole))

    def update(updates, state, params=None):
        done = [
            one.update(split(updates, k), state[k], None if params is None else split(params, k))
            for k, one in enumerate(whole)
        ]
        return jax.tree.map(join, rules, *(found for found, _ in done)), tuple(after for _, after in done)

    return optax.GradientTransformation(init, update)


def labels(rules: Any) -> dict[Rule, str]:
    """The label of each rule in the state. Numbers keep names short and need no order among rules."""
    found = dict.fromkeys(own for rule in jax.tree.leaves(rules) for _, _, own in ranges(rule))
    return {rule: str(i) for i, rule in enumerate(found)}


def ranges(rule: Rule | ByLayer) -> tuple[tuple[int | None, int | None, Rule], ...]:
    """(begin, end, rule) of each range of layers; (None, None, rule) for a parameter with one rule."""
    return ((None, None, rule),) if isinstance(rule, Rule) else rule.parts


def _count(rule: Rule | ByLayer) -> int:
    return len(ranges(rule))


def _at(rule: Rule | ByLayer, k: int, of_range, of_whole) -> Any:
    """What belongs to the k-th range of layers of a parameter; an empty node if there is none."""
    if k >= _count(rule):
        return optax.MaskedNode()
    return of_whole(rule) if isinstance(rule, Rule) else of_range(*rule.parts[k])
