"""FLOPs and memory traffic per step of a compiled program, on one device."""

import base64
import binascii
import functools
import math
import re
from collections.abc import Iterator, Mapping

from jaxlib.mlir import ir
from jaxlib.mosaic.python import tpu

from polygpt.attention.kernels.flex import BLOCK
from polygpt.scale.plan.hlo import Array, Executed, Instruction, Program

PRODUCTS = {
    "splash_mha_fwd": (1, 1),
    "splash_mha_dq": (2, 1),
    "splash_mha_dkv": (2, 2),
    "flex_forward": (1, 1),
    "flex_backward_query": (2, 1),
    "flex_backward_key": (2, 2),
}
"""Number of matrix products of size B H T S d and of size B H T S e per attention kernel, by prefix of its name.

d and e are the widths of queries and values. The forward kernel computes the scores and the weighted values. Both
backward kernels recompute the scores and dP; one computes dQ, the other dK and dV. That is seven products, where the
formula of useful FLOPs counts four."""

_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "iota",
         "after-all", "partition-id", "replica-id", "copy-done", "slice-done", "async-done", "async-update",
         "call-done", "async-start", "call-start", "all-gather-done", "all-reduce-done", "collective-permute-done",
         "opt-barrier", "send-done", "recv-done", "dynamic-slice-done", "dynamic-update-slice-done"}  # fmt: skip
"""Opcodes that move no bytes of their own."""


def products(program: Program) -> float:
    """FLOPs of XLA's matrix products and convolutions, 2 per multiply-add, without custom kernels."""
    return sum(run.times * _product(run) for run in program.executed())


def kernel_flops(program: Program, causal_share: float = 1.0) -> dict[str, float]:
    """FLOPs of attention kernels, by name, for unpacked rows. Kernels compute whole blocks, which are counted as such.

    With a causal mask, kernels skip the blocks above the diagonal, which are not counted; with other masks all blocks
    count. Of devices that split positions the busiest is counted, which has `causal_share` times the mean. Blocks that
    are empty because of the data, in packed rows and in slots without an item, count too. An unknown kernel counts 0,
    but its name is in the result.
    """
    found: dict[str, float] = {}
    for run in program.executed():
        instruction = run.instruction
        if instruction.opcode != "custom-call" or '"tpu_custom_call"' not in instruction.text:
            continue
        name = re.sub(r"(\.clone)?(\.\d+)*$", "", instruction.name)
        known = next((what for begins, what in PRODUCTS.items() if name.startswith(begins)), None)
        found[name] = found.get(name, 0.0) + (run.times * _attention(run, *known, causal_share) if known else 0.0)
    return found


