"""Training step of a small text GPT versus the same GPT in PyTorch, alternating in one process.

    pip install torch==2.13.0        # a CPU build
    python experiments/benchmarks/text_step.py
    python experiments/benchmarks/text_step.py --size small --vocabulary 50304 --compile

Sizes: small is 4 blocks, width 128, T 64, batch 12; medium 6 blocks, width 384, T 256, batch 8; large 12 blocks, width
768, T 256, batch 2; tiny is for tests. Float32, AdamW (fused in PyTorch) with clipping. All sides have LayerNorm,
biases, tanh GELU, learned positions and a tied head, and use their library's fastest attention on a CPU: for PyTorch
the fused `scaled_dot_product_attention`. The measured step is the one that `polygpt train` runs.

`make bench BENCH=text_step` measures small, medium and large with both vocabularies. Printed are medians, quartiles,
the ratios PyTorch / polygpt (above 1: polygpt is faster), and the large copies in the compiled program.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import harness
import jax
import numpy as np

from polygpt.attention.multi_head import MultiHead
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.mlp import MLP
from polygpt.nn.norms import LayerNorm
from polygpt.nn.positions import Learned
from polygpt.objectives.loss import Loss
from polygpt.objectives.next_token import NextToken
from polygpt.optim.optim import Optim
from polygpt.optim.optimizers import AdamW
from polygpt.optim.schedules import Constant
from polygpt.runtime.memory import keep_freed_memory
from polygpt.sequence import Batch
from polygpt.training.parallel import build
from polygpt.training.state import create
from polygpt.training.step import Recipe, make_step


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model and of its batch."""

    depth: int
    width: int
    heads: int
    length: int
    rows: int


TITLE = "Training step of a text GPT"
OURS = "polygpt"
SIZES = {
    "tiny": Size(depth=1, width=32, heads=2, length=32, rows=2),
    "small": Size(depth=4, width=128, heads=4, length=64, rows=12),
    "medium": Size(depth=6, width=384, heads=6, length=256, rows=8),
    "large": Size(depth=12, width=768, heads=12, length=256, rows=2),
}
"""By name."""


def text_batch(size: Size, vocabulary: int) -> Batch:
    """Random tokens in full rows."""
    B, T = size.rows, size.length
    tokens = np.random.default_rng(0).integers(0, vocabulary, (B, T + 1), dtype=np.int32)
    zeros = np.zeros((B, T), np.int32)
    position = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    weight = np.ones((B, T), np.float32)
    return Batch(tokens[:, :-1], zeros.astype(np.int8), zeros, position, zeros + 1, zeros, tokens[:, 1:], weight, {})


@dataclasses.dataclass
class Ours:
    """polygpt's side: call it for one step and its loss.

    Attributes:
        step: the jitted step, which donates the state.
        state: the training state.
        batch: on the device.
    """

    step: Callable
    state: Any
    batch: Batch

    def __call__(self) -> float:
        self.state, metrics = self.step(self.state, self.batch)
        return float(metrics["loss"])

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        """The compiled step, to look at."""
        return self.step.lower(self.state, self.batch).compile()


def polygpt_step(size: Size, vocabulary: int) -> Ours:
    """The step as `polygpt train` builds it."""
    decoder = DecoderSpec(
        width=size.width,
        depth=size.depth,
        attention=MultiHead(size.heads, bias=True),
        mlp=MLP(),
        norm=LayerNorm(),
        position=Learned(size.length),
        scan=False,
    )
    spec = ModelSpec(decoder)
    model = bind(spec, vocabulary)
    optim = Optim(Constant(1e-3), AdamW())
    transformation = optim.build(model.traits, steps=1000)
    objectives = {"next_token": (NextToken(), 1.0)}
    loss = Loss(model, objectives, optim.trainable(model.traits), logits_block=spec.logits_block)
    recipe = Recipe(loss, transformation, optim.schedule.build(1000))
    parallel = build("single", model.axes())

    def initial():
        return create(model, transformation, 0, ema=False)

    step = parallel.compile(lambda **devices: make_step(recipe, **devices), initial)
    return Ours(step, parallel.create(initial), parallel.put(text_batch(size, vocabulary)))


