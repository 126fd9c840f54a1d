"""What a compiled program does on one device in a step: FLOPs of its matrix products, bytes that pass its memory."""

import re
from collections.abc import Mapping

from polygpt.attention.kernels.flex import BLOCK
from polygpt.scale.plan.hlo import Array, Executed, Instruction, Program

PRODUCTS = {
    "splash_mha_fwd": (2, False),
    "splash_mha_dq": (3, False),
    "splash_mha_dkv": (4, False),
    "flex_forward": (2, True),
    "flex_backward_query": (3, True),
    "flex_backward_key": (4, True),
}
"""Attention kernels by the beginning of their names: the products of size B H T S d in each (forward: scores and
weighted values; backward: the scores anew, dP, and dQ, or dV and dK), and whether they leave out the blocks above the
diagonal, as the decoder's do. Towers see all of an item."""

_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "iota",
         "after-all", "partition-id", "replica-id", "copy-done", "slice-done", "async-done", "async-update",
         "call-done", "async-start", "call-start", "all-gather-done", "all-reduce-done", "collective-permute-done",
         "opt-barrier", "send-done", "recv-done", "dynamic-slice-done", "dynamic-update-slice-done"}  # fmt: skip
"""What moves no bytes of its own."""


def products(program: Program) -> float:
    """FLOPs of all matrix products and convolutions that XLA computes, 2 a multiply-add; kernels are not among them."""
    return sum(run.times * _product(run) for run in program.executed())


def kernel_flops(program: Program) -> dict[str, float]:
    """FLOPs of the attention kernels by name: whole blocks, as they compute them, and the rows not packed.

    A kernel that is not known counts 0, and its name is in the result all the same.
    """
    found: dict[str, float] = {}
    for run in program.executed():
        instruction = run.instruction
        if instruction.opcode != "custom-call" or '"tpu_custom_call"' not in instruction.text:
            continue
        name = re.sub(r"(\.clone)?(\.\d+)*$", "", instruction.name)
        known = next((what for begins, what in PRODUCTS.items() if name.startswith(begins)), None)
        found[name] = found.get(name, 0.0) + (run.times * _attention(run, *known) if known else 0.0)
    return found


