"""Every exchange between devices in a compiled program: its kind, the mesh axes it goes along, bytes, how often."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from polygpt.scale.plan.hlo import Executed, Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
"""As XLA names them; a `ragged-all-to-all` counts as all-to-all."""
NETWORK = "network"
"""The kind of what a program of several slices sends over the data-centre network, where the compiler has split that
from what stays within a slice."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal exchanges of one step.

    Attributes:
        kind: one of `KINDS`, or `NETWORK`.
        axes: the axes of the mesh along which the members of a group differ; empty where the text's notation of groups
            is not understood.
        group: the members of a group, by their place in the mesh; the first group stands for all.
        payload: bytes of the whole array on one device: what an all-gather gives, a reduce-scatter takes, an all-reduce
            or all-to-all takes and gives, a permute sends.
        times: executions in one step.
        dtype: of the array, or of most of it.
        origin: the operation in the model that it was made for.
        hidden: whether the compiler has made it asynchronous, so that it runs beside computation.
        pairs: of a permute, every device that sends and the one that it sends to.
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
        """Bytes that each device sends in one execution, in a ring over n devices: (n - 1)/n of the payload.

        Twice that for an all-reduce, which is a reduce-scatter and an all-gather (Patarasuk and Yuan 2009); all of the
        payload for a permute. All-to-all: (n - 1)/n, whatever the way it takes.
        """
        n = len(self.group)
        if self.kind in ("collective-permute", "collective-broadcast", NETWORK):
            return self.payload
        return self.payload * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)

    @property
    def sent_a_step(self) -> float:
        """Bytes that each device sends in a step."""
        return self.sent * self.times


def collectives(program: Program, mesh: dict[str, int]) -> list[Collective]:
    """Those of a program for a mesh with these axes, largest first; equal ones are added up.

    An all-reduce of which a fusion keeps only a device's share is a reduce-scatter, and is counted as one: the compiler
    names such fusions so, too ("AllReduceScatterFusion"). One whose whole result leaves the fusion is an all-reduce
    however little of it is used later: that is what the devices send.
    """
    found: dict[tuple, Collective] = {}
    for run in program.executed():
        one = _collective(run, mesh) if not _goes_on(run) else None
        if one is None:
            continue
        key = (one.kind, one.axes, one.payload, one.dtype, one.origin, one.hidden, one.pairs)
        before = found.get(key)
        found[key] = one if before is None else dataclasses.replace(one, times=before.times + one.times)
    return sorted(found.values(), key=lambda one: -one.sent_a_step)


def _goes_on(run: Executed) -> bool:
    """Whether an exchange has begun elsewhere: asynchronous ones stand in a chain of fusions with other work.

    The first begins it, those between let it go on, also within a loop that runs meanwhile, and the last waits for it.
    All have the same chain's number. Channels do not tell them: exchanges that were combined have the same one.
    """
    if 'chain_id="' not in run.instruction.text:
        return False
    return not any('custom_call_target="AsyncCollectiveStart"' in other.text for other in run.within.values())


def kernels(program: Program) -> dict[str, int]:
    """Pallas kernels by name, and how often they run in a step: "splash_mha_fwd...", "flex_forward"."""
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
    if opcode == "all-reduce" and run.fused and _only_cut(instruction, run.within):
        opcode = "reduce-scatter"
    if payload == 0 or len(group) < 2 and opcode != NETWORK:
        return None
    origin = re.search(r'op_name="([^"]*)"', instruction.text)
    hidden = instruction.opcode.endswith("-start") or run.beside
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


def _only_cut(array: Instruction, within: Mapping[str, Instruction]) -> bool:
    """Whether of an array, or of each of a tuple, nothing is used but cuts."""
    users = [other for other in within.values() if array.name in other.operands]
    through = ("get-tuple-element", "bitcast")
    return bool(users) and all(
        _only_cut(user, within) if user.opcode in through else user.opcode in ("dynamic-slice", "slice")
        for user in users
    )


def _origin(name: str) -> str:
    """ "jit(step)/while/body/transpose(jvp())/while/body/checkpoint/dot_general" -> "backward, dot_general"."""
    when = "again" if "rematted_computation" in name else "backward" if "transpose(" in name else "forward"
    if "jvp(" not in name and "transpose(" not in name:
        when = "update"
    return f"{when}, {name.rpartition('/')[2]}"


def _groups(text: str, devices: int) -> list[tuple[int, ...]]:
    """The groups of devices that exchange something with each other; empty if the notation is not known."""
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
    """The numbers that "[4,2]T(1,0)" stands for: those from 0, in that shape, its axes exchanged."""
    shape = [int(n) for n in sizes.split(",")]
    axes = [int(n) for n in order.split(",")] if order else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(tuple(axes)).ravel()


def _listed(text: str) -> list[list[int]]:
    return [[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d,]*)\}", text)]


def _axes(groups: Sequence[tuple[int, ...]], mesh: dict[str, int]) -> tuple[str, ...]:
    """The axes along which the members of some group differ."""
    shape = tuple(mesh.values())
    places = [np.stack(np.unravel_index(np.asarray(group), shape), axis=1) for group in groups]
    return tuple(name for i, name in enumerate(mesh) if any((place[:, i] != place[0, i]).any() for place in places))
