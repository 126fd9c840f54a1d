"""Time to trace and compile a training step by depth.

    python experiments/benchmarks/compile_depth.py

Scanned layers are compiled once, so that the time should hardly depend on the depth; 4 layers that are not scanned
stand beside them. Nothing is taken from a cache.
"""

import sys
import time

import harness
import jax
import text_gpt

TITLE = "Compile time by depth"
DEPTHS = (4, 16, 64)


def compiled(depth: int, scan: bool, quick: bool) -> float:
    """Seconds to trace, lower and compile the step of a text GPT."""
    shape = dict(width=32, length=32, rows=2) if quick else dict(width=256, length=256, rows=4)
    experiment = text_gpt.experiment(depth=depth, vocabulary=512, scan=scan, **shape)
    jax.clear_caches()
    begun = time.perf_counter()
    text_gpt.lowered(experiment).compile()
    return time.perf_counter() - begun


def run(quick: bool, say) -> dict:
    """Seconds by name."""
    depths = (1, 2) if quick else DEPTHS
    sides = {f"depth {depth}": lambda depth=depth: compiled(depth, True, quick) for depth in depths}
    if not quick:
        sides[f"depth {depths[0]}, not scanned"] = lambda: compiled(depths[0], False, quick)
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        seconds = harness.alternate(sides, 1 if quick else harness.REPEATS, 0 if quick else 1, say=say, own_clock=True)
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
    growth = harness.ratio(seconds[f"depth {depths[-1]}"], seconds[f"depth {depths[0]}"])
    return {"seconds": seconds, "growth": growth, "depths": depths}


def tables(result: dict) -> str:
    """A row per depth."""
    rows = [[name, harness.with_quartiles(one)] for name, one in result["seconds"].items()]
    rows.append(
        [f"**{result['depths'][-1]} / {result['depths'][0]} layers**", harness.with_quartiles(result["growth"])]
    )
    return "Width 256, T 256, B 4, float32.\n\n" + harness.table(["layers", "seconds"], rows)


def figures(result: dict) -> dict[str, str]:
    """The ratio of the deepest to the shallowest."""
    return {"growth": f"{result['growth']['median']:.2f}"}


if __name__ == "__main__":
    harness.alone(sys.modules[__name__])
