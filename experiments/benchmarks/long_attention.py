"""Attention over long sequences on this machine: materialised scores versus blockwise attention, full and windowed.

    python experiments/benchmarks/long_attention.py
    python experiments/benchmarks/long_attention.py --lengths 1024 4096 --heads 6 --backward

One row, causal, float32. For each length T it prints the median milliseconds, over runs that alternate between the
implementations, and the compiled program's temporary memory in MiB, of

    reference          materialises the T x T scores
    chunked            blockwise, skips blocks in the future
    chunked, window    blockwise, computes only blocks that the window reaches

and the speedup of the other two over the reference.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.attention.kernels import chunked, reference
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import DECODER, Mask
from polygpt.attention.meta import Meta


@dataclasses.dataclass(frozen=True)
class Recent(Mask):
    """The key is fewer than `size` positions back."""

    size: int = 1024
    """Window size, in positions."""

    def __call__(self, query, key):
        return query.position - key.position < self.size


def problem(T: int, heads: int, width: int) -> Operands:
    """Random queries, keys and values for one sequence of T positions."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(1, heads, T, width)), jnp.float32) for _ in range(3))
    place = jnp.arange(T, dtype=jnp.int32)[None]
    zeros = jnp.zeros_like(place)
    meta = Meta(place, place, zeros + 1, zeros, zeros)
    return Operands(query * width**-0.5, key, value, meta, meta)


def compiled(attend, mask: Mask, operands: Operands, backward: bool):
    """The compiled program: it returns the output, or with `backward` the gradients of queries, keys and values."""

    def total(arrays, operands):
        query, key, value = arrays
        operands = dataclasses.replace(operands, query_BHTd=query, key_BKSd=key, value_BKSe=value)
        return jnp.sum(jnp.sin(attend(Rule(mask), operands)[0]))

    def run(operands):
        if not backward:
            return attend(Rule(mask), operands)[0]
        return jax.grad(total)((operands.query_BHTd, operands.key_BKSd, operands.value_BKSe), operands)

    return jax.jit(run).lower(operands).compile()


def measured(T: int, arguments) -> dict[str, dict[str, float]]:
    """Milliseconds and MiB of each implementation."""
    operands = problem(T, arguments.heads, arguments.width)
    window = DECODER & Recent(arguments.window)
    sides = {
        "reference": compiled(reference.attend, DECODER, operands, arguments.backward),
        "chunked": compiled(chunked.attend, DECODER, operands, arguments.backward),
        "chunked, window": compiled(chunked.attend, window, operands, arguments.backward),
    }
    seconds = {name: [] for name in sides}
    for index in range(arguments.runs + 1):
        for name, program in sides.items():
            start = time.perf_counter()
            jax.block_until_ready(program(operands))
            if index:  # the first run warms up caches
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "ms": statistics.median(seconds[name]) * 1e3,
            "MiB": program.memory_analysis().temp_size_in_bytes / 2**20,
        }
        for name, program in sides.items()
    }


def main() -> None:
    """Runs the benchmark and prints its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="T of each line")
    parser.add_argument("--window", type=int, default=1024, help="positions that the window reaches (default 1024)")
    parser.add_argument("--heads", type=int, default=2, help="heads (default 2)")
    parser.add_argument("--width", type=int, default=64, help="width of a head (default 64)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each side (default 5)")
    parser.add_argument("--backward", action="store_true", help="forward and backward instead of forward alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args()

    lines = {}
    for T in arguments.lengths:
        print(f"\rT {T}", end="", file=sys.stderr, flush=True)
        lines[T] = measured(T, arguments)
    print(file=sys.stderr)
    if arguments.json:
        print(json.dumps({"lengths": lines, "backward": arguments.backward, "jax": jax.__version__}))
        return
    print(f"{'T':>7} {'reference':>18} {'chunked':>26} {'chunked, window':>26}")
    for T, sides in lines.items():
        cells = []
        for name, side in sides.items():
            ratio = "" if name == "reference" else f" {sides['reference']['ms'] / side['ms']:6.1f}x"
            cells.append(f"{side['ms']:7.1f} ms {side['MiB']:7.1f}{ratio}")
        print(f"{T:7} " + " ".join(cells))
    print("milliseconds, MiB of temporary memory, times faster than the reference")


if __name__ == "__main__":
    main()
