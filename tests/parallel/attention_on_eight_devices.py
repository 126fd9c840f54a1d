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
sys.path[:0] = [str(Path(__file__).parents[1] / "attention"), str(Path(__file__).parents[1])]

from flax import nnx  # noqa: E402
from problems import Case, Gates, SameSpeaker, Slopes, Table, Together, assert_agrees, made, part_of, rows_of  # noqa: E402

from batches import build, example  # noqa: E402
from polygpt import sharding  # noqa: E402
from polygpt.attention import zigzag  # noqa: E402
from polygpt.attention.kernels import dispatch  # noqa: E402
from polygpt.attention.kernels.problem import Operands, Rule  # noqa: E402
from polygpt.attention.masks import DECODER, ENCODER, Causal, Prefix, SameSegment, Sinks, Window  # noqa: E402
from polygpt.attention.meta import Meta  # noqa: E402
from polygpt.attention.multi_head import MultiHead  # noqa: E402
from polygpt.attention.scores import Scale, SoftCap  # noqa: E402
from polygpt.errors import SpecError  # noqa: E402
from polygpt.models.decoder import Decoder, DecoderSpec  # noqa: E402

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
    """`attend` over this mesh; a context that ends in "zigzag" has positions in that order."""
    kind, _, order = context.partition(", ")
    layout = sharding.make_layout(sharding.MeshSpec(data=1, context=kind).replace(**MESHES[mesh]), jax.devices())
    layout = dataclasses.replace(layout, zigzag=order == "zigzag")

    def attend(rule, operands):
        with sharding.use_layout(layout), dispatch.in_blocks_of(2):
            return dispatch.attend(rule, operands, backend, strict=True)

    return attend


def compared(mesh: str, context: str, backend: str, names=tuple(CASES)) -> list[str]:
    """Raises where values are not those of float64, or gradients not those of one device."""
    names = [name for name in names if name != "pairs" or not context.startswith("ring")]  # where pairs are refused
    devices = MESHES[mesh].get("sequence", 1)
    for name in names:
        rule, operands = problem(name)
        operands = moved(operands, devices) if "zigzag" in context else operands
        assert_agrees(split(mesh, context, backend), rule, operands)
    return [f"{mesh}, {context}, {backend}: {name}" for name in names]


def moved(operands: Operands, devices: int) -> Operands:
    """The problem with its positions in zigzag order, but for pair terms; metadata say where they belong."""

    def along(axis):
        return lambda x: jnp.moveaxis(zigzag.reordered(jnp.moveaxis(jnp.asarray(x), axis, 1), devices), 1, axis)

    terms = dataclasses.replace(
        operands.terms,
        query=jax.tree.map(along(2), operands.terms.query),
        key=jax.tree.map(along(2), operands.terms.key),
    )
    arrays = map(along(2), (operands.query_BHTd, operands.key_BKSd, operands.value_BKSe))
    return Operands(*arrays, *jax.tree.map(along(1), (operands.query, operands.key)), terms)


def exchanged() -> list[int]:
    """The number of shards of the positions of rows that were brought into zigzag order and back."""
    done = []
    for mesh in ({"sequence": 8}, {"data": 2, "sequence": 4}):
        layout = sharding.make_layout(sharding.MeshSpec(**{"data": 1} | mesh), jax.devices())
        x_BTD = jnp.arange(2 * 16 * 3, dtype=jnp.float32).reshape(2, 16, 3)
        there_BTD = jax.jit(lambda x, layout=layout: zigzag.scattered(x, layout))(x_BTD)
        np.testing.assert_array_equal(there_BTD, zigzag.reordered(x_BTD, mesh["sequence"]))
        back_BTD = jax.jit(lambda x, layout=layout: zigzag.restored(x, layout))(there_BTD)
        np.testing.assert_array_equal(back_BTD, x_BTD)
        done.append(16 // back_BTD.addressable_shards[0].data.shape[1])
    return done


def decoder() -> list[int]:
    """Runs a decoder of one block as on one device; how many permutations its program has, by order of positions."""
    module = Decoder(DecoderSpec(width=16, depth=1, attention=MultiHead(2)), rngs=nnx.Rngs(0), dtype="float32")
    graphdef, state = nnx.split(module)
    batch = build([(example(9, seed=1), example(11, seed=2)), (example(30, seed=3),)], 32)
    x_BTD = jnp.float32(np.random.default_rng(0).normal(size=(2, 32, 16)))

    def hidden(state, x_BTD):
        return nnx.merge(graphdef, state)(x_BTD, batch)[0]

    wanted_BTD, found = jax.jit(hidden)(state, x_BTD), []
    for order in ("contiguous", "zigzag"):
        mesh = sharding.MeshSpec(data=2, sequence=4, order=order)
        with sharding.use_layout(sharding.make_layout(mesh, jax.devices())):
            program = jax.jit(lambda state, x_BTD: hidden(state, x_BTD)).lower(state, x_BTD).compile()
        np.testing.assert_allclose(program(state, x_BTD), wanted_BTD, atol=1e-5)
        found.append(program.as_text().count(" collective-permute("))
    return found


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
    ("sequence 4, tensor 2", "ring, zigzag", "reference", ("spans",)),
    ("sequence 4, tensor 2", "gather, zigzag", "reference", ("window", "slopes")),
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
    ("sequence 4, tensor 2", "gather, zigzag", "reference", (*SOME[:-1], "encoder", "prefix", "sinks", "labels")),
    ("sequence 4, tensor 2", "ring, zigzag", "chunked", ("spans", "gates", "sigmoid", "window", "slopes")),
    ("sequence 4, tensor 2", "gather, zigzag", "chunked", ("spans", "pairs")),
    ("sequence 4, tensor 2", "ring, zigzag", "flex", ("spans", "table", "other keys")),
    ("data 2, sequence 2, tensor 2", "gather, zigzag", "flex", ("spans", "gates")),
]

if __name__ == "__main__":
    assert len(jax.devices()) == 8
    if sys.argv[1] == "programs":
        print(json.dumps(programs()))
    else:
        done = [line for chosen in (SLOW if sys.argv[1] == "slow" else QUICK) for line in compared(*chosen)]
        print(json.dumps({"compared": done, "refused": refusal(), "exchanged": exchanged(), "decoder": decoder()}))
