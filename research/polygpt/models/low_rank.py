"""Low-rank updates: fine-tune a model by training two thin matrices beside each of its large ones, which are frozen."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from polygpt.errors import SpecError
from polygpt.nn.low_rank import LowRankMatrix
from polygpt.parameters import Traits, paths, tree_of
from polygpt.spec import Spec, check_pattern

KEY = "low_rank"
"""Where the added parameters are in the tree: "low_rank/decoder/blocks/attention/query/kernel/down"."""


def matrix_of(name: str) -> str | None:
    """The matrix that an added parameter updates, by name; None for any other parameter."""
    return name.removeprefix(f"{KEY}/").rpartition("/")[0] if name.startswith(f"{KEY}/") else None


@dataclasses.dataclass(frozen=True)
class LowRank(Spec):
    """Trains W + scale * down @ up instead of W: LoRA (Hu et al., 2106.09685, section 4.1).

    All other parameters are frozen, except those in `also`. At first `up` is 0, so the model is the one before. A
    `nn.Linear` computes x @ W + scale * (x @ down) @ up, so that neither merged matrices nor gradients of frozen ones
    exist. Matrices of other modules are merged in each pass.
    """

    pattern: str
    """Regular expression, searched in the names of parameters: matrices that get an update. Vectors and embeddings that
    match do not."""
    rank: int = 8
    """Rank of the update."""
    alpha: float = 16.0
    """The scale of an update is alpha / rank."""
    rank_stabilized: bool = False
    """Whether the scale is alpha / sqrt(rank) instead, so that high ranks learn as fast: rsLoRA (2312.03732)."""
    magnitude: bool = False
    """Whether to train the length of each column of W apart from its direction: DoRA (2402.09353, section 4)."""
    also: str | None = None
    """Regular expression: further parameters to train in full, such as those of a new adapter; null for none."""

    def validate(self):
        check_pattern(self, "pattern")
        check_pattern(self, "also")
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(self.alpha > 0, "alpha", "greater than 0")

    @property
    def scale(self) -> float:
        """Factor on an update."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def matrices(self, traits: Mapping[str, Traits]) -> dict[str, Traits]:
        """The matrices that get an update, by name.

        Raises:
            SpecError: if there are none.
        """
        matrices = {name: own for name, own in traits.items() if own.decays and len(own.shape) > 1}
        found = {name: own for name, own in matrices.items() if re.search(self.pattern, name)}
        if not found:
            like = next(iter(matrices))
            raise SpecError(f"model.low_rank.pattern {self.pattern!r} matches no matrix: names are like {like}")
        return found

    def traits(self, traits: Mapping[str, Traits]) -> dict[str, Traits]:
        """The traits of all parameters by name, given those of the model without updates.

        Raises:
            SpecError: if `pattern` matches no matrix, or `also` no parameter.
        """
        names = [name for name, own in traits.items() if own.trained]
        if self.also is not None and not any(re.search(self.also, name) for name in names):
            raise SpecError(f"model.low_rank.also {self.also!r} matches no parameter: names are like {names[0]}")
        trained = {
            name: dataclasses.replace(
                own, trained=own.trained and self.also is not None and bool(re.search(self.also, name))
            )
            for name, own in traits.items()
        }
        return trained | self.added(traits)

    def added(self, traits: Mapping[str, Traits]) -> dict[str, Traits]:
        """The traits of the added parameters by name. Raises SpecError if `pattern` matches no matrix."""
        added = {}
        for name, own in self.matrices(traits).items():
            (*outer, inputs, outputs), (*names, axis, other) = own.shape, own.axes
            place = {"layers": own.layers, "depth": own.depth}
            down, up = (*outer, inputs, self.rank), (*outer, self.rank, outputs)
            added[f"{KEY}/{name}/down"] = Traits(down, (*names, axis, None), decays=True, **place)
            added[f"{KEY}/{name}/up"] = Traits(up, (*names, None, other), decays=True, **place)
            if self.magnitude:
                added[f"{KEY}/{name}/magnitude"] = Traits((*outer, outputs), (*names, other), decays=False, **place)
        return added

    def initial(self, key: jax.Array, traits: Mapping[str, Traits]) -> dict[str, Any]:
        """Initial values of the added parameters, a tree: `down` is normal with variance 1 / inputs, the rest is 0."""
        values = {}
        for number, (name, own) in enumerate(self.added(traits).items(), start=len(traits)):
            if name.endswith("/down"):
                normal = jax.random.normal(jax.random.fold_in(key, number), own.shape)
                values[name] = normal * own.shape[-2] ** -0.5
            else:
                values[name] = jnp.zeros(own.shape)
        return tree_of(values)

    def applied(self, params: Mapping[str, Any], traits: Mapping[str, Traits]) -> dict[str, Any]:
        """The parameters of the model without updates, as the updated model computes with them.

        In the place of a matrix of a `nn.Linear` is a `LowRankMatrix`, which needs no memory for the sum; others are
        merged.
        """
        updated = self._updated(params)
        own = {name: matrix if traits[name].updatable else matrix.merged() for name, matrix in updated.items()}
        return tree_of(paths(_without(params)) | own)

    def merged(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of the model without updates that computes the same; accumulated in float32."""
        updated = self._updated(params)
        return tree_of(paths(_without(params)) | {name: matrix.merged() for name, matrix in updated.items()})

    def _updated(self, params: Mapping[str, Any]) -> dict[str, LowRankMatrix]:
        """The matrices that have an update, by name."""
        values, updates = paths(_without(params)), paths(params[KEY])
        names = dict.fromkeys(name.rpartition("/")[0] for name in updates)  # the same order in every process
        return {
            name: LowRankMatrix(
                values[name],
                updates[f"{name}/down"],
                updates[f"{name}/up"],
                updates.get(f"{name}/magnitude"),
                self.scale,
            )
            for name in names
        }


def _without(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the model without updates."""
    return {name: value for name, value in params.items() if name != KEY}
