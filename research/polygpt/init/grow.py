"""Parameters of a smaller run: more layers, and wider hidden layers of MLPs."""

import dataclasses
import re
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from polygpt.errors import UserError
from polygpt.init.base import Source
from polygpt.init.from_run import FromRun
from polygpt.parameters import Traits, paths, tree_of

LAST = re.compile(r"/(output|down)/(kernel|bias)$|_output_norm/bias$")
"""The last parameters of a residual branch: if they are 0, so is the branch."""


@dataclasses.dataclass(frozen=True)
class Grow(FromRun):
    """The parameters of a run whose model has fewer layers, or narrower hidden layers of its MLPs.

    Wider: Net2WiderNet (Chen et al., 1511.05641, section 2.2). New hidden units are copies of random ones, and what
    leaves a unit is divided among its copies. The shares are drawn at random, so that copies get different gradients
    without added noise. The model computes the same as before.

    Deeper: the layers of a scanned stack, by `depth`. "identity" computes the same as before, "stack" does not.
    Other axes, such as the model width, do not grow.
    """

    depth: Literal["identity", "stack"] = "identity"
    """Where new layers come from. identity: spread evenly among the others, copies of the one below with output
    projections of 0 (LLaMA Pro, 2401.02415, section 3.2); needs pre-norm. stack: the whole stack repeated, G_stack of
    Du et al. (2405.15319), section 3.1: layer l is the former layer l mod L."""
    seed: int = 0
    """Seed of the units that are copied and of their shares."""

    def fit(self, source: Source, taken: Mapping[str, str], traits: Mapping[str, Traits]) -> Source:
        found = {theirs: self._growth(ours, traits[ours], theirs, source) for ours, theirs in taken.items()}
        found = {name: growth for name, growth in found.items() if growth is not None}
        if self.depth == "identity":
            deeper = [name.partition("/blocks/")[0] for name, growth in found.items() if growth.layers is not None]
            for stack in dict.fromkeys(deeper):
                self._require_identity(stack, [name for name in found if name.startswith(f"{stack}/blocks/")])
        return _Grown(source, found) if found else source

    def _growth(self, ours: str, own: Traits, theirs: str, source: Source) -> "_Growth | None":
        """How a parameter grows; None if it has the same shape, or another number of axes."""
        before, after = tuple(source.shapes[theirs].shape), tuple(own.shape)
        if before == after or len(before) != len(after):
            return None
        where = f"init: {theirs} of {source.origin} is {list(before)}, and {ours} is {list(after)} in this model"
        if any(small > large for small, large in zip(before, after, strict=True)):
            raise UserError(f"{where}: nothing shrinks: give the model at least the size of the run's")
        layers, zero, copied, shares, axis = None, None, None, None, None
        for i, (small, large) in enumerate(zip(before, after, strict=True)):
            if small == large:
                continue
            if i == 0 and len(own.layers) > 1:
                layers, zero = self._layers(small, large, theirs)
            elif own.axes[i] == "hidden" and i >= len(after) - 2:
                axis = i - len(after)
                copied, shares = self._units(theirs, small, large)
            else:
                axis_name = own.axes[i] or f"axis {i}"
                raise UserError(
                    f"{where}: only scanned layers and the hidden layers of MLPs grow, not {axis_name}: keep it, or "
                    "leave the parameter random with init.exclude"
                )
        leaving = axis == -2 and own.linear
        return _Growth(after, layers, zero, axis, copied, shares if leaving else None)

    def _layers(self, before: int, after: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The former layer of each layer, and which are 0, among those that are the same in each period of a stack."""
        if self.depth == "stack":
            return np.arange(after) % before, np.zeros(after, bool)
        former = np.arange(after) * before // after
        new = np.diff(former, prepend=-1) == 0
        return former, new & bool(LAST.search(name))

    def _units(self, name: str, before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
        """The former unit of each unit of an MLP, and the share of it that the copy has."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.rsplit("/", 2)[0].encode())])  # the same for the MLP
        copied = np.concatenate([np.arange(before), rng.integers(0, before, after - before)])
        parts = rng.uniform(0.5, 1.5, after)
        return copied, (parts / np.bincount(copied, parts)[copied]).astype(np.float32)

    def _require_identity(self, stack: str, names: list[str]) -> None:
        """Raises UserError if new blocks of a stack would not compute the identity."""
        spec: Any = self._config()["model"]
        for part in stack.split("/"):
            spec = spec.get(part, {}) if isinstance(spec, Mapping) else {}
        remedy = "set init.depth to stack"
        if isinstance(spec, Mapping) and spec.get("norm_placement", "pre") != "pre":
            raise UserError(f"init.depth is identity, but the blocks of {stack} are post-norm: {remedy}")
        for branch in ("attention", "cross", "mlp"):
            own = [name for name in names if f"/{branch}/" in name]
            if own and not any(LAST.search(name) for name in own):
                raise UserError(f"init.depth is identity, but {own[0]} has no output projection beside it: {remedy}")


@dataclasses.dataclass(frozen=True)
class _Growth:
    """How a parameter grows.

    Attributes:
        shape: its new shape.
        layers: the former layer of each layer, or None.
        zero: which layers are 0.
        axis: the axis of hidden units, from the end, or None.
        copied: the former unit of each unit.
        shares: factors of the units, or None for 1.
    """

    shape: tuple[int, ...]
    layers: np.ndarray | None
    zero: np.ndarray | None
    axis: int | None
    copied: np.ndarray | None
    shares: np.ndarray | None

    def __call__(self, value: jax.Array) -> jax.Array:
        if self.axis is not None:
            value = jnp.take(value, self.copied, axis=self.axis)
            if self.shares is not None:
                value = value * self.shares.reshape(*[1] * (value.ndim - 2), -1, 1)  # a kernel [..., hidden, width]
        if self.layers is not None:
            value = jnp.take(value, self.layers, axis=0)
            value = jnp.where(self.zero.reshape(-1, *[1] * (value.ndim - 1)), 0, value)
        return value


@dataclasses.dataclass(frozen=True)
class _Grown:
    """A `Source` with some parameters of another grown."""

    source: Source
    growth: Mapping[str, _Growth]

    @property
    def origin(self) -> str:
        return f"{self.source.origin}, grown"

    @property
    def tokenizer(self) -> Any:
        return self.source.tokenizer

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = dict(self.source.shapes)
        return shapes | {name: jax.ShapeDtypeStruct(one.shape, shapes[name].dtype) for name, one in self.growth.items()}

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, jax.Array]:
        def small(name, like):
            if name not in self.growth:
                return like
            place = like.sharding
            place = NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place
            return jax.ShapeDtypeStruct(self.source.shapes[name].shape, like.dtype, sharding=place)

        found = self.source.read({name: small(name, like) for name, like in wanted.items()})
        growing = {name: found[name] for name in self.growth if name in wanted}
        if not growing:
            return found

        def grow(tree):
            return tree_of({name: self.growth[name](value) for name, value in paths(tree).items()})

        places = tree_of({name: wanted[name].sharding for name in growing})
        return {**found, **paths(jax.jit(grow, out_shardings=places)(tree_of(growing)))}
