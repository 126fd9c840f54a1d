"""Parameters: their names, and their static properties from the metadata of each `nnx.Variable`.

| metadata | meaning | default |
|---|---|---|
| `axes` | logical axes, which decide its sharding (`sharding.RULES`); None for an axis that is not split | a matrix is split along its second to last axis, as "width" |
| `decays` | whether it takes weight decay | true for two axes or more, except in an `nnx.Embed` |
| `linear` | whether its last two axes are the inputs and outputs of a linear map, which muP and the counts of FLOPs read | true for a variable that is called `kernel`, as in Flax |
| `layers` | the numbers of the layers in their stack: of each element of the first axis, or one number | none |
| `updatable` | whether its module can apply a low-rank update by itself (`nn/low_rank.py`), as an `nn.Linear` does | false |
| `std` | standard deviation of its initial values, if that depends on a width other than its fan-in | |

Only an `nnx.Param` is trained. Other variables are constants: they are saved with the parameters and never change.
"""  # noqa: E501

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polygpt.errors import SpecError

Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class Traits:
    """The static properties of a parameter.

    Attributes:
        shape: its shape.
        axes: a logical name or None for each axis.
        decays: whether it takes weight decay. By default vectors do not, even if stacked.
        trained: whether it may be trained: an `nnx.Param`, unless `model.low_rank` or `model.prefix` freeze it.
        std: standard deviation of its initial values, if that depends on a width other than its fan-in.
        layers: the numbers of its layers, from 0, if it belongs to a stack of layers: those of its first axis, or one.
        depth: number of layers in that stack.
        linear: whether its last two axes are the inputs and outputs of a linear map.
        updatable: whether its module can apply a low-rank update by itself.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    decays: bool
    trained: bool = True
    std: float | None = None
    layers: tuple[int, ...] = ()
    depth: int = 0
    linear: bool = False
    updatable: bool = False


@dataclasses.dataclass(frozen=True)
class SomeLayers:
    """Says that only some layers of a stacked parameter are trained: in place of True, a bool for each layer."""

    trained: tuple[bool, ...]


def without_frozen(parameter: jax.Array, trained: bool | SomeLayers) -> jax.Array:
    """The parameter, of which only what is trained has a gradient."""
    if not isinstance(trained, SomeLayers):
        return parameter if trained else jax.lax.stop_gradient(parameter)
    mask = np.reshape(trained.trained, (-1, *[1] * (parameter.ndim - 1)))
    return jnp.where(mask, parameter, jax.lax.stop_gradient(parameter))


def name_of(path) -> str:
    """The name of a leaf, such as "decoder/blocks/attention/query/kernel", from its JAX key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def paths(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def changed_shape(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The first parameter whose shape differs, with both shapes, "missing" where there is none; None if all agree.

    Both have anything with a `shape` by name.
    """
    for name in before | after:
        shapes = [str(list(given[name].shape)) if name in given else "missing" for given in (before, after)]
        if shapes[0] != shapes[1]:
            return name, *shapes
    return None


def tree_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of leaves by name: the inverse of `paths`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *outer, last = name.split("/")
        inner = tree
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return tree


def stack(make: Callable[[jax.Array], Made], keys: jax.Array, axis: str | None = None) -> Made:
    """Stacks the modules, or tuples of modules, that `make(key)` returns for each key.

    Each variable gets a new first axis with the logical name `axis`. Weight decay depends on the shape before stacking.
    """

    def one(key):
        made = make(key)
        _declare(made)
        for variable in _variables(made):
            variable.set_metadata(axes=(axis, *variable.get_metadata()["axes"]))
        return made

    return nnx.vmap(one)(keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unstacked:
    """A stacked parameter taken apart, in its place in the tree: an array of its own for each layer."""

    layers: tuple[jax.Array, ...]


def unstacked(params: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The tree with all parameters whose names begin with `prefix`, which must be stacked, taken apart."""

    def apart(name, leaf):
        return Unstacked(tuple(leaf)) if name.startswith(prefix) else leaf

    return tree_of({name: apart(name, leaf) for name, leaf in paths(params).items()})


def of_layer(tree: Any, index: int) -> Any:
    """A tree of stacked parameters, taken apart or not, at one index of their first axis."""

    def at(leaf):
        return leaf.layers[index] if isinstance(leaf, Unstacked) else leaf[index]

    return jax.tree.map(at, tree, is_leaf=lambda leaf: isinstance(leaf, Unstacked))


def number_layers(made: Any, layers: Sequence[int], depth: int) -> None:
    """Declares which layers of a stack of `depth` layers the variables of a module hold, see `Traits.layers`."""
    for variable in _variables(made):
        variable.set_metadata(layers=tuple(layers), depth=depth)


def traits(module: nnx.Module) -> Any:
    """The traits of all variables of a module, as an `nnx.State`. Fills in missing metadata of the module.

    Raises:
        SpecError: for a variable with fewer axes than names, or one that holds the state of a random stream.
    """
    _declare(module)

    def of(path, variable: nnx.Variable) -> Traits:
        metadata, rank = variable.get_metadata(), len(variable.shape)
        if isinstance(variable, nnx.RngState):
            raise SpecError(
                f"{name_of(path)} holds the state of a random stream, as nnx.Dropout(rngs=...) does: modules get a key "
                "with each call; pass it to polygpt.nn.dropout, or use nnx.Dropout without rngs"
            )
        axes = metadata["axes"]
        if len(axes) > rank:
            raise SpecError(f"{name_of(path)} has {rank} axes but names {len(axes)}: {axes}")
        axes = (*[None] * (rank - len(axes)), *axes)  # stacked by a plain nnx.vmap, which adds no names
        trained = isinstance(variable, nnx.Param)
        given = variable.shape, axes, metadata["decays"] and trained, trained, metadata.get("std")
        given += metadata.get("layers", ()), metadata.get("depth", 0), metadata["linear"]
        return Traits(*given, updatable=metadata.get("updatable", False))

    return jax.tree_util.tree_map_with_path(of, nnx.state(module), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


@contextlib.contextmanager
def merged(graphdef: Any, variables: Any) -> Iterator[Any]:
    """The module with the given static part and variables, for one forward pass.

    Raises:
        SpecError: if the pass changed a constant, because a training step would lose the change.
    """
    module = nnx.merge(graphdef, variables)
    before = _constants(module)
    yield module
    after = _constants(module)
    for name, value in before.items():
        if after[name] is not value:
            raise SpecError(
                f"the forward pass changes {name}, which is not an nnx.Param, but a training step keeps only what the "
                "optimizer changes: leave it unchanged, for example with use_running_average=True, or use a norm of "
                "polygpt.nn.norms"
            )


def _constants(module: Any) -> dict[str, jax.Array]:
    return paths(nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Param))))


def _variables(made: Any) -> list[nnx.Variable]:
    return [node for _, node in nnx.iter_graph(made) if isinstance(node, nnx.Variable)]


def _declare(made: Any) -> None:
    """Fills in the default metadata of every variable."""
    tables = {id(node.embedding) for _, node in nnx.iter_graph(made) if isinstance(node, nnx.Embed)}
    for path, variable in nnx.iter_graph(made):
        if not isinstance(variable, nnx.Variable):
            continue
        metadata, rank = variable.get_metadata(), len(variable.shape)
        if metadata.get("linear") is None:
            variable.set_metadata(linear=rank > 1 and path[-1] == "kernel")
        if metadata.get("axes") is None:
            variable.set_metadata(axes=(*[None] * (rank - 2), "width", None) if rank > 1 else (None,) * rank)
        if metadata.get("decays") is None:
            variable.set_metadata(decays=rank > 1 and id(variable) not in tables)
