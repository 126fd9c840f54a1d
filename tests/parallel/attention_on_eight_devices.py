"""Attends with rows, heads and positions split over eight CPU devices, in problems of every kind of mask and term.

Argument: "quick" or "slow", to print as JSON what was compared, or "programs", for what the compiled programs hold. Run
as a process of its own: the number of devices is set once a process.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
sys.path.insert(0, str(Path(__file__).parents[1] / "attention"))

from problems import Case, Gates, SameSpeaker, Slopes, Table, Together, assert_agrees, made, part_of, rows_of  # noqa: E402

from polygpt import sharding  # noqa: E402
from polygpt.attention.kernels import dispatch  # noqa: E402
from polygpt.attention.kernels.problem import Operands, Rule  # noqa: E402
from polygpt.attention.masks import DECODER, ENCODER, Causal, Prefix, SameSegment, Sinks, Window  # noqa: E402
from polygpt.attention.meta import Meta  # noqa: E402
from polygpt.attention.scores import Scale, SoftCap  # noqa: E402
from polygpt.errors import SpecError  # noqa: E402

T = 16
CASES = {
    "spans": Case("spans"),
    "one key head": Case("spans", heads=(4, 1)),
    "three key heads": Case("packed", heads=(6, 3)),
    "nothing seen": Case("empty", score=Gates(), heads=(2, 2)),
    "encoder": Case("packed", ENCODER, heads=(2, 2)),
    "window": Case("packed", DECODER & Window(3)),
    "prefix": Case("packed", SameSegment() & (Causal() | Prefix(5))),
    "sinks": Case("spans", DECODER & (Window(3) | Sinks(2))),
    "labels": Case("labels", DECODER & SameSpeaker()),
    "slopes": Case("packed", score=Slopes()),
    "table": Case("spans", score=SoftCap(2.0).then(Table())),
    "gates": Case("spans", score=Scale(2.0).then(Gates())),
    "sigmoid": Case("spans", score=Gates().then(Slopes()), normalizer="sigmoid"),
    "other keys": Case("cross", ENCODER),
    "one query": Case("one query"),
    "odd lengths": Case("odd"),
    "pairs": Case("packed", score=Together().then(Slopes())),
}
"""The devices divide the positions of all but one query and odd lengths."""
MESHES = {
    "sequence 8": {"sequence": 8},
    "sequence 4, tensor 2": {"sequence": 4, "tensor": 2},
    "data 2, sequence 2, tensor 2": {"data": 2, "sequence": 2, "tensor": 2},
    "tensor 8": {"tensor": 8},
    "fsdp 4, sequence 2": {"fsdp": 4, "sequence": 2},
}


def layout_of(name: str) -> tuple[Meta, Meta]:
    """Metadata of queries and keys."""
    packed = rows_of([[7, 5, 2], [3, 13]], T)
    span = np.zeros((2, T), np.int32)
    span[0, 2:6], span[0, 8:11], span[1, 3:14] = 1, 2, 1  # over the borders between devices
    match name:
        case "spans":
            return (dataclasses.replace(packed, span=span),) * 2
        case "labels":
            return (dataclasses.replace(packed, extra={"speaker": packed.position // 2 % 3 - 1}),) * 2
        case "empty":
            return (rows_of([[13], []], T),) * 2
        case "cross":
            return rows_of([[5, 2], [8]], 8), rows_of([[6, 7, 2], [3, 12]], T)
        case "one query":
            return part_of(packed, slice(11, 12)), packed
        case "odd":
            return (rows_of([[7, 9, 3], [4, 11]], 19),) * 2
    return packed, packed


def problem(name: str) -> tuple[Rule, Operands]:
    """One of `CASES`."""
    case = CASES[name]
    rule, operands = made(case, *layout_of(case.layout), np.random.default_rng(0))
    return rule, operands


@functools.cache
def split(mesh: str, context: str, backend: str):
    """`attend` over this mesh."""
    layout = sharding.make_layout(sharding.MeshSpec(data=1, context=context).replace(**MESHES[mesh]), jax.devices())

    def attend(rule, operands):
        with sharding.use_layout(layout), dispatch.in_blocks_of(2):
            return dispatch.attend(rule, operands, backend, strict=True)

    return attend


def compared(mesh: str, context: str, backend: str, names=tuple(CASES)) -> list[str]:
    """Raises where values are not those of float64, or gradients not those of one device."""
    names = [name for name in names if name != "pairs" or context != "ring"]  # where pairs are refused
    for name in names:
        assert_agrees(split(mesh, context, backend), *problem(name))
    return [f"{mesh}, {context}, {backend}: {name}" for name in names]


def refusal() -> str:
    """What terms of pairs are told in a ring."""
    try:
        split("sequence 8", "ring", "reference")(*problem("pairs"))
    except SpecError as error:
        return str(error)
    return ""


def compiled(context: str, length: int):
    """A program with gradients of rows of this length, over eight devices."""
    layout = sharding.make_layout(sharding.MeshSpec(data=1, sequence=8, context=context), jax.devices())

    def shape(dtype, names, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=layout.sharding(names, sizes))

    arrays = [shape(jnp.float32, ("batch", "heads", "positions", None), 1, 2, length, 64)] * 3
    meta = Meta(*[shape(jnp.int32, ("batch", "positions"), 1, length)] * 5)

    def loss(operands):
        with sharding.use_layout(layout):
            return jnp.sum(dispatch.attend(Rule(DECODER), operands, "chunked", strict=True)[0])

    return jax.jit(jax.grad(loss, allow_int=True)).lower(Operands(*arrays, meta, meta)).compile()


def programs() -> dict:
    """Of each context: bytes of temporaries by length, and how often the text has each collective."""
    found = {}
    for context in ("gather", "ring"):
        programs = {length: compiled(context, length) for length in (2048, 4096)}
        text = programs[2048].as_text()
        found[context] = {
            "temporaries": [program.memory_analysis().temp_size_in_bytes for program in programs.values()],
            **{name: text.count(f" {name}(") for name in ("collective-permute", "all-gather")},
        }
    return found


QUICK = [
    ("sequence 4, tensor 2", "ring", "reference", ("spans", "nothing seen", "sigmoid", "one query")),
    ("data 2, sequence 2, tensor 2", "gather", "reference", ("table", "gates", "odd lengths", "pairs")),
    ("tensor 8", "gather", "reference", ("one key head",)),
]
SOME = ("spans", "one key head", "three key heads", "nothing seen", "table", "sigmoid", "odd lengths")
SLOW = [
    *(
        (mesh, context, "reference")
        for mesh in ("sequence 4, tensor 2", "data 2, sequence 2, tensor 2")
        for context in ("gather", "ring")
    ),
    *(("sequence 8", context, "reference", SOME) for context in ("gather", "ring")),
    ("tensor 8", "gather", "reference", SOME),
    ("fsdp 4, sequence 2", "ring", "reference", SOME),
    ("sequence 4, tensor 2", "ring", "chunked", ("spans", "nothing seen", "gates", "sigmoid", "window")),
    ("sequence 4, tensor 2", "ring", "flex", ("spans", "nothing seen", "table", "sigmoid", "three key heads")),
    ("data 2, sequence 2, tensor 2", "gather", "flex", ("spans", "gates")),
]

if __name__ == "__main__":
    assert len(jax.devices()) == 8
    if sys.argv[1] == "programs":
        print(json.dumps(programs()))
    else:
        done = [line for chosen in (SLOW if sys.argv[1] == "slow" else QUICK) for line in compared(*chosen)]
        print(json.dumps({"compared": done, "refused": refusal()}))
