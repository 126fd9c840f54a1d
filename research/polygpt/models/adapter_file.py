"""Adapters saved alone: what was trained beside the frozen parameters of a base, in a file of its own."""

import dataclasses
import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.data.layout import AS_READ, LayoutSpec
from polygpt.errors import UserError
from polygpt.files import write_atomically
from polygpt.migration import SCHEMA, migrate
from polygpt.models.functional import Model, Params
from polygpt.models.low_rank import LowRank, matrix_of
from polygpt.parameters import changed_shape, paths, tree_of

ABOUT = "adapter.json"
"""The entry of the file that describes the others, JSON as UTF-8 bytes."""


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A parameter of the base.

    Attributes:
        shape: its shape.
        checksum: of its values, see `checksums`.
        merged: of what it was merged from, see `merged_from`; None if it was not merged.
    """

    shape: tuple[int, ...]
    checksum: int
    merged: int | None = None


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """An adapter: the trained parameters of a model whose other parameters are frozen.

    The file is a NumPy archive (.npz, without pickled objects) with an array per trained parameter, under its name in
    the model, such as "low_rank/decoder/blocks/attention/query/kernel/down", and `ABOUT`.

    Attributes:
        model: JSON of the model's specification, with its `low_rank` or `prefix`.
        tokenizer: JSON of the tokenizer.
        layout: what it has learned to read: the fields of its layout that `data.layout.AS_READ` names.
        infill: JSON of the `FillInTheMiddle` by which it has learned to; None if it has not.
        origin: the run that trained it, for messages: "runs/french, step 300".
        base: the frozen parameters, by name.
        params: the trained parameters, by name, float32.
    """

    model: Mapping[str, Any]
    tokenizer: Any
    layout: Mapping[str, str]
    origin: str
    base: Mapping[str, Frozen]
    params: Mapping[str, np.ndarray]
    infill: Any = None

    @classmethod
    def of(
        cls,
        model: Model,
        params: Params,
        spec: Mapping[str, Any],
        tokenizer: Any,
        layout: LayoutSpec,
        origin: str,
        merged: Mapping[str, int],
        infill: Any = None,
    ) -> "AdapterFile":
        """The adapter in the parameters of a trained model, whose specification is `spec` in JSON.

        Args are the attributes; `merged` says what matrices of the base were merged from, by name.

        Raises:
            UserError: if the model has no frozen base.
        """
        if model.spec.low_rank is None and model.spec.prefix is None:
            raise UserError(
                f"{origin} has no adapter: without model.low_rank and model.prefix it trained all parameters"
            )
        traits, values = paths(model.traits), paths(params)
        frozen = {name: value for name, value in values.items() if not traits[name].trained}
        sums = checksums(frozen)
        base = {name: Frozen(tuple(value.shape), sums[name], merged.get(name)) for name, value in frozen.items()}
        read = {name: getattr(layout, name) for name in AS_READ}
        own = {name: np.asarray(values[name]) for name in values.keys() - base}
        return cls(spec, tokenizer, read, origin, base, own, infill)

    def write(self, path: Path) -> None:
        """Writes the file, atomically. Raises UserError if it exists, or cannot be written."""
        require_new(path)
        base = {name: [list(one.shape), one.checksum, one.merged] for name, one in self.base.items()}
        about = {"schema": SCHEMA, "model": self.model, "tokenizer": self.tokenizer}
        about |= {"layout": self.layout, "infill": self.infill, "origin": self.origin}
        text = json.dumps(about | {"base": base}, indent=1)
        buffer = io.BytesIO()
        np.savez(buffer, **{ABOUT: np.frombuffer(text.encode(), np.uint8)}, **dict(sorted(self.params.items())))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None

    @classmethod
    def read(cls, path: Path) -> "AdapterFile":
        """Reads a file. Raises UserError if it is missing, damaged, or something else."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            about = migrate(json.loads(arrays.pop(ABOUT).tobytes()), str(path))
            base = {name: Frozen(tuple(shape), *map(_whole, sums)) for name, (shape, *sums) in about["base"].items()}
            layout = {name: about["layout"][name] for name in AS_READ}
            given = dict(about["model"]), about["tokenizer"], layout, str(about["origin"])
            return cls(*given, base, arrays, about.get("infill"))
        except FileNotFoundError:
            raise UserError(f"no adapter {path}: write it with polygpt adapter save RUN {path}") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
            raise UserError(
                f"{path} is damaged, or is not an adapter: write it again with polygpt adapter save"
            ) from None

    @property
    def kind(self) -> str:
        """What was trained, in a few words: "LoRA, rank 4"."""
        kinds = []
        if added := self.model["low_rank"]:
            name = "DoRA" if added["magnitude"] else "rsLoRA" if added["rank_stabilized"] else "LoRA"
            kinds.append(f"{name}, rank {added['rank']}")
        if added := self.model["prefix"]:
            kinds.append(f"prefix, length {added['length']}")
        return "; ".join(kinds)

    @property
    def numbers(self) -> int:
        """The number of trained numbers."""
        return sum(array.size for array in self.params.values())

    @property
    def frozen(self) -> int:
        """The number of numbers in the base, without those that the adapter has itself."""
        return sum(math.prod(one.shape) for one in self.base.values())

    def misfit(self, params: Params, merged: Mapping[str, int]) -> str:
        """What differs between the base that it was trained on and these parameters; "" if nothing does.

        What its model does not read may differ. `merged` says what matrices were merged from, see `merged_from`.
        """
        values = paths(params)
        return self.other_shape(values) or self.other_weights(values, merged)

    def other_shape(self, shapes: Mapping[str, Any]) -> str:
        """What differs in shape between its base and parameters of these shapes, by name; "" if nothing does."""
        found = {name: shapes[name] for name in self.base.keys() & shapes}
        if difference := changed_shape(self.base, found):
            name, trained, here = difference
            return f"{name} is {trained} in the base that it was trained on, and {here} in this one"
        return ""

    def other_weights(self, values: Mapping[str, jax.Array], merged: Mapping[str, int]) -> str:
        """Which of some parameters of its base, by name, have other values here; "" if none has."""

        def same(name: str, checksum: int) -> bool:
            own = self.base[name]
            return checksum == own.checksum or own.merged is not None and own.merged == merged.get(name)

        sums = checksums({name: value for name, value in values.items() if name in self.base})
        other = [name for name, found in sums.items() if not same(name, found)]
        return f"the weights of {other[0]} differ, and those of {len(other) - 1} more" if other else ""

    def onto(self, model: Model, base: Params, places: Params, merged: Mapping[str, int]) -> Params:
        """The parameters of its model: its own, and the others from `base`.

        Args:
            model: the model of its specification.
            base: parameters of the base.
            places: shardings of the model's parameters.
            merged: what matrices of the base were merged from.

        Raises:
            UserError: if it was trained on another base, or does not fit its own specification. Names the parameter.
        """
        if fault := self.misfit(base, merged):
            raise UserError(f"trained on another base: {fault}")
        frozen = {name: value for name, value in paths(base).items() if name in self.base}
        wanted, given = paths(model.abstract()), {**frozen, **self.params}
        if difference := changed_shape(wanted, given):
            name, expected, found = difference
            raise UserError(f"damaged: {name} is {found}, its specification says {expected}")

        own = {name: placed(given[name], place) for name, place in paths(places).items() if name in self.params}
        return tree_of({name: own.get(name, given[name]) for name in wanted})


