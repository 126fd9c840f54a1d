"""Training step of a small text GPT versus the same GPT in PyTorch eager mode, alternating in one process.

    pip install torch==2.13.0        # a CPU build
    python experiments/benchmarks/text_step.py

6 blocks, width 384, 6 heads, T 256, batch 8, vocabulary 65, float32, AdamW with clipping. Both sides have LayerNorm,
biases, tanh GELU, learned positions and a tied head, and use their library's fastest attention on a CPU: for PyTorch
the fused `scaled_dot_product_attention`. The measured step is the one that `polygpt train` runs.

Prints medians, quartiles, the ratio PyTorch / polygpt (above 1: polygpt is faster), and the large copies in the
compiled program.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections import Counter
from math import prod

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
from polygpt.sequence import Batch
from polygpt.training.parallel import build
from polygpt.training.state import create
from polygpt.training.step import Recipe, make_step

DEPTH, WIDTH, HEADS, T, ROWS, VOCABULARY = 6, 384, 6, 256, 8, 65


def text_batch() -> Batch:
    """Random tokens in full rows."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, T + 1), dtype=np.int32)
    zeros = np.zeros((ROWS, T), np.int32)
    position = np.broadcast_to(np.arange(T, dtype=np.int32), (ROWS, T)).copy()
    weight = np.ones((ROWS, T), np.float32)
    return Batch(tokens[:, :-1], zeros.astype(np.int8), zeros, position, zeros + 1, zeros, tokens[:, 1:], weight, {})


def polygpt_step():
    """(a function that runs one step and returns its loss, the text of the compiled program)."""
    decoder = DecoderSpec(
        width=WIDTH,
        depth=DEPTH,
        attention=MultiHead(HEADS, bias=True),
        mlp=MLP(),
        norm=LayerNorm(),
        position=Learned(T),
        scan=False,
    )
    model = bind(ModelSpec(decoder), VOCABULARY)
    optim = Optim(Constant(1e-3), AdamW())
    transformation = optim.build(model.traits, steps=1000)
    loss = Loss(model, {"next_token": (NextToken(), 1.0)}, optim.trainable(model.traits))
    recipe = Recipe(loss, transformation, optim.schedule.build(1000))
    parallel = build("single", model.axes())
    batch = parallel.put(text_batch())

    def initial():
        return create(model, transformation, 0, ema=False)

    state = parallel.create(initial)
    step = parallel.compile(lambda **devices: make_step(recipe, **devices), initial).lower(state, batch).compile()

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return run, step.as_text()


def torch_step(threads: int):
    """A function that runs one step and returns its loss."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.set_num_threads(threads)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x):
            heads = [
                part.view(ROWS, T, HEADS, -1).transpose(1, 2) for part in self.qkv(self.attention_norm(x)).chunk(3, -1)
            ]
            y = functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.output(y.transpose(1, 2).reshape(ROWS, T, WIDTH))
            return x + self.down(functional.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(T, WIDTH)
            self.blocks = nn.Sequential(*[Block() for _ in range(DEPTH)])
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, tokens):
            x = self.text(tokens) + self.position(torch.arange(T))
            return self.norm(self.blocks(x)) @ self.text.weight.T

    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    batch = text_batch()
    tokens, target = torch.from_numpy(batch.tokens_BT.copy()).long(), torch.from_numpy(batch.target_BT.copy()).long()

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(tokens).view(-1, VOCABULARY), target.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return run


def large_copies(program: str, elements: int) -> Counter:
    """Counts of copies and transposes in the compiled program, by shape, of arrays with at least `elements` items."""
    found = re.findall(r"= \w+\[([\d,]+)\]\{[\d,]*\} (?:copy|transpose)\(", program)
    return Counter(shape for shape in found if prod(map(int, shape.split(","))) >= elements)


def main() -> None:
    """Runs the benchmark and prints its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="steps of each side that are timed (default 15)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args()

    ours, program = polygpt_step()
    sides = {"polygpt": ours, "torch": torch_step(os.cpu_count() or 1)}
    seconds = {name: [] for name in sides}
    for index in range(arguments.steps + 2):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if index >= 2:  # the first two runs warm up caches
                seconds[name].append(time.perf_counter() - start)
        print(f"\rstep {index + 1} of {arguments.steps + 2}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = median["torch"] / median["polygpt"]
    weights, hidden = ROWS * HEADS * T * T, ROWS * T * 4 * WIDTH
    copies = large_copies(program, min(weights, hidden))
    if arguments.json:
        print(
            json.dumps({"median_seconds": median, "ratio": ratio, "large_copies": dict(copies), "jax": jax.__version__})
        )
        return
    for name, values in seconds.items():
        low, _, high = statistics.quantiles(values, n=4)
        print(f"{name:8} {median[name] * 1e3:7.0f} ms per step (quartiles {low * 1e3:.0f} to {high * 1e3:.0f})")
    print(f"ratio    {ratio:7.3f}  torch / polygpt, of medians")
    print(f"copies of arrays as large as attention weights or MLP activations: {dict(copies) or 'none'}")


if __name__ == "__main__":
    main()
