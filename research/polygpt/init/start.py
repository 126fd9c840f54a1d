"""Matches the parameters of a source with those of a model, and reads them."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from polygpt.columns import aligned
from polygpt.errors import OtherTokenizer, UserError
from polygpt.init.base import Init, Source, Weights
from polygpt.models.low_rank import matrix_of
from polygpt.models.prefix import ADDED
from polygpt.parameters import Traits


@dataclasses.dataclass(frozen=True)
class Start:
    """What fills the initial parameters of a model. Parameters not in `taken` are random.

    Attributes:
        source: where values come from, or None if all parameters are random.
        taken: names in the source, by names in the model.
        table: which part of the model comes from where, and what is not used.
    """

    source: Source | None
    taken: Mapping[str, str]
    table: str

    def read(self, target: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The values of the parameters in `taken`, by name. `target` has dtypes and shardings of all parameters."""
        if self.source is None:
            return {}
        found = self.source.read({theirs: target[ours] for ours, theirs in self.taken.items()})
        return {ours: found[theirs] for ours, theirs in self.taken.items()}

    @property
    def merged_from(self) -> dict[str, int]:
        """What the parameters that have been read were merged from, by name, see `adapter_file.merged_from`."""
        made = getattr(self.source, "merged_from", {})
        return {ours: made[theirs] for ours, theirs in self.taken.items() if theirs in made}


def start(init: Init, traits: Mapping[str, Traits], tokenizer: Any) -> Start:
    """Opens the source of an initialisation and matches names and shapes.

    Args:
        init: the initialisation.
        traits: the traits of the model's parameters, by name.
        tokenizer: JSON of the experiment's tokenizer.

    Raises:
        UserError: the source cannot be used, or it does not fit the model: names the parameter and the remedy.
    """
    if not isinstance(init, Weights):
        return Start(None, {}, "")
    source = init.open()
    given = _renamed(init, source)
    chosen = {ours: theirs for ours, theirs in given.items() if _selected(init, ours)}
    taken = {ours: theirs for ours, theirs in chosen.items() if ours in traits}
    if not taken:
        raise UserError(
            f"init takes nothing from {source.origin}: its parameters are named like {next(iter(given), 'nothing')}, "
            f"this model's like {next(iter(traits))}: see init.include, init.exclude and init.rename"
        )
    _require_tokenizer(init, source, [ours for ours in taken if "vocabulary" in traits[ours].axes], tokenizer)
    source = init.fit(source, taken, traits)
    for ours, theirs in taken.items():
        _require_shape(ours, traits[ours].shape, theirs, source)
    if init.strict:
        needed = [
            name for name in traits if not (matrix_of(name) or ADDED.search(name))
        ]  # adapters begin by themselves
        unfilled = [ours for ours in needed if ours not in taken and _selected(init, ours)]
        unused = {ours: theirs for ours, theirs in chosen.items() if ours not in traits}
        _require_all(init, source, unfilled, unused)
    _require_trained(traits, taken)
    return Start(source, taken, _table(source, taken, traits))


def _require_trained(traits: Mapping[str, Traits], taken: Mapping[str, str]) -> None:
    """Raises UserError for parameters that stay random although adapters freeze them."""
    updated = {matrix for name in traits if (matrix := matrix_of(name))}
    idle = [name for name, own in traits.items() if not (own.trained or name in taken or name in updated)]
    if idle and (updated or any(map(ADDED.search, traits))):
        field = "model.low_rank" if updated else "model.prefix"
        raise UserError(
            f"init leaves {_some(idle)} random, and {field} freezes what it does not train: name such parameters in "
            f"{field}.also ('{_also(idle)}')"
        )


def _selected(init: Weights, name: str) -> bool:
    included = init.include is None or re.search(init.include, name)
    return bool(included) and not (init.exclude is not None and re.search(init.exclude, name))


def _renamed(init: Weights, source: Source) -> dict[str, str]:
    """Names in the source, by the names that `init.rename` gives them."""
    given: dict[str, str] = {}
    for theirs in source.shapes:
        ours = theirs
        for pattern, replacement in init.rename.items():
            try:
                ours = re.sub(pattern, replacement, ours)
            except (re.error, IndexError) as error:
                raise UserError(f"init.rename: {pattern!r} cannot become {replacement!r}: {error}") from None
        if ours in given:
            raise UserError(f"init.rename gives {given[ours]} and {theirs} of {source.origin} the same name, {ours}")
        given[ours] = theirs
    return given