def _whole(number: Any) -> int | None:
    return None if number is None else int(number)


def placed(value: np.ndarray, place: jax.sharding.Sharding) -> jax.Array:
    """An array with this sharding; each process has the whole value."""
    return jax.make_array_from_callback(value.shape, place, lambda index: value[index])


def require_new(path: Path) -> None:
    """Raises UserError if something is at this path."""
    if path.exists():
        raise UserError(f"{path} exists already: name another file, or remove it")


def checksums(params: Mapping[str, jax.Array]) -> dict[str, int]:
    """A 32-bit checksum of each array, against mistakes. It is the same on every mesh."""
    return {name: int(found) for name, found in _checksums(dict(params)).items()}


def merged_from(params: Params, added: LowRank | None, known: Mapping[str, int]) -> dict[str, int]:
    """A checksum of what each matrix is merged from, by name.

    Merged on other devices, a matrix has other rounding errors, so its own checksum does not identify it.

    Args:
        params: parameters with low-rank updates.
        added: the updates; None for none.
        known: what the parameters themselves were merged from, by name.
    """
    values = paths(params)
    updates: dict[str, list[str]] = {}
    for name in sorted(values):
        if added is not None and (matrix := matrix_of(name)) in values:
            updates.setdefault(matrix, [matrix]).append(name)
    sums = checksums({name: values[name] for names in updates.values() for name in names}) | dict(known)
    own = {matrix: [added.scale, *(sums[name] for name in names)] for matrix, names in updates.items()}
    return dict(known) | {matrix: zlib.crc32(json.dumps(made).encode()) for matrix, made in own.items()}


@jax.jit
def _checksums(params):
    return {name: _checksum(value) for name, value in params.items()}


def _checksum(x: jax.Array) -> jax.Array:
    """The sum of the bits of all elements, each scrambled with its index by MurmurHash3's finalizer, modulo 2^32.

    The order of a sum of whole numbers does not matter, so that a sharded array needs no gathering.
    """
    x = x if x.dtype.itemsize == 4 else x.astype(jnp.float32)
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + index * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)
