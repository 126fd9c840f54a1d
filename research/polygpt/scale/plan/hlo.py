"""Parser of optimized HLO text: instructions, the call graph, and executions of each instruction per step.

XLA's cost analysis counts a loop body once, but a model scans over its blocks, so most of the work is inside loops.
Here each instruction comes with its number of executions per call of the program.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1, "s16": 2,
    "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
"""Bytes per element; other types, such as tokens, count 0."""

_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Attributes:
        dtype: HLO's name, such as "bf16".
        shape: dimensions.
        on_chip: whether it is in on-chip memory (VMEM or scalar memory) rather than HBM.
    """

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Bytes, without tile padding."""
        return self.size * BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One HLO instruction.

    Attributes:
        name: name without the percent sign.
        opcode: "fusion", "all-gather-start", ...
        results: output arrays, with tuples flattened.
        operands: names of instructions of the same computation.
        text: the whole line.
        root: whether it is the root of its computation.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    root: bool

    @property
    def bytes(self) -> float:
        """Bytes of the result."""
        return sum(array.bytes for array in self.results)

    def attribute(self, name: str) -> str | None:
        """The text after `name=`, up to the next attribute; None if there is no such attribute."""
        found = re.search(rf"[,)] {name}=", self.text)
        if found is None:
            return None
        return self.text[found.end() : _end_of(self.text, found.end(), ",")]

    def called(self) -> dict[str, str]:
        """Names of called computations, by attribute."""
        return {kind: name for kind, name in _CALLED.findall(self.text)}


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction with its executions.

    Attributes:
        instruction: the instruction.
        within: the computation that contains it.
        times: executions per call of the program.
        loops: names of the enclosing loops, outermost first.
        fused: whether it is part of a fusion, so that its operands and results are not arrays in memory.
        asynchronous: whether it is part of an asynchronous call.
    """

    instruction: Instruction
    within: dict[str, Instruction]
    times: int
    loops: tuple[str, ...]
    fused: bool = False
    asynchronous: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """A whole compiled program.

    Attributes:
        computations: instructions by name and in order, for each computation by name.
        entry: name of the entry computation.
        unknown: loops with an unknown trip count; their bodies are counted once.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    unknown: tuple[str, ...] = ()

    def executed(self) -> Iterator[Executed]:
        """All executed instructions, including those inside fusions but not the scalar functions of reductions.

        Of a conditional, only the branch that writes the fewest bytes counts.
        """
        yield from self._executed(self.entry, 1, ())

    def _executed(self, name: str, times: int, loops: tuple[str, ...], **where: bool) -> Iterator[Executed]:
        within = self.computations[name]
        for instruction in within.values():
            yield Executed(instruction, within, times, loops, **where)
            opcode, called = instruction.opcode, instruction.called()
            if opcode == "while":
                trips = self.trips(instruction, within) or 1
                yield from self._executed(called["body"], times * trips, (*loops, instruction.name), **where)
            elif opcode == "fusion":
                yield from self._executed(called["calls"], times, loops, **where | {"fused": True})
            elif opcode in ("async-start", "call-start"):
                inside = called.get("calls") or called["to_apply"]
                yield from self._executed(inside, times, loops, **where | {"asynchronous": True})
            elif opcode == "call":
                yield from self._executed(called["to_apply"], times, loops, **where)
            elif opcode == "conditional":
                yield from self._executed(self._smallest_branch(instruction), times, loops, **where)

    def _smallest_branch(self, conditional: Instruction) -> str:
        """The branch that writes the fewest bytes, so that counts are lower bounds.

        In a model the other branch handles rare cases, such as padding between the positions of a row.
        """
        nothing = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")

        def written(branch: str) -> float:
            runs = (run for run in self._executed(branch, 1, ()) if run.instruction.opcode not in nothing)
            return sum(run.times * run.instruction.bytes for run in runs if not run.fused)

        return min(self._branches(conditional), key=written)

    def _branches(self, instruction: Instruction) -> list[str]:
        listed = _BRANCHES.search(instruction.text)
        if listed:
            return [name.strip().lstrip("%") for name in listed.group(1).split(",")]
        return [name for kind, name in instruction.called().items() if kind.endswith("_computation")]

    def trips(self, loop: Instruction, within: dict[str, Instruction]) -> int | None:
        """Trip count: executions of the body per execution of the loop; None if unknown."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
            return int(known.group(1))
        condition = self.computations[loop.called()["condition"]]
        root = next(instruction for instruction in condition.values() if instruction.root)
        if root.opcode == "fusion" and len(root.operands) == 2:  # the CPU compiler fuses the comparison
            inner = self.computations[root.called()["calls"]]
            direction = next((i.attribute("direction") for i in inner.values() if i.opcode == "compare"), None)
        else:
            direction = root.attribute("direction")
        constants = [_integer(condition.get(name)) for name in root.operands]
        end = next((value for value in constants if value is not None), None)
        counter = next((condition[name] for name in root.operands if _index(condition.get(name)) is not None), None)
        if end is None or counter is None or direction not in ("LT", "LE"):
            return None
        index = _index(counter)
        beyond = end - self._start(loop, within, index) + (direction == "LE")
        return max(math.ceil(beyond / self._stride(loop, index)), 0)

    def _stride(self, loop: Instruction, index: int) -> int:
        """Increment of the loop counter per iteration: 1 in JAX's loops, 2 in loops that the TPU compiler unrolls by 2.

        It unrolls loops that multiply one shard while the next one is in transfer (collective matrix products).
        """
        body = self.computations[loop.called()["body"]]
        root = next(instruction for instruction in body.values() if instruction.root)
        if root.opcode != "tuple" or index >= len(root.operands):
            return 1
        added, within = body.get(root.operands[index]), body
        while added is not None and added.opcode in ("copy", "bitcast"):
            added = body.get(added.operands[0])
        if added is not None and added.opcode == "fusion":
            within = self.computations[added.called()["calls"]]
            added = next(instruction for instruction in within.values() if instruction.root)
        if added is None or added.opcode != "add":
            return 1
        return next((n for name in added.operands if (n := _integer(within.get(name)))), 1)

    def _start(self, loop: Instruction, within: dict[str, Instruction], index: int) -> int:
        """Initial value of the loop counter. 0, as in JAX's loops, if it is not a constant in the text."""
        given = within.get(loop.operands[0])
        if given is None or given.opcode != "tuple" or index >= len(given.operands):
            return 0
        value = within.get(given.operands[index])
        while value is not None and value.opcode in ("copy", "bitcast"):
            value = within.get(value.operands[0])
        return _integer(value) or 0


