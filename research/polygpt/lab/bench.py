"""What a variant costs: time, memory and FLOPs over the length of the row, forward, backward and decoding."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polygpt.attention.contract import Attention, Context, Dims, causal_mean
from polygpt.attention.masks import DECODER, Meta
from polygpt.nn.positions import Rope

REPEATS = 7
"""Timed runs of each program; the median counts."""
KINDS = ("forward", "forward and backward", "decode")
"""What is measured. A decode step adds one position to a cache that is full up to it."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """One program of one variant.

    Attributes:
        variant: its name.
        length: T, positions of the row, or of the cache.
        kind: one of `KINDS`.
        seconds: median of `REPEATS` runs.
        megabytes: most memory at a time beside the parameters: temporaries, results and, decoding, the cache.
        gflops: by formula: 2 a parameter and position for the projections, the variant's `score_flops`, on
            average over the positions of a causal row, and three times as much with the backward pass.
    """

    variant: str
    length: int
    kind: str
    seconds: float
    megabytes: float
    gflops: float


def compare(
    specs: dict[str, Attention], lengths: tuple[int, ...], width: int, rows: int, dtype: str
) -> Iterator[list[Cost]]:
    """Measures each variant at each length, their runs taking turns, so that a busy moment hits all of them.

    Args:
        specs: the variants by name.
        lengths: T, in any order.
        width: D.
        rows: B.
        dtype: to compute in.

    Yields:
        The costs of one length and kind, in the order of `specs`.
    """
    for length in lengths:
        for kind in KINDS:
            programs = {name: program(spec, kind, length, width, rows, dtype) for name, spec in specs.items()}
            seconds = {name: [] for name in specs}
            for _ in range(REPEATS):
                for name, (run, _, _) in programs.items():
                    start = time.perf_counter()
                    jax.block_until_ready(run())
                    seconds[name].append(time.perf_counter() - start)
            yield [
                Cost(name, length, kind, statistics.median(seconds[name]), megabytes, gflops)
                for name, (_, megabytes, gflops) in programs.items()
            ]


def program(spec: Attention, kind: str, T: int, width: int, rows: int, dtype: str) -> tuple[Callable, float, float]:
    """(a warm function of no arguments, its memory in MB, its GFLOPs)."""
    dims = Dims(width, dtype, Rope())
    graphdef, params = nnx.split(jax.jit(lambda: spec.build(dims, nnx.Rngs(0)))())
    query_T = 1 if kind == "decode" else T
    rng = np.random.default_rng(0)
    x_BTD = jnp.asarray(rng.normal(size=(rows, query_T, width)), dtype)

    def meta(start, length):
        index = jnp.broadcast_to(jnp.arange(start, start + length, dtype=jnp.int32)[None], (rows, length))
        return Meta(index, index, jnp.ones_like(index), jnp.zeros_like(index), jnp.zeros_like(index))

    def forward(params, x_BTD, meta):
        return nnx.merge(graphdef, params)(x_BTD, Context(meta, meta, DECODER))[0]

    def backward(params, x_BTD, meta):
        y_BTD, back = jax.vjp(lambda params, x_BTD: forward(params, x_BTD, meta), params, x_BTD)
        return back(y_BTD)

    def decode(params, x_BTD, query, seen, cache):
        return nnx.merge(graphdef, params)(x_BTD, Context(query, seen, DECODER, jnp.int32(T - 1)), cache)

    if kind == "decode":
        cache = spec.init_cache(dims, rows, T)
        arguments = [params, x_BTD, meta(T - 1, 1), meta(0, T), cache]
        compiled = jax.jit(decode, donate_argnums=4).lower(*arguments).compile()

        def run():
            y_BTD, arguments[4] = compiled(*arguments)
            return y_BTD

    else:
        arguments = [params, x_BTD, meta(0, T)]
        compiled = jax.jit(forward if kind == "forward" else backward).lower(*arguments).compile()

        def run():
            return compiled(*arguments)

    memory = compiled.memory_analysis()
    megabytes = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6
    projections = 2 * sum(prod(leaf.shape) for leaf in jax.tree.leaves(params) if leaf.ndim >= 2)
    one = functools.partial(spec.score_flops, width)
    scores = one(T) if kind == "decode" else causal_mean(one, T)
    flops = rows * query_T * (projections + scores)
    jax.block_until_ready(run())
    return run, megabytes, flops * (3 if kind == "forward and backward" else 1) / 1e9


def plot(costs: list[Cost], path, title: str) -> None:
    """Writes a PNG: time and memory over T, a column a kind, a line a variant."""
    from matplotlib.figure import Figure

    from polygpt.lab import picture

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, len(KINDS), sharex=True)
    for column, kind in enumerate(KINDS):
        for name in dict.fromkeys(cost.variant for cost in costs):
            own = sorted((c for c in costs if (c.variant, c.kind) == (name, kind)), key=lambda cost: cost.length)
            lengths = [cost.length for cost in own]
            axes[0, column].plot(lengths, [1e3 * cost.seconds for cost in own], "o-", label=name)
            axes[1, column].plot(lengths, [cost.megabytes for cost in own], "o-", label=name)
        axes[0, column].set(title=kind, xscale="log", yscale="log", ylabel="ms" if column == 0 else None)
        axes[1, column].set(xlabel="T", xscale="log", yscale="log", ylabel="MB" if column == 0 else None)
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(title)
    picture.save(figure, path)
