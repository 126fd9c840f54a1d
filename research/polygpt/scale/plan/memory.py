"""Where the memory of a device goes: what the compiler reserves, split by what it is for."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        parameters: with the moving average, if there is one.
        optimizer: its state.
        batch: rows and media, and everything else that the step is given.
        padding: what arguments take beyond that, for the tiles of a TPU.
        temporaries: activations, gradients, buffers of collectives: what lives within a step at the worst moment.
        output: results that do not take the place of an argument; the state does.
        program: its code.
        usable: what a program may take.
    """

    parameters: float
    optimizer: float
    batch: float
    padding: float
    temporaries: float
    output: float
    program: float
    usable: float

    @property
    def state(self) -> float:
        """Parameters and optimizer."""
        return self.parameters + self.optimizer

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self)) - self.usable

    @property
    def fits(self) -> bool:
        """Whether it is within what may be used."""
        return self.total <= self.usable

    def to_json(self) -> dict:
        """As JSON data."""
        return dataclasses.asdict(self) | {"total": self.total, "fits": self.fits}


@dataclasses.dataclass(frozen=True)
class Exhausted:
    """What the compiler said when the memory did not suffice.

    Attributes:
        temporaries: bytes of activations and other temporaries, or None where it does not say.
        all: bytes of all together, or None.
        available: bytes that there are.
        text: its first lines.
    """

    temporaries: float | None
    all: float | None
    available: float | None
    text: str


FIGURES = tuple(f"{what}_size_in_bytes" for what in ("argument", "output", "alias", "temp", "generated_code"))
"""What is read of a compiler's memory analysis."""


def of(figures: Mapping[str, int], state: Any, batch: Any, usable: float) -> Memory:
    """The memory of a compiled step, given its `FIGURES`, and the shapes and places of its arguments."""
    parameters = of_device((state.params, state.ema))
    optimizer = of_device(state.opt_state)
    rest = of_device((state, batch)) - parameters - optimizer
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        batch=rest,
        padding=max(figures["argument_size_in_bytes"] - parameters - optimizer - rest, 0),
        temporaries=figures["temp_size_in_bytes"],
        output=max(figures["output_size_in_bytes"] - figures["alias_size_in_bytes"], 0),
        program=figures["generated_code_size_in_bytes"],
        usable=usable,
    )


def of_device(tree: Any) -> float:
    """Bytes of a tree's arrays on one device: leaves have a shape, a dtype and a place."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "dtype")
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)\s*([KMGT]?)i?B?"


def exhausted(error: BaseException | str) -> Exhausted | None:
    """What a compiler's error says of memory; None if it is another error.

    Two forms are known, both of libtpu: "the total memory required for HLO temporaries (74.58G) exceeds available HBM
    (15.75G)", and "Used 20.01G of 15.75G hbm".
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        return None
    first = "\n".join(text.splitlines()[:12])
    if found := re.search(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", text):
        return Exhausted(_bytes(*found.groups()[:2]), None, _bytes(*found.groups()[2:]), first)
    if found := re.search(rf"Used {_SIZE} of {_SIZE} hbm", text, re.IGNORECASE):
        return Exhausted(None, _bytes(*found.groups()[:2]), _bytes(*found.groups()[2:]), first)
    return Exhausted(None, None, None, first)


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]
