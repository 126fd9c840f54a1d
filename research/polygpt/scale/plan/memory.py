"""Memory per device of a compiled step, broken down by purpose."""

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
        parameters: parameters, and their moving average if there is one.
        optimizer: optimizer state.
        batch: rows, media and all other arguments of the step.
        padding: tile padding of the arguments on TPUs.
        temporaries: peak of activations, gradients and collective buffers during the step.
        output: results that do not alias an argument; the state aliases its donated buffers.
        program: generated code.
        usable: memory available to a program.
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
        """Sum of all parts."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self)) - self.usable

    @property
    def fits(self) -> bool:
        """Whether the total is at most `usable`."""
        return self.total <= self.usable

    def to_json(self) -> dict:
        """As JSON data."""
        return dataclasses.asdict(self) | {"total": self.total, "fits": self.fits}


@dataclasses.dataclass(frozen=True)
class Exhausted:
    """The compiler's report when it runs out of memory.

    Attributes:
        temporaries: bytes of activations and other temporaries; None if not reported.
        all: bytes in total; None if not reported.
        available: bytes available; None if not reported.
        text: first lines of the error message.
    """

    temporaries: float | None
    all: float | None
    available: float | None
    text: str


FIGURES = tuple(f"{what}_size_in_bytes" for what in ("argument", "output", "alias", "temp", "generated_code"))
"""Attributes of the compiler's memory analysis that are used."""


def of(figures: Mapping[str, int], state: Any, batch: Any, usable: float) -> Memory:
    """The memory of a compiled step, from its `FIGURES` and its abstract state and batch with shardings."""
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
    """Bytes of a tree's arrays on one device. Leaves have a shape, a dtype and a sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "dtype")
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)\s*([KMGT]?)i?B?"


def exhausted(error: BaseException | str) -> Exhausted | None:
    """Parses an out-of-memory error of the compiler; None for any other error.

    Two message formats of libtpu are known: "the total memory required for HLO temporaries (74.58G) exceeds available
    HBM (15.75G)", and "Used 20.01G of 15.75G hbm".
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