def parse(text: str) -> Program:
    """Parses the output of `compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in _lines(text):
        if current is None:
            if head := _HEAD.match(line):
                current = computations.setdefault(head.group(2), {})
                entry = head.group(2) if head.group(1) else entry
        elif _END.match(line):
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    program = Program(computations, entry)
    loops = (run for run in program.executed() if run.instruction.opcode == "while")
    unknown = {run.instruction.name for run in loops if program.trips(run.instruction, run.within) is None}
    return dataclasses.replace(program, unknown=tuple(sorted(unknown)))


def _lines(text: str) -> Iterator[str]:
    """The instruction lines; joins those that a kernel's metadata splits."""
    waiting = ""
    for line in text.splitlines():
        begins = not line or _NAME.match(line) or _END.match(line) or _HEAD.match(line)
        if begins and waiting:
            yield waiting
            waiting = ""
        waiting = f"{waiting} {line.strip()}" if waiting and not begins else line
    yield waiting


def _instruction(line: str) -> Instruction | None:
    named = _NAME.match(line)
    if named is None:
        return None
    at = named.end()
    behind = _end_of(line, at, " ")  # of the result's type
    opening = line.index("(", behind)
    closing = _end_of(line, opening + 1, ")")
    results = tuple(
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n), bool(re.search(r"S\([1-9]", layout or "")))
        for dtype, sizes, layout in _SHAPE.findall(line[at:behind])
    )
    opcode = line[behind + 1 : opening]
    inside = "" if opcode in ("constant", "parameter") else re.sub(r"/\*.*?\*/", "", line[opening + 1 : closing])
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(named.group(2), opcode, results, operands, line, bool(named.group(1)))


def _end_of(text: str, at: int, mark: str) -> int:
    """Index of the first `mark` at or after `at` outside brackets; the length of the text if there is none."""
    depth = 0
    for i in range(at, len(text)):
        c = text[i]
        if depth == 0 and c == mark:
            return i
        if c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
            if depth < 0:
                return i
    return len(text)


def _integer(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    value = re.search(r"constant\((-?\d+)\)", instruction.text)
    return int(value.group(1)) if value else None


def _index(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return int(re.search(r"index=(\d+)", instruction.text).group(1))
