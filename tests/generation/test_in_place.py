"""The compiled loop writes a token's positions into the caches in place, reads parameters where they are, and stays on
the device: read from the program, without a clock."""

import functools
import math

import jax
import numpy as np
import pytest

from batches import build, columns, example, lively, tiny
from polygpt.attention.mamba2 import Mamba2
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.sliding import SlidingWindow
from polygpt.generation import decoding
from polygpt.generation.sampling import GREEDY
from polygpt.models.functional import bind
from polygpt.models.low_rank import LowRank
from polygpt.models.prefix import PrefixTuning
from polygpt.scale.plan import hlo

B, T, S, V, WINDOW, HEAD = 2, 8, 120, 31, 48, 16
CACHES = {
    "full": (MultiHead(4, head_width=HEAD), T + S),
    "ring": (SlidingWindow(4, head_width=HEAD, window=WINDOW), WINDOW),
}
"""Attention, and the number of slots of its cache."""
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "call", "conditional"}
"""What writes no array itself."""
HOST = {"infeed", "outfeed", "send", "recv", "custom-call"}


@functools.cache
def lowered(kind: str, scan: bool, size: int = S):
    """(the loop, what it gets)."""
    model = bind(tiny(adapters={}, attention=CACHES[kind][0], scan=scan), V)
    params = jax.eval_shape(model.unstacked, model.abstract())
    batch = build([[example(T, seed=row)] for row in range(B)], T, adapters={})
    numbers = np.int32(V), np.uint32(0), np.arange(B, dtype=np.int32), np.full(B, size, np.int32)
    choice = GREEDY.choice()
    state = jax.eval_shape(functools.partial(decoding.prefill, model, choice, size), params, batch, *numbers)
    return decoding.decode.lower(model, choice, params, state, np.int32(V), np.int32(size)), state


def by_token(program: hlo.Program):
    """What is executed for every token, other than inside fusions."""
    runs = [run for run in program.executed() if run.loops and not run.fused]
    assert len({run.loops[0] for run in runs}) == 1, "one loop over tokens"
    return [run for run in runs if run.instruction.opcode not in FREE]


def in_place(run: hlo.Executed, program: hlo.Program) -> bool:
    """Whether an instruction writes a part of the array that it gets."""
    inside = program.computations.get(run.instruction.called().get("calls", ""), {})
    roots = [one for one in inside.values() if one.root] if inside else [run.instruction]
    return all(one.opcode in ("dynamic-update-slice", "scatter") for one in roots)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
def test_no_token_copies_a_cache_or_the_parameters(kind, scan):
    loop, state = lowered(kind, scan)
    compiled = loop.compile()
    program = hlo.parse(compiled.as_text())
    arrays = [leaf for leaf in jax.tree.leaves(state.cache.layers) if leaf.ndim > 3]
    shape = (B, 4, CACHES[kind][1], HEAD)
    assert [leaf.shape for leaf in arrays] == 2 * 2 * [shape], "keys and values of two layers"
    runs = by_token(program)
    written = [run for run in runs if any(array.size == math.prod(shape) for array in run.instruction.results)]
    assert len(written) == len(arrays), "each is written by one instruction, perhaps row by row"
    assert [run.instruction.text for run in written if not in_place(run, program)] == []
    large = [
        run.instruction.text for run in runs if run not in written and run.instruction.bytes > 4 * math.prod(shape) / 4
    ]
    assert large == [], "nothing else as large as a quarter of a cache, such as the parameters of a layer"
    assert not {run.instruction.opcode for run in program.executed()} & HOST
    memory = compiled.memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)
    assert memory.alias_size_in_bytes >= held, "the caches are donated"
    assert memory.temp_size_in_bytes < held / 4


def test_parameters_taken_apart_are_the_same_parameters():
    """With a pattern, a prefix and low-rank updates, after a prompt and for a token."""
    pattern = (None, Mamba2(heads=4, state_width=8))
    spec = tiny(adapters={}, depth=4, pattern=pattern).replace(
        low_rank=LowRank("query", rank=2), prefix=PrefixTuning(3, "decoder/blocks/0/")
    )
    model = bind(spec, V)
    params = lively(model)
    apart = decoding.prepared(model, params)
    assert {name for name in apart["decoder"]["blocks"]} == {"0", "1"} and "low_rank" not in apart
    batch, found = build([[example(9)]], 9, adapters={}), []
    for own, values in ((model, params), (model.merged, apart)):
        decode = jax.jit(own.decode)
        prompt, cache = decode(values, columns(batch, 0, 8, media=False), own.init_cache(1, 9))
        found.append((prompt, decode(values, columns(batch, 8, 9, media=False), cache)[0]))
    for stacked, separate in zip(*found, strict=True):
        np.testing.assert_allclose(separate, stacked, rtol=0, atol=1e-5)
    assert np.ptp(found[0][1]) > 0.1
