"""Benchmarks of variants: time, memory and FLOPs by row length, for forward, backward and decoding."""

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
from polygpt.attention.masks import DECODER
from polygpt.attention.meta import Meta
from polygpt.nn.positions import Rope

REPEATS = 7
"""Number of timed runs per program; the median is reported."""
KINDS = ("forward", "forward and backward", "decode")
"""The measured programs. A decode step adds the last position to an otherwise full cache."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """One program of one variant.

    Attributes:
        variant: its name.
        length: T, number of positions of the row, or of the cache.
        kind: one of `KINDS`.
        seconds: median of `REPEATS` runs.
        fastest, slowest: the fastest and slowest of these runs, in seconds.
        megabytes: peak memory, excluding parameters: temporaries, results and, in decoding, the cache.
        moved: MB read and written by the compiled program, from XLA's cost analysis; shows the effect of fewer key
            heads.
        gflops: by formula: 2 FLOPs per parameter and position for projections, plus the variant's `score_flops`
            averaged over a causal row; three times as much with the backward pass.
        counted: GFLOPs of the compiled program, from XLA's cost analysis. A materialised matrix counts in full,
            including masked pairs.
        whole: whether `counted` and `moved` are complete: loop bodies count only once, fused kernels hardly at all.
    """

    variant: str
    length: int
    kind: str
    seconds: float
    fastest: float
    slowest: float
    megabytes: float
    moved: float
    gflops: float
    counted: float
    whole: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, with figures as in `Cost`.

    Attributes:
        run: runs the program once; already warmed up.
    """

    run: Callable[[], object]
    megabytes: float
    moved: float
    gflops: float
    counted: float
    whole: bool


def compare(
    specs: dict[str, Attention], lengths: tuple[int, ...], width: int, rows: int, dtype: str
) -> Iterator[list[Cost]]:
    """Measures each variant at each length. Runs of the variants alternate, so that background load affects all.

    Args:
        specs: the variants by name.
        lengths: T, in any order.
        width: D.
        rows: B.
        dtype: compute dtype.

    Yields:
        The costs of one length and kind, in the order of `specs`.
    """
    for length in lengths:
        for kind in KINDS:
            programs = {name: program(spec, kind, length, width, rows, dtype) for name, spec in specs.items()}
            seconds = {name: [] for name in specs}
            for _ in range(REPEATS):
                for name, one in programs.items():
                    start = time.perf_counter()
                    jax.block_until_ready(one.run())
                    seconds[name].append(time.perf_counter() - start)
            yield [_cost(name, length, kind, seconds[name], one) for name, one in programs.items()]


def _cost(name: str, length: int, kind: str, seconds: list[float], one: Program) -> Cost:
    figures = {field.name: getattr(one, field.name) for field in dataclasses.fields(one) if field.name != "run"}
    return Cost(name, length, kind, statistics.median(seconds), min(seconds), max(seconds), **figures)


def doubts(costs: list[Cost]) -> list[str]:
    """Warnings where a variant's formula and its compiled decode step, one query that sees all keys, clearly differ.

    Softmax and mask, which formulas do not count, explain a factor of 1.4 for 8-channel heads, less for wider ones.
    """
    steps = {cost.variant: cost for cost in sorted(costs, key=lambda cost: cost.length) if cost.kind == "decode"}
    return [
        f"{name}: score_flops() and projections give {flops_text(one.gflops * 1e9)}FLOPs for a decode step at T "
        f"{one.length:,}, the compiled program {flops_text(one.counted * 1e9)}FLOPs: check the formula"
        for name, one in steps.items()
        if one.whole and not 0.8 <= one.counted / one.gflops <= 1.5
    ]


def flops_text(count: float) -> str:
    """A number with three significant digits and a unit prefix: "655 k", "1.07 G"."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{float(f'{count / size:.3g}'):g} {prefix}"
    return f"{float(f'{count:.3g}'):g} "


def program(spec: Attention, kind: str, T: int, width: int, rows: int, dtype: str) -> Program:
    """One program, compiled and run once."""
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

    memory, counted, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    megabytes = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6
    projections = 2 * sum(prod(leaf.shape) for leaf in jax.tree.leaves(params) if leaf.ndim >= 2)
    one = functools.partial(spec.score_flops, width)
    scores = one(T) if kind == "decode" else causal_mean(one, T)
    flops = rows * query_T * (projections + scores)
    jax.block_until_ready(run())
    return Program(
        run,
        megabytes,
        moved=counted.get("bytes accessed", 0.0) / 1e6,
        gflops=flops * (3 if kind == "forward and backward" else 1) / 1e9,
        counted=counted.get("flops", 0.0) / 1e9,
        whole=" while(" not in text and "custom-call(" not in text,
    )


def plot(costs: list[Cost], path, title: str) -> None:
    """Plots time and memory over T, with one column per kind and one line per variant."""
    from matplotlib.figure import Figure

    from polygpt.lab import picture

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, len(KINDS), sharex=True)
    for column, kind in enumerate(KINDS):
        for name in dict.fromkeys(cost.variant for cost in costs):
            own = sorted((c for c in costs if (c.variant, c.kind) == (name, kind)), key=lambda cost: cost.length)
            lengths = [cost.length for cost in own]
            axes[0, column].plot(lengths, [1e3 * cost.seconds for cost in own], "o-", label=name)
            fastest, slowest = ([1e3 * getattr(cost, side) for cost in own] for side in ("fastest", "slowest"))
            axes[0, column].fill_between(lengths, fastest, slowest, alpha=0.2)
            axes[1, column].plot(lengths, [cost.megabytes for cost in own], "o-", label=name)
        axes[0, column].set(title=kind, xscale="log", yscale="log", ylabel="ms" if column == 0 else None)
        axes[1, column].set(xlabel="T", xscale="log", yscale="log", ylabel="MB" if column == 0 else None)
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(title)
    picture.save(figure, path)