def _require_shape(ours: str, shape: tuple[int, ...], theirs: str, source: Source) -> None:
    found = tuple(source.shapes[theirs].shape)
    if found != tuple(shape):
        raise UserError(
            f"init: {theirs} of {source.origin} is {list(found)}, but {ours} is {list(shape)} in this model: change "
            "the model, or leave it random with init.exclude"
        )


def _require_all(init: Weights, source: Source, unfilled: list[str], unused: dict[str, str]) -> None:
    """Raises UserError for parameters that nothing fills, and those of the source, by new name, that fill nothing."""
    faults = []
    if unfilled:
        faults.append(f"nothing in {source.origin} fills {_some(unfilled)}")
    if unused:
        faults.append(f"{_some(list(unused.values()))} of {source.origin} fill{'s' * (len(unused) == 1)} nothing here")
    if faults:
        pattern = _excluding(init, _patterns([*unfilled, *unused]))
        raise UserError(
            f"init: {', and '.join(faults)}: exclude these (init.exclude '{pattern}' excludes all of their parts), map "
            "names with init.rename, or set init.strict to false"
        )


def _patterns(names: Iterable[str]) -> list[str]:
    """Regular expressions of the parts of a model that these parameters belong to."""
    return [f"^{re.escape(part)}(/|$)" for part in dict.fromkeys(map(_part, names))]


def _also(names: Iterable[str]) -> str:
    """A regular expression of what these parameters have in common within each part of the model."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(_part(name), []).append(name)
    inner = (os.path.commonpath(some) for some in parts.values())
    return "|".join(f"^{re.escape(one)}(/|$)" for one in inner)


def _excluding(init: Weights, patterns: Iterable[str]) -> str:
    """A value for `init.exclude` that excludes more than now."""
    return "|".join([*([init.exclude] if init.exclude else []), *patterns])


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _require_tokenizer(init: Weights, source: Source, tables: list[str], tokenizer: Any) -> None:
    """Raises UserError if parameters with a row per token id come from a run with other token ids."""
    if tables and source.tokenizer is not None and source.tokenizer != tokenizer:
        other = (
            f"{source.origin} was trained with another tokenizer ({_short(source.tokenizer)}, here "
            f"{_short(tokenizer)}), so the rows of {tables[0]} belong to other tokens"
        )
        excluding = _excluding(init, (f"^{name}$" for name in tables))
        raise OtherTokenizer(other, f"init: {other}: set tokenizer to that one, or init.exclude to {excluding!r}")


def _short(tokenizer: Mapping[str, Any]) -> str:
    name = str(tokenizer.get("class", "?")).rpartition(":")[2]
    fields = ", ".join(f"{field}={value!r}" for field, value in tokenizer.items() if field != "class")
    return f"{name}({fields})" if len(fields) < 80 else name


def _part(name: str) -> str:
    """The part of a model that a parameter belongs to: "decoder", "adapters/image"."""
    parts = name.split("/")
    return "/".join(parts[: 2 if parts[0] in ("adapters", "modality", "heads") else 1])


def _table(source: Source, taken: Mapping[str, str], traits: Mapping[str, Traits]) -> str:
    """A table of the model's parts: what is filled from where, what is random, and what is not used."""
    rows = [("parameters", "initial values", "tensors", "numbers")]
    groups: dict[tuple[str, str], list[int]] = {}
    for name, own in traits.items():
        origin = f"{_part(taken[name])} of {source.origin}" if name in taken else "random"
        groups.setdefault((_part(name), origin), []).append(math.prod(own.shape))
    used = set(taken.values())
    for theirs, shape in source.shapes.items():
        if theirs not in used:
            origin = f"{_part(theirs)} of {source.origin}"
            groups.setdefault(("not used", origin), []).append(math.prod(shape.shape))
    rows += [(*key, f"{len(sizes):,}", f"{sum(sizes):,}") for key, sizes in groups.items()]
    return aligned(rows, texts=2)