def torch_step(size: Size, vocabulary: int, threads: int, compiled: bool = False) -> Callable[[], float]:
    """A function that runs one step and returns its loss; `compiled` puts the model through `torch.compile`."""
    import text_torch
    import torch
    from torch.nn import functional

    torch.set_num_threads(threads)
    model = text_torch.GPT(size.depth, size.width, size.heads, size.length, vocabulary)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batch = text_batch(size, vocabulary)
    tokens, target = torch.from_numpy(batch.tokens_BT.copy()).long(), torch.from_numpy(batch.target_BT.copy()).long()

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(forward(tokens).view(-1, vocabulary), target.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return run


def large_copies(program: str, elements: int) -> Counter:
    """Counts of copies and transposes in the compiled program, by shape, of arrays with at least `elements` items."""
    found = re.findall(r"= \w+\[([\d,]+)\]\{[\d,]*\} (?:copy|transpose)\(", program)
    return Counter(shape for shape in found if prod(map(int, shape.split(","))) >= elements)


def measure(
    size: str = "medium",
    vocabulary: int = 65,
    steps: int = 15,
    compiled: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The figures of one size as JSON data; `compiled` adds `torch.compile` as a third side."""
    harness.need("torch")
    keep_freed_memory()  # as `polygpt train` does, for all sides
    shape, threads = SIZES[size], os.cpu_count() or 1
    ours = polygpt_step(shape, vocabulary)
    sides: dict[str, Callable] = {OURS: ours, "torch": torch_step(shape, vocabulary, threads)}
    if compiled:
        sides["torch.compile"] = torch_step(shape, vocabulary, threads, compiled=True)
    seconds = harness.alternate(sides, steps, warmup=2, say=lambda text: say(f"{size}, V {vocabulary}: {text}"))
    weights = shape.rows * shape.heads * shape.length**2
    hidden = shape.rows * shape.length * 4 * shape.width
    return {
        "size": size,
        **dataclasses.asdict(shape),
        "vocabulary": vocabulary,
        "seconds": seconds,
        "ratio": {name: harness.ratio(times, seconds[OURS]) for name, times in seconds.items() if name != OURS},
        "large_copies": dict(large_copies(ours.compiled.as_text(), min(weights, hidden))),
    }


def run(quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The figures of each size and vocabulary."""
    if quick:
        return [measure("tiny", 65, 2, say=say)]
    steps = {"small": 25, "medium": 9, "large": harness.REPEATS}
    return [measure(size, V, steps[size], True, say) for size in steps for V in (65, 50_304)]


def tables(result: list[dict[str, Any]]) -> str:
    """A row per size and vocabulary."""
    others = [name for name in result[0]["seconds"] if name != OURS]
    rows = []
    for one in result:
        shape = "{depth} x {width}, T {length}, B {rows}, V {vocabulary:,}".format(**one)
        cells = [harness.with_quartiles(one["seconds"][name], 1e3) for name in (OURS, *others)]
        rows.append([shape, *cells, *(harness.with_quartiles(one["ratio"][name]) for name in others)])
    columns = ["model", *(f"{name}, ms" for name in (OURS, *others)), *(f"{name} / {OURS}" for name in others)]
    copies = sum(count for one in result for count in one["large_copies"].values())
    return (
        harness.table(columns, rows)
        + f"\n\nCopies of arrays as large as attention weights or MLP activations: {copies}."
    )


def figures(result: list[dict[str, Any]]) -> dict[str, str]:
    """The ratios by size and side, over all vocabularies."""
    found = {}
    for one in result:
        V = "k" if one["vocabulary"] > 1000 else ""
        for name, ratio in one["ratio"].items():
            found[f"{one['size']}{V}_{name.split('.')[-1]}"] = f"{ratio['median']:.2f}"
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark for one size and prints its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="medium", help="model and batch (default medium)")
    parser.add_argument("--vocabulary", type=int, default=65, help="number of token ids (default 65)")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parser.add_argument("--steps", type=int, default=15, help="steps of each side that are timed (default 15)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    given = parser.parse_args(arguments)
    found = measure(given.size, given.vocabulary, given.steps, given.compile, harness.progress("text_step"))
    print(json.dumps(found) if given.json else tables([found]))


if __name__ == "__main__":
    main()
