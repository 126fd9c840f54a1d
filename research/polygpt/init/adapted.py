"""A run with an adapter that was trained on it, as a source of parameters."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from polygpt.errors import UserError
from polygpt.init.base import Source
from polygpt.models.adapter_file import AdapterFile, merged_from, placed
from polygpt.models.low_rank import LowRank, matrix_of
from polygpt.parameters import paths, tree_of
from polygpt.spec import from_json


@dataclasses.dataclass(frozen=True)
class _Adapted:
    """A `Source`: parameters of the adapter where it has any, of its base elsewhere. Low-rank updates are merged.

    Attributes:
        base: the source of its base.
        adapter: the adapter.
        file: its file, for messages.
        added: its low-rank updates, or None.
        merged_from: what the matrices that have been read were merged from, see `adapter_file.merged_from`.
    """

    origin: str
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    tokenizer: Any
    base: Source
    adapter: AdapterFile
    file: str
    added: LowRank | None
    merged_from: dict[str, int] = dataclasses.field(default_factory=dict)

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, jax.Array]:
        given = self.adapter.params
        found = dict(self.base.read({name: like for name, like in wanted.items() if name not in given}))
        known = getattr(self.base, "merged_from", {})
        if fault := self.adapter.other_weights(found, known):
            raise UserError(_fault(self.file, self.base, fault))
        for name, value in given.items():
            matrix = matrix_of(name)
            if name in wanted:
                found[name] = placed(value, wanted[name].sharding)
            elif matrix in wanted:
                found[name] = placed(value, whole(wanted[matrix].sharding))
        self.merged_from.update(merged_from(tree_of(found), self.added, known))
        if self.added is None or not any(map(matrix_of, found)):
            return found
        places = tree_of({name: like.sharding for name, like in wanted.items()})
        return paths(jax.jit(self.added.merged, out_shardings=places)(tree_of(found)))


def adapted(base: Source, file: str) -> Source:
    """A source with the parameters of an adapter, and of `base` those that it was trained on.

    Raises:
        UserError: the file is damaged, or its adapter was trained on another base; that its weights differ is found
            when they are read.
    """
    adapter = AdapterFile.read(Path(file))
    if fault := adapter.other_shape(base.shapes):
        raise UserError(_fault(file, base, fault))
    own = {name: value for name, value in adapter.params.items() if not matrix_of(name)}
    shapes = {name: shape for name, shape in base.shapes.items() if name in adapter.base}
    shapes |= {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in own.items()}
    added = adapter.model["low_rank"] and from_json(adapter.model["low_rank"])
    return _Adapted(f"{base.origin} with {file}", shapes, adapter.tokenizer, base, adapter, file, added)


def _fault(file: str, base: Source, fault: str) -> str:
    return (
        f"init.adapter: {file} does not fit {base.origin}: {fault}: set init.path and init.checkpoint to its own base"
    )


def whole(place: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The placement of a whole copy on each of the same devices."""
    return NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place
