"""Parameters: their names, and what each says of itself by the metadata of its `nnx.Variable`.

| metadata | meaning | default |
|---|---|---|
| `axes` | names of its axes, by which they are split over devices (`sharding.RULES`); None for one that is not | a matrix is split along its second to last axis, as "width" |
| `decays` | whether it takes weight decay | true with two axes or more, and not of an `nnx.Embed` |
| `std` | standard deviation of its initial values, where that depends on a width which is not its fan-in | |

Only an `nnx.Param` is trained. Other variables are constants: they are saved and never change.
"""  # noqa: E501

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from polygpt.errors import SpecError

Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class Traits:
    """What is known of a parameter without its values.

    Attributes:
        shape: its shape.
        axes: a name or None for each of its axes.
        decays: whether it takes weight decay. Vectors never do by default, stacked ones neither.
        trained: whether it is an `nnx.Param`; anything else is a constant.
        std: standard deviation of its initial values if it depends on a width that is not its fan-in.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    decays: bool
    trained: bool = True
    std: float | None = None


def name_of(path) -> str:
    """The name of a leaf, "decoder/blocks/attention/query/kernel", from its path as JAX gives it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def paths(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def stack(make: Callable[[jax.Array], Made], keys: jax.Array, axis: str | None = None) -> Made:
    """What `make(key)` gives for every key, a module or a tuple of them, as one: each variable has one more axis.

    The axis comes first and is called `axis`. Whether a parameter decays depends on what it is before it is stacked.
    """

    def one(key):
        made = make(key)
        _declare(made)
        for variable in _variables(made):
            variable.set_metadata(axes=(axis, *variable.get_metadata()["axes"]))
        return made

    return nnx.vmap(one)(keys)


def traits(module: nnx.Module) -> Any:
    """The traits of all variables of a module, an `nnx.State` of them. The module's metadata are completed.

    Raises:
        SpecError: for a variable that has fewer axes than it names, or holds the state of a random stream.
    """
    _declare(module)

    def of(path, variable: nnx.Variable) -> Traits:
        metadata, rank = variable.get_metadata(), len(variable.shape)
        if isinstance(variable, nnx.RngState):
            raise SpecError(
                f"{name_of(path)} holds the state of a random stream, as nnx.Dropout(rngs=...) does: modules are "
                "given a key per call, use polygpt.nn.dropout with it, or nnx.Dropout without rngs"
            )
        axes = metadata["axes"]
        if len(axes) > rank:
            raise SpecError(f"{name_of(path)} has {rank} axes and names {len(axes)}: {axes}")
        axes = (*[None] * (rank - len(axes)), *axes)  # stacked by nnx.vmap alone, which says nothing
        trained = isinstance(variable, nnx.Param)
        return Traits(variable.shape, axes, metadata["decays"] and trained, trained, metadata.get("std"))

    return jax.tree_util.tree_map_with_path(of, nnx.state(module), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _variables(made: Any) -> list[nnx.Variable]:
    return [node for _, node in nnx.iter_graph(made) if isinstance(node, nnx.Variable)]


def _declare(made: Any) -> None:
    """Writes the default metadata of every variable that does not say otherwise."""
    tables = {id(node.embedding) for _, node in nnx.iter_graph(made) if isinstance(node, nnx.Embed)}
    for variable in _variables(made):
        metadata, rank = variable.get_metadata(), len(variable.shape)
        if metadata.get("axes") is None:
            variable.set_metadata(axes=(*[None] * (rank - 2), "width", None) if rank > 1 else (None,) * rank)
        if metadata.get("decays") is None:
            variable.set_metadata(decays=rank > 1 and id(variable) not in tables)
