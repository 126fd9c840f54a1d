"""Peak memory of a training step by the decoder's `remat`: what the compiler reserves besides arguments and results.

    python experiments/benchmarks/remat_memory.py

No clock is involved: the step is compiled for this machine, with scanned layers, and the compiler's own analysis is
read. (Without a scan XLA's CPU compiler merges what is recomputed with what it is recomputed from.)
"""

import sys
from typing import get_args, get_type_hints

import harness
import text_gpt

from polygpt.blocks.stack import StackSpec

TITLE = "Peak memory by remat policy"


def run(quick: bool, say) -> dict:
    """MB of each policy, and of parameters with the optimizer's state."""
    shape = dict(width=64, depth=2, length=64, rows=2, vocabulary=512)
    if not quick:
        shape = dict(width=768, depth=12, length=1024, rows=4, vocabulary=50_304)
    temporary = {}
    policies = get_args(get_type_hints(StackSpec)["remat"])
    for policy in policies[:2] if quick else policies:
        say(f"compiling with remat {policy}")
        compiled = text_gpt.lowered(text_gpt.experiment(**shape, scan=True, remat=policy)).compile()
        memory = compiled.memory_analysis()
        temporary[policy] = round(memory.temp_size_in_bytes / 1e6, 1)
    return {"shape": shape, "state_MB": round(memory.argument_size_in_bytes / 1e6, 1), "temporary_MB": temporary}


def tables(result: dict) -> str:
    """A row per policy."""
    said = "{depth} x {width}, T {length}, B {rows}, V {vocabulary:,}, float32; parameters and AdamW's state are "
    said = said.format(**result["shape"]) + f"{harness.number(result['state_MB'])} MB."
    none = result["temporary_MB"]["none"]
    rows = [[name, harness.number(MB), f"{MB / none:.2f}"] for name, MB in result["temporary_MB"].items()]
    return said + "\n\n" + harness.table(["remat", "temporary memory, MB", "of that without"], rows)


def figures(result: dict) -> dict[str, str]:
    """MB by policy."""
    return {name: harness.number(MB) for name, MB in result["temporary_MB"].items()}


if __name__ == "__main__":
    harness.alone(sys.modules[__name__])
