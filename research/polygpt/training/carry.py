"""Carries the training state from one phase of a run to the next: moments follow their parameters by name."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey, keystr

from polygpt.errors import SpecError
from polygpt.optim.by_layer import labels, ranges
from polygpt.parameters import paths
from polygpt.training.program import Program
from polygpt.training.seeds import AXES
from polygpt.training.state import State


def carry(before: Program, after: Program, state: State) -> State:
    """The state at the end of a phase as the state with which the next one begins; pure.

    Parameters, moving average and counts are unchanged. Each moment follows its parameter, or its layers, whatever
    group they are in now. What was frozen and no longer is has fresh moments, with a bias correction of its own.
    Recent losses no longer count for spikes if data, model or objectives changed.

    Raises:
        SpecError: if the optimizer needs a moment that the earlier one lacks.
    """
    one = _carried
    if after.seeds:
        return jax.vmap(lambda state: one(before, after, state), in_axes=(AXES,), out_axes=AXES)(state)
    return one(before, after, state)


def _carried(before: Program, after: Program, state: State) -> State:
    known, fresh = _Kept(before, state.opt_state), after.transformation.init(state.params)
    place = _Places(after)

    def of(path, leaf):
        found = place(path)
        new = found.since is not None and after.start_step > 0 and found.since == after.start_step
        return leaf if new else known(found, leaf)

    def counted(one):  # schedules count the updates of the run, not those of a parameter
        count = (state.step - state.skipped).astype(one.count.dtype)
        return optax.ScaleByScheduleState(jnp.broadcast_to(count, one.count.shape))

    def is_schedule(one):
        return isinstance(one, optax.ScaleByScheduleState)

    opt_state = jax.tree_util.tree_map_with_path(of, fresh)
    opt_state = jax.tree.map(lambda one: counted(one) if is_schedule(one) else one, opt_state, is_leaf=is_schedule)
    window, (one, other) = state.window, (before.experiment, after.experiment)
    same = one.replace(optim=other.optim) == other
    if window is not None and not same:
        window = dataclasses.replace(window, entered=jnp.zeros_like(window.entered))
    return dataclasses.replace(state, opt_state=opt_state, window=window)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a leaf of an optimizer's state belongs.

    Attributes:
        own: its path inside the state of its optimizer.
        name: its parameter; None for a count that the parameters of a rule share.
        begin, end: the layers of its parameter; None for all.
        since: `Rule.since` of its rule; None outside of rules.
    """

    own: str
    name: str | None = None
    begin: int | None = None
    end: int | None = None
    since: int | None = None


class _Places:
    """Finds the place of a leaf by its path."""

    def __init__(self, program: Program):
        self._rules = paths(program.rules)
        self._labels = {label: rule for rule, label in labels(program.rules).items()}

    def __call__(self, path) -> _Place:
        at = next((i for i, entry in enumerate(path) if entry == GetAttrKey("inner_states")), None)
        if at is None:
            return _Place(keystr(path))
        part = path[at - 1].idx if at > 1 and isinstance(path[at - 1], SequenceKey) else 0
        rule, own = self._labels[path[at + 1].key], path[at + 2 :]
        for i in range(len(own)):
            if all(isinstance(entry, DictKey) for entry in own[i:]):
                name = keystr(own[i:], simple=True, separator="/")
                if name in self._rules:
                    begin, end, _ = ranges(self._rules[name])[part]
                    return _Place(keystr(own[:i]), name, begin, end, rule.since)
        return _Place(keystr(own), since=rule.since)


class _Kept:
    """The leaves of an optimizer's state by their places."""

    def __init__(self, program: Program, opt_state: Any):
        place = _Places(program)
        self._parts: dict[tuple[str, str | None], list[tuple[_Place, jax.Array]]] = {}
        for path, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
            found = place(path)
            self._parts.setdefault((found.own, found.name), []).append((found, leaf))

    def __call__(self, place: _Place, like: jax.Array) -> jax.Array:
        """The value at a place. `like` has its shape."""
        found = self._parts.get((place.own, place.name), [])
        if place.name is None:
            same = [leaf for other, leaf in found if other.since == place.since]
            return same[0] if same else self._missing(place)
        held = [(other, leaf) for other, leaf in found if _overlap(other, place)]
        if len(held) == 1 and held[0][1].shape == like.shape:
            return held[0][1]
        whole = [_layers(other, leaf, place) for other, leaf in held]
        if whole and all(part is not None for part in whole) and sum(map(len, whole)) == len(like):
            return jnp.concatenate(whole)
        # What an optimizer does not keep for this parameter, such as a moment that it factors, has a placeholder.
        return held[0][1] if held and held[0][1].shape == like.shape else self._missing(place)

    def _missing(self, place: _Place):
        raise SpecError(
            f"optim.optimizer: the phase before has no {place.own} of {place.name}: keep the optimizer and its groups"
        )


def _overlap(one: _Place, other: _Place) -> bool:
    if one.begin is None or other.begin is None:
        return True
    return max(one.begin, other.begin) < min(one.end, other.end)


def _layers(held: _Place, leaf: jax.Array, wanted: _Place) -> jax.Array | None:
    """The layers of a leaf that are wanted; None if it has none, like a moment that is not kept."""
    first = held.begin or 0
    if not leaf.ndim or held.end is not None and len(leaf) != held.end - held.begin:
        return None
    begin = max(wanted.begin or 0, first) - first
    return leaf[begin : len(leaf) if wanted.end is None else wanted.end - first]
