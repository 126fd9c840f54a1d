"""The loss of a training step: weighted objectives as a pure function of parameters and batch, with its gradient."""

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from polygpt.objectives.base import BatchObjective, Objective, TokenObjective, depends_on_scores_only
from polygpt.objectives.blocked import Block, token_losses
from polygpt.objectives.forward import Forward
from polygpt.objectives.view import View
from polygpt.parameters import without_frozen
from polygpt.sequence import Batch
from polygpt.spec import to_json

Identity = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """The weighted sum of objectives. All means are over the global batch.

    Attributes:
        model: the trained model, see `Forward`.
        objectives: by name, each with its weight.
        trainable: a tree of bools, or of `SomeLayers`, with the structure of the parameters.
        accumulate: number of microbatches; must divide the number of rows.
        logits_block: number of positions whose logits exist at a time, "auto", or None for all.
        references: models that are not trained, by name.
    """

    model: Any
    objectives: Mapping[str, tuple[Objective, float]]
    trainable: Any
    accumulate: int = 1
    logits_block: Block = None
    references: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def views(self) -> tuple[View | None, ...]:
        """The different views of the objectives."""
        return tuple(dict.fromkeys(objective.view for objective, _ in self.objectives.values()))

    def blocked(self, view: View | None, forward: Forward) -> dict[str, TokenObjective]:
        """The objectives of a view that are computed without the logits of the whole batch."""
        if forward.block is None:
            return {}
        found = {name: objective for name, (objective, _) in self.objectives.items() if objective.view == view}
        return {name: objective for name, objective in found.items() if depends_on_scores_only(objective)}

    def captures(self, view: View | None) -> dict[str, tuple[str, ...]]:
        """The sites that objectives of a view read, by the name of the model."""
        read = [objective.captures for objective, _ in self.objectives.values() if objective.view == view]
        names = dict.fromkeys(name for one in read for name in one)
        return {name: tuple(dict.fromkeys(site for one in read for site in one.get(name, ()))) for name in names}

    def seen(self, batch: Batch, key: jax.Array, first_row: jax.Array | int = 0) -> tuple[Batch, ...]:
        """The batch of each view. `first_row` is the index in the global batch of the first row."""
        rows_B = first_row + jnp.arange(batch.shape[0])

        def derived(view):
            if view is None:
                return batch
            own = jax.random.fold_in(key, zlib.crc32(json.dumps(to_json(view)).encode()))
            return view(batch, jax.vmap(lambda row: jax.random.fold_in(own, row))(rows_B))

        return tuple(map(derived, self.views))

    def weights(self, seen: tuple[Batch, ...]) -> dict[str, jax.Array]:
        """The weight of each objective in these batches."""
        by_view = dict(zip(self.views, seen, strict=True))
        return {name: objective.weight(by_view[objective.view]) for name, (objective, _) in self.objectives.items()}

    def value(self, means: Mapping[str, jax.Array]) -> jax.Array:
        """The loss, given the mean of each objective."""
        return sum(weight * means[name] for name, (_, weight) in self.objectives.items())

    def gradient(
        self,
        params: Any,
        others: Mapping[str, Any],
        seen: tuple[Batch, ...],
        weights: Mapping[str, jax.Array],
        key: jax.Array | None,
        gather: Identity = lambda tree: tree,
        shards: jax.Array | int = 1,
    ) -> tuple[dict[str, jax.Array], Any]:
        """This shard's part of the means of all objectives and of the gradient; sum both over the shards.

        Args:
            params: the parameters.
            others: parameters of the models that are not trained, by name.
            seen: this shard's rows, from `seen`.
            weights: the sum of `weights` over all shards.
            key: for dropout; None for none.
            gather: joins the rows of all shards; the identity where one program sees the whole batch.
            shards: number of shards.
        """

        leaves, structure = jax.tree.flatten(params)
        trainable = jax.tree.leaves(self.trainable)
        # Frozen parameters take no part, so that no sum over microbatches holds zeros for them.
        trained = [leaf if train else None for leaf, train in zip(leaves, trainable, strict=True)]

        def loss(trained, seen, index, cotangents=None):
            """(value, means); with `cotangents`, only the gradient is right for a `BatchObjective`."""
            given = [without_frozen(*pair) for pair in zip(_filled(trained, leaves), trainable, strict=True)]
            params = structure.unflatten(given)
            here = self._forwards(params, others, seen, key, index)
            value, found = 0.0, {}
            for view, forward in here.items():
                own, means = self._blocked(forward, self.blocked(view, forward), weights)
                value, found = value + own, found | means
            for name, (objective, weight) in self.objectives.items():
                if name in found:
                    continue
                forward = here[objective.view]
                if not isinstance(objective, BatchObjective):
                    total = objective.total(forward, forward.batch)
                elif cotangents is None:
                    total = objective.compare(gather(objective.embed(forward, forward.batch))) / shards
                else:
                    products = jax.tree.map(jnp.vdot, objective.embed(forward, forward.batch), cotangents[name])
                    total = sum(jax.tree.leaves(products))
                found[name] = total / _divisor(weights[name])
                value += weight * found[name]
            return value, found

        def part(given, index):
            found = jax.grad(loss, has_aux=True, allow_int=True)(trained, given[0], index, *given[1:])
            return found[1], jax.tree.map(_without_float0, found[0])

        def completed(means, gradient):
            return means, structure.unflatten(_filled(gradient, list(map(_no_gradient, leaves))))

        if self.accumulate == 1:
            return completed(*part((seen,), 0))
        whole = {name: o for name, (o, _) in self.objectives.items() if isinstance(o, BatchObjective)}
        if not whole:
            return completed(*sum_over_microbatches(part, (seen,), self.accumulate))
        known, cotangents = self._compared(whole, params, others, seen, key, gather, shards)
        found, gradient = sum_over_microbatches(part, (seen, cotangents), self.accumulate)
        return completed(found | {name: known[name] / _divisor(weights[name]) for name in whole}, gradient)

    def _forwards(self, params, others, seen, key, index) -> dict[View | None, Forward]:
        key = None if key is None else jax.random.fold_in(key, index)
        given = {name: (self.references.get(name, self.model), own) for name, own in others.items()}
        pairs = zip(self.views, seen, strict=True)
        static = {"logits_block": self.logits_block, "trainable": self.trainable}
        return {
            view: Forward(self.model, params, batch, key, given, **static, captures=self.captures(view))
            for view, batch in pairs
        }

    def _blocked(self, forward, objectives, weights) -> tuple[jax.Array | float, dict[str, jax.Array]]:
        """The part of the loss of these objectives, and their means, which have no gradient."""
        if not objectives:
            return 0.0, {}
        shares = {name: self.objectives[name][1] / _divisor(weights[name]) for name in objectives}
        given = forward.hidden_BTD, forward.output_head, forward.batch, forward.block
        value, totals = token_losses(objectives, shares, *given)
        return value, {name: total / _divisor(weights[name]) for name, total in totals.items()}

    def _compared(self, whole, params, others, seen, key, gather, shards):
        """The totals of the objectives of the whole batch, and their gradients with respect to what they compare."""

        def embedded(given):
            seen, index = given
            here = self._forwards(params, others, seen, key, index)
            return {name: o.embed(here[o.view], here[o.view].batch) for name, o in whole.items()}

        found = jax.lax.map(embedded, (_split(seen, self.accumulate), jnp.arange(self.accumulate)))
        rows = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), found)

        def compared(rows):
            totals = {name: o.compare(gather(rows[name])) / shards for name, o in whole.items()}
            return sum(totals.values()), totals

        cotangents, totals = jax.grad(compared, has_aux=True)(rows)
        return totals, cotangents


def sum_over_microbatches(function: Callable, rows: Any, parts: int):
    """The sum of `function(microbatch, index)`, a tree, over `parts` equal parts of the rows, taken one at a time.

    `rows` is a tree of arrays [B, ...].
    """
    split = _split(rows, parts)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(*part)), None

    first = jax.tree.map(lambda x: x[0], split)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first, 0))
    return jax.lax.scan(add, zeros, (split, jnp.arange(parts)))[0]


def _split(rows: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...]: every parts-th row, not a run of them, so that rows stay on their device."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), rows)


def _filled(leaves: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The leaves, with those of `others` in the place of None."""
    return [other if leaf is None else leaf for leaf, other in zip(leaves, others, strict=True)]


def _divisor(weight: jax.Array) -> jax.Array:
    return jnp.where(weight > 0, weight, 1.0)


def _no_gradient(leaf: jax.Array) -> jax.Array:
    """Zeros like a parameter; in float32 for whole numbers."""
    return jnp.zeros(leaf.shape, leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.float32)


def _without_float0(gradient: jax.Array) -> jax.Array:
    """A gradient; that of whole numbers, which have none, as zeros."""
    return jnp.zeros(gradient.shape) if gradient.dtype == jax.dtypes.float0 else gradient