def _attention(run: Executed, of_d: int, of_e: int, causal_share: float) -> float:
    wide = [array for name in run.instruction.operands for array in run.within[name].results if len(array.shape) == 4]
    if len(wide) < 3:
        return 0.0
    (B, H, T, d), S, e = wide[0].shape, wide[1].shape[2], wide[2].shape[3]
    blocks = max(-(-S // BLOCK), 1)
    body = re.search(r'"body":"([^"]*)"', run.instruction.text)
    causal = _causal(body.group(1) if body else "")
    seen = min(1.0, causal_share * (blocks + 1) / (2 * blocks)) if causal else 1.0
    return 2.0 * B * H * T * S * (of_d * d + of_e * e) * seen


@functools.cache
def _causal(body: str) -> bool:
    """Whether a kernel compares the order of query and key positions, as decoder masks do and tower masks do not.

    The name does not tell, because towers with a length that splash attention does not support use the same kernels as
    decoders. So the kernel's code is searched for an order comparison of query with key positions, neither of them a
    constant. A kernel whose code cannot be parsed counts as causal, which gives the lower bound on its FLOPs.
    """
    if not body:
        return True
    found = []

    def see(operation: ir.Operation) -> ir.WalkResult:
        if operation.name.endswith("arith.cmpi") and operation.attributes["predicate"].value in _ORDER:
            found.append(all(_of_positions(operand) for operand in operation.operands))
        return ir.WalkResult.ADVANCE

    try:
        with ir.Context() as context:
            context.allow_unregistered_dialects = True
            tpu.register_dialect(context)
            ir.Module.parse(base64.b64decode(body)).operation.walk(see)
    except (ir.MLIRError, binascii.Error):
        return True
    return any(found)


_ORDER = (2, 3, 4, 5)
"""MLIR's codes of the signed predicates "<", "<=", ">" and ">=" of `arith.cmpi`."""


def _of_positions(value: ir.Value) -> bool:
    """Whether the value is a tile broadcast from a vector of positions, not a scalar or a constant."""
    made_by = value.owner
    spread = isinstance(made_by, ir.Operation | ir.OpView) and made_by.name.endswith("vector.broadcast")
    return spread and str(made_by.operands[0].type).startswith("vector")


def _product(run: Executed) -> float:
    instruction, within = run.instruction, run.within
    if instruction.opcode == "dot":
        left = within[instruction.operands[0]].results[0].shape
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        inner = [left[int(n)] for n in contracted.group(1).split(",") if n] if contracted else []
        return 2.0 * instruction.results[0].size * math.prod(inner)
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
    """Pairs of an output and a kernel position that meet an input element; padding and dilation gaps do not count."""
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
    """Bytes read from and written to a device's memory per step.

    Each instruction outside fusions reads its operands and writes its results. Arrays in on-chip memory (VMEM) cost
    nothing. Of a sliced array only the slice counts, and of an array updated in place only the update. Caches and tile
    padding are ignored: this is an estimate from the HLO text, not a profile.
    """
    return sum(run.times * _bytes_moved(run, program) for run in program.executed() if not run.fused)


def _bytes_moved(run: Executed, program: Program) -> float:
    instruction, within = run.instruction, run.within
    opcode = instruction.opcode
    if opcode in _FREE or _ALLOCATION in instruction.text:
        return 0.0
    operands = [within[name] for name in instruction.operands if name in within]
    if opcode in _SLICES:
        return instruction.bytes * bool(_hbm_bytes(operands[0].results)) + _hbm_bytes(instruction.results)
    if opcode in ("slice-start", "dynamic-slice-start"):  # result: ((operands), slice, context)
        cut = instruction.results[-2]
        return cut.bytes * (bool(_hbm_bytes(operands[0].results)) + (not cut.on_chip))
    if opcode in ("dynamic-update-slice", "dynamic-update-slice-start", "scatter"):
        update = operands[-1 if opcode == "scatter" else 1]
        return _hbm_bytes(update.results) + update.bytes * bool(_hbm_bytes(operands[0].results))
    if opcode == "copy-start":
        return _hbm_bytes(operands[0].results) + _hbm_bytes(instruction.results[:1])
    if opcode in ("collective-permute-start", "all-gather-start"):  # the result includes the operands
        return _hbm_bytes(instruction.results)
    if opcode == "fusion":
        return _fusion_bytes(instruction, operands, program)
    return _hbm_bytes(instruction.results) + sum(_hbm_bytes(operand.results) for operand in operands)


_ALLOCATION = 'custom_call_target="AllocateBuffer"'
"""Custom call that only allocates memory for other instructions to write to."""
_SLICES = ("dynamic-slice", "slice", "gather")
_PASS_THROUGH = ("bitcast", "copy", "convert")
"""Elementwise or layout opcodes inside a fusion, of which only the elements in use are computed."""


def _fusion_bytes(fusion: Instruction, operands: list[Instruction], program: Program) -> float:
    """Bytes moved by a fusion. Of sliced operands only the slices count, of results updated in place the updates."""
    inside = program.computations[fusion.called()["calls"]]
    root = next(instruction for instruction in inside.values() if instruction.root)
    names = root.operands if root.opcode == "tuple" else [root.name] * len(fusion.results)
    updated, moved = set(), 0.0
    for name, array in zip(names, fusion.results, strict=False):
        update = _update(program, inside, name) if root.opcode == "tuple" or len(names) == 1 else None
        if update and inside[update[0]].results[0].dtype != array.dtype:
            update = None  # an update in place needs the same dtype
        updated |= {update[0]} if update else set()
        if not array.on_chip:
            moved += min(update[1] / update[2], 1.0) * array.bytes if update else array.bytes
    for parameter, operand in _pairs(inside, operands):
        if whole := _hbm_bytes(operand.results):
            moved += min(_read_share(program, inside, parameter.name, parameter.name in updated), 1.0) * whole
    return moved


def _pairs(inside: Mapping[str, Instruction], given: list) -> Iterator[tuple[Instruction, Instruction]]:
    """The parameters of a fusion, each with its argument."""
    for instruction in inside.values():
        if instruction.opcode == "parameter":
            number = int(re.search(r"parameter\((\d+)\)", instruction.text).group(1))
            if number < len(given):
                yield instruction, given[number]


def _read_share(program: Program, inside: Mapping[str, Instruction], name: str, updated: bool) -> float:
    """The share of an array that a fusion reads; below 1 if it, or fusions nested in it, only slice the array.

    An update in place (`updated`) does not read the array.
    """
    share = 0.0
    for user in inside.values():
        if name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == name and name not in user.operands[1:]:
            share += user.results[0].size / max(inside[name].results[0].size, 1)
        elif user.opcode in _PASS_THROUGH and not user.root:
            share += _read_share(program, inside, user.name, updated)
        elif user.opcode == "fusion":
            within = program.computations[user.called()["calls"]]
            given = _pairs(within, list(user.operands))
            share += sum(_read_share(program, within, own.name, updated) for own, what in given if what == name)
        elif not (updated and user.opcode == "dynamic-update-slice" and user.operands[0] == name):
            return 1.0
        if share >= 1.0:
            return 1.0
    return share


def _update(program: Program, inside: Mapping[str, Instruction], name: str) -> tuple[str, int, int] | None:
    """(parameter, updated elements, all elements) if a result is a parameter updated in place; else None."""
    while inside[name].opcode in _PASS_THROUGH:
        name = inside[name].operands[0]
    made_by = inside[name]
    if made_by.opcode == "dynamic-update-slice":
        into = _origin(inside, made_by.operands[0])
        return (into, inside[made_by.operands[1]].results[0].size, made_by.results[0].size) if into else None
    if made_by.opcode != "fusion":
        return None
    within = program.computations[made_by.called()["calls"]]
    found = _update(program, within, next(i.name for i in within.values() if i.root))
    given = dict((own.name, what) for own, what in _pairs(within, list(made_by.operands))) if found else {}
    into = _origin(inside, given[found[0]]) if found else None
    return (into, *found[1:]) if into else None


def _origin(inside: Mapping[str, Instruction], name: str) -> str | None:
    """The parameter that an array is a bitcast, copy or conversion of; None if it is none."""
    while inside[name].opcode in _PASS_THROUGH:
        name = inside[name].operands[0]
    return name if inside[name].opcode == "parameter" else None


def _hbm_bytes(arrays: tuple[Array, ...]) -> float:
    return sum(array.bytes for array in arrays if not array.on_chip)
