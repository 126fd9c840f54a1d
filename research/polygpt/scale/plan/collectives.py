"""Collectives of a compiled program: kind, mesh axes, bytes and number of executions."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from polygpt.scale.plan.hlo import Executed, Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
"""XLA's names; `ragged-all-to-all` counts as all-to-all."""
NETWORK = "network"
"""Kind of transfers over the data-centre network in a multi-slice program, where the compiler has separated them from
those within a slice."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """Identical collectives of one step.

    Attributes:
        kind: one of `KINDS`, or `NETWORK`.
        axes: mesh axes along which the members of a group differ; empty if the notation of the groups is unknown.
        group: indices in the mesh of the members of the first group, which represents all groups.
        payload: bytes of the full array per device: the output of an all-gather, the input of a reduce-scatter, the
            input or output of an all-reduce or all-to-all, the operand of a permute.
        times: executions per step.
        dtype: dtype of the array, or of the largest array of a tuple.
        origin: the operation of the model that needs it.
        hidden: whether it is asynchronous, so that computation can hide it.
        pairs: (source, target) devices of a permute.
    """

    kind: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    payload: float
    times: int
    dtype: str
    origin: str
    hidden: bool
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def sent(self) -> float:
        """Bytes that each device sends per execution. In a ring of n devices it is (n - 1)/n of the payload.

        An all-reduce, which is a reduce-scatter and an all-gather, sends twice that (Patarasuk and Yuan 2009). A
        permute sends the whole payload. An all-to-all sends (n - 1)/n of it on any topology.
        """
        n = len(self.group)
        if self.kind in ("collective-permute", "collective-broadcast", NETWORK):
            return self.payload
        return self.payload * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)

    @property
    def sent_per_step(self) -> float:
        """Bytes that each device sends per step."""
        return self.sent * self.times


def collectives(program: Program, mesh: dict[str, int]) -> list[Collective]:
    """The collectives of a program for a mesh with these axes, largest first; identical ones are merged.

    An all-reduce inside a fusion that keeps only the device's shard of the result counts as a reduce-scatter; the
    compiler, too, calls such a fusion "AllReduceScatterFusion". If the full result leaves the fusion, it counts as an
    all-reduce even if only a part is used later, because the devices send all of it.
    """
    found: dict[tuple, Collective] = {}
    for run in program.executed():
        one = _collective(run, mesh) if not _continues_async(run) else None
        if one is None:
            continue
        key = (one.kind, one.axes, one.payload, one.dtype, one.origin, one.hidden, one.pairs)
        before = found.get(key)
        found[key] = one if before is None else dataclasses.replace(one, times=before.times + one.times)
    return sorted(found.values(), key=lambda one: -one.sent_per_step)


def _continues_async(run: Executed) -> bool:
    """Whether the instruction continues an asynchronous collective that an earlier instruction started.

    The compiler splits an asynchronous collective into a chain of fusions that also do other work: the first starts it,
    those between, also in the body of a concurrent loop, advance it, and the last waits for it. All have the same
    chain_id. Channel ids do not identify a chain, because combined collectives share one.
    """
    if 'chain_id="' not in run.instruction.text:
        return False
    return not any('custom_call_target="AsyncCollectiveStart"' in other.text for other in run.within.values())


def kernels(program: Program) -> dict[str, int]:
    """Executions per step of Pallas kernels, by name: "splash_mha_fwd...", "flex_forward"."""
    counts: dict[str, int] = {}
    for run in program.executed():
        if run.instruction.opcode == "custom-call" and '"tpu_custom_call"' in run.instruction.text:
            name = re.sub(r"(\.clone)?(\.\d+)*$", "", run.instruction.name)
            counts[name] = counts.get(name, 0) + run.times
    return counts


def _collective(run: Executed, mesh: dict[str, int]) -> Collective | None:
    instruction = run.instruction
    opcode = instruction.opcode.removesuffix("-start").removeprefix("ragged-")
    operands = [run.within[name] for name in instruction.operands if name in run.within]
    if opcode == "send" and "is_host_transfer=true" in instruction.text:
        opcode, operands = NETWORK, operands[:1]
    elif opcode not in KINDS:
        return None
    given = [array for operand in operands for array in operand.results]
    payload = sum(array.bytes for array in given)
    devices = math.prod(mesh.values())
    groups = _groups(instruction.text, devices) if opcode != NETWORK else [(0,)]
    group = groups[0] if groups else tuple(range(devices))
    if opcode == "all-gather":
        payload *= len(group)
    if opcode == "all-reduce" and run.fused and _only_sliced(instruction, run.within):
        opcode = "reduce-scatter"
    if payload == 0 or len(group) < 2 and opcode != NETWORK:
        return None
    origin = re.search(r'op_name="([^"]*)"', instruction.text)
    hidden = instruction.opcode.endswith("-start") or run.asynchronous
    hidden = hidden or any(mark in instruction.text for mark in ("async_collective", "chain_id="))
    return Collective(
        kind=opcode,
        axes=_axes(groups, mesh) if groups else (),
        group=group,
        payload=payload,
        times=run.times,
        dtype=max(given, key=lambda array: array.bytes).dtype,
        origin=_origin(origin.group(1)) if origin else "",
        hidden=hidden,
        pairs=tuple(groups) if opcode == "collective-permute" else (),
    )


def _only_sliced(array: Instruction, within: Mapping[str, Instruction]) -> bool:
    """Whether an array, or each array of a tuple, is only used by slices."""
    users = [other for other in within.values() if array.name in other.operands]
    through = ("get-tuple-element", "bitcast")
    return bool(users) and all(
        _only_sliced(user, within) if user.opcode in through else user.opcode in ("dynamic-slice", "slice")
        for user in users
    )


def _origin(name: str) -> str:
    """ "jit(step)/while/body/transpose(jvp())/while/body/checkpoint/dot_general" -> "backward, dot_general"."""
    when = "recompute" if "rematted_computation" in name else "backward" if "transpose(" in name else "forward"
    if "jvp(" not in name and "transpose(" not in name:
        when = "update"
    return f"{when}, {name.rpartition('/')[2]}"


def _groups(text: str, devices: int) -> list[tuple[int, ...]]:
    """The device groups of a collective; empty if the notation is unknown."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return [tuple(pair) for pair in _listed(pairs.group(1)) if pair[0] != pair[1]]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return [tuple(group) for group in _listed(listed.group(1))]
    if iota := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", text):
        numbers = _iota(*iota.groups()[2:])
        return [tuple(group) for group in numbers.reshape(int(iota.group(1)), int(iota.group(2))).tolist()]
    if named := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        chosen = re.findall(r"'(\w+)'", named.group(4))
        if ":" in named.group(4) or math.prod(sizes.values()) != devices:
            return []
        numbers = _iota(*named.groups()[1:3]) if named.group(2) else np.arange(devices)
        axes = [list(sizes).index(name) for name in chosen]
        grid = np.moveaxis(numbers.reshape(tuple(sizes.values())), axes, range(len(sizes) - len(axes), len(sizes)))
        return [tuple(g) for g in grid.reshape(-1, math.prod(sizes[name] for name in chosen)).tolist()]
    return [tuple(range(devices))] if "replica_groups={}" in text else []


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """The device numbers that "[4,2]T(1,0)" denotes: iota of that shape, with its axes transposed."""
    shape = [int(n) for n in sizes.split(",")]
    axes = [int(n) for n in order.split(",")] if order else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(tuple(axes)).ravel()


def _listed(text: str) -> list[list[int]]:
    return [[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d,]*)\}", text)]


def _axes(groups: Sequence[tuple[int, ...]], mesh: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of any group differ."""
    shape = tuple(mesh.values())
    places = [np.stack(np.unravel_index(np.asarray(group), shape), axis=1) for group in groups]
    return tuple(name for i, name in enumerate(mesh) if any((place[:, i] != place[0, i]).any() for place in places))