def _attention(run: Executed, count: int, causal: bool) -> float:
    wide = [array for name in run.instruction.operands for array in run.within[name].results if len(array.shape) == 4]
    if len(wide) < 2:
        return 0.0
    (B, H, T, d), S = wide[0].shape, wide[1].shape[2]
    blocks = max(-(-T // BLOCK), 1)
    seen = (blocks + 1) / (2 * blocks) if causal and T == S else 1.0
    return 2.0 * count * B * H * T * S * d * seen


def _product(run: Executed) -> float:
    instruction, within = run.instruction, run.within
    if instruction.opcode == "dot":
        left = within[instruction.operands[0]].results[0].shape
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        inner = [left[int(n)] for n in contracted.group(1).split(",") if n] if contracted else []
        return 2.0 * instruction.results[0].size * _over(inner)
    if instruction.opcode != "convolution":
        return 0.0
    left, right = (within[name].results[0].shape for name in instruction.operands[:2])
    names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    grouped = re.search(r"batch_group_count=(\d+)", instruction.text)
    batches = int(grouped.group(1)) if grouped else 1
    lefts, rights, results = (dict(zip(labels, range(len(labels)), strict=True)) for labels in names.groups())
    flops = 2.0 * left[lefts["b"]] / batches * right[rights["i"]] * right[rights["o"]]
    for axis in (label for label in results if label.isdigit()):
        window = {key: _window(instruction, key, int(axis), otherwise) for key, otherwise in _WINDOW.items()}
        flops *= _positions(left[lefts[axis]], instruction.results[0].shape[results[axis]], window)
    return flops


_WINDOW = {"size": "1", "stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}


def _window(instruction: Instruction, key: str, axis: int, otherwise: str) -> int:
    found = re.search(rf"window=\{{[^}}]*\b{key}=([\w\-]+)", instruction.text)
    each = found.group(1).split("x") if found else []
    return int((each[axis] if axis < len(each) else otherwise).split("_")[0])


def _positions(inputs: int, outputs: int, window: Mapping[str, int]) -> int:
    """Pairs of an output and a place of the kernel where there is an input: padding and gaps are not computed."""
    reach = (inputs - 1) * window["lhs_dilate"] + 1
    count = 0
    for k in range(window["size"]):
        shift = k * window["rhs_dilate"] - window["pad"]
        first = max(0, -(shift // window["stride"]))
        last = min(outputs - 1, (reach - 1 - shift) // window["stride"])
        if window["lhs_dilate"] == 1:
            count += max(0, last - first + 1)
        else:
            count += sum(
                1 for o in range(first, last + 1) if (o * window["stride"] + shift) % window["lhs_dilate"] == 0
            )
    return count


def traffic(program: Program) -> float:
    """Bytes read from and written to a device's memory in a step.

    Every instruction that is not part of a fusion reads its operands and writes its results; what lies in on-chip
    memory (VMEM) costs nothing, of what is only cut from an array the cut counts, of an array that is updated in place
    the update. Caches, and tiles that are padded, are left out: it is what the text says, not what a profile would.
    """
    return sum(run.times * _moved(run, program) for run in program.executed() if not run.fused)


def _moved(run: Executed, program: Program) -> float:
    instruction, within = run.instruction, run.within
    opcode = instruction.opcode
    if opcode in _FREE or run.beside:
        return 0.0
    operands = [within[name] for name in instruction.operands if name in within]
    if opcode in ("dynamic-slice", "slice", "gather", "slice-start", "dynamic-slice-start"):
        return _far(instruction.results[:1]) * 2 if opcode != "slice-start" else _far(instruction.results[-2:-1])
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _far(operands[1 if opcode == "dynamic-update-slice" else -1].results)
    if opcode == "copy-start":
        return _far(operands[0].results) + _far(instruction.results[:1])
    if opcode == "fusion":
        return _of_fusion(instruction, operands, program.computations[instruction.called()["calls"]])
    return _far(instruction.results) + sum(_far(operand.results) for operand in operands)


def _of_fusion(fusion: Instruction, operands: list[Instruction], inside: dict[str, Instruction]) -> float:
    """Operands that are only cut count as the cuts, results that are updated in place as the updates."""
    users: dict[str, list[Instruction]] = {}
    for instruction in inside.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    updates = [i for i in inside.values() if i.opcode == "dynamic-update-slice"]
    updated = {_origin(update.operands[0], inside) for update in updates}
    moved = 0.0
    parameters = [i for i in inside.values() if i.opcode == "parameter"]
    for parameter in parameters:
        number = int(re.search(r"parameter\((\d+)\)", parameter.text).group(1))
        if number >= len(operands) or not _far(operands[number].results) or parameter.name in updated:
            continue
        using = _through(users, parameter.name)
        if using and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in using):
            moved += min(sum(user.bytes for user in using), operands[number].bytes)
        else:
            moved += _far(operands[number].results)
    in_place = {update.results[0].shape: inside[update.operands[1]].bytes for update in updates}
    for array in fusion.results:
        moved += in_place.get(array.shape, array.bytes) if not array.near else 0.0
    return moved


def _through(users: Mapping[str, list[Instruction]], name: str) -> list[Instruction]:
    """Who uses an array, where a bitcast is not use."""
    found = []
    for user in users.get(name, ()):
        found += _through(users, user.name) if user.opcode == "bitcast" else [user]
    return found


def _origin(name: str, inside: Mapping[str, Instruction]) -> str:
    while inside[name].opcode in ("bitcast", "copy", "convert"):
        name = inside[name].operands[0]
    return name


def _far(arrays: tuple[Array, ...]) -> float:
    return sum(array.bytes for array in arrays if not array.near)


def _over(sizes: list[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
