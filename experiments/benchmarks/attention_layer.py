"""One attention layer with its projections, by number of positions: forward, forward and backward, and a decoding step.

    python experiments/benchmarks/attention_layer.py

One row, causal, rotary positions, float32. Beside polygpt's families stand the same multi-head layer on PyTorch's
`scaled_dot_product_attention`, with equal weights and outputs compared first, and on FlexAttention under
`torch.compile`, which has no backward pass on CPUs. A decoding step adds the last position to an otherwise full cache.
`polygpt attention bench` measures any variant in this way.
"""

import sys

import harness
import jax
import numpy as np
from flax import nnx

from polygpt.attention.contract import Context, Dims
from polygpt.attention.gated_linear import GatedLinear
from polygpt.attention.latent import MultiHeadLatent
from polygpt.attention.mamba2 import Mamba2
from polygpt.attention.masks import DECODER
from polygpt.attention.meta import Meta
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.sliding import SlidingWindow
from polygpt.lab import bench
from polygpt.nn.positions import Rope

TITLE = "Attention by number of positions"
SDPA, FLEX, FLEX_WINDOW = "PyTorch SDPA", "PyTorch FlexAttention", "FlexAttention, window"
TOLERANCE = 1e-4
"""Largest difference of the outputs of PyTorch's layer with the same weights."""


def families(heads: int, window: int) -> dict:
    """Specifications by the name in the table."""
    return {
        "multi-head": MultiHead(heads),
        "multi-query": MultiHead(heads, kv_heads=1),
        "window": SlidingWindow(heads, window=window),
        "latent": MultiHeadLatent(heads),
        "gated linear": GatedLinear(heads),
        "Mamba-2": Mamba2(),
    }


def torch_layer(width: int, heads: int, T: int):
    """PyTorch's layer: a module with weights of its own, and functions that run it in the three ways."""
    import torch
    from torch import nn
    from torch.nn import functional

    d = width // heads
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(d // 2) / (d // 2))
    cos, sin = angle.cos(), angle.sin()

    def rotate(x, start=0):
        low, high = x.chunk(2, -1)
        c, s = cos[start : start + x.shape[-2]], sin[start : start + x.shape[-2]]
        return torch.cat([low * c - high * s, high * c + low * s], -1)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))

        def heads(self, x, start=0):
            q, k, v = (
                part(x).view(x.shape[0], x.shape[1], heads, d).transpose(1, 2)
                for part in (self.query, self.key, self.value)
            )
            return rotate(q, start), rotate(k, start), v

        def joined(self, y):
            return self.output(y.transpose(1, 2).reshape(y.shape[0], -1, width))

        def forward(self, x):
            return self.joined(functional.scaled_dot_product_attention(*self.heads(x), is_causal=True))

        def decode(self, x, keys, values):
            q, k, v = self.heads(x, T - 1)
            keys[:, :, T - 1 :], values[:, :, T - 1 :] = k, v
            return self.joined(functional.scaled_dot_product_attention(q, keys, values))

    torch.manual_seed(0)
    return Layer()


def torch_sides(layer, kind: str, width: int, heads: int, T: int, window: int, flex: bool) -> dict:
    """PyTorch's sides of one kind of program, by name."""
    import torch

    x = torch.from_numpy(inputs(width, 1 if kind == "decode" else T).copy())
    if kind == "decode":
        keys, values = (torch.randn(1, heads, T, width // heads) for _ in range(2))

        def decode():
            with torch.no_grad():
                layer.decode(x, keys, values)

        return {SDPA: decode}
    if kind == "forward and backward":
        x.requires_grad_()

        def both():
            y = layer(x)
            y.backward(y.detach())
            layer.zero_grad(set_to_none=True)
            x.grad = None

        return {SDPA: both}

    def forward():
        with torch.no_grad():
            layer(x)

    sides = {SDPA: forward}
    if flex:
        sides[FLEX] = flexible(layer, x, lambda b, h, q, k: q >= k)
        sides[FLEX_WINDOW] = flexible(layer, x, lambda b, h, q, k: (q >= k) & (q - k < window))
    return sides


def flexible(layer, x, mask):
    """The forward pass by FlexAttention, compiled; the map of blocks is computed once."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = create_block_mask(mask, None, None, x.shape[1], x.shape[1], device="cpu")
    attend = torch.compile(flex_attention)

    def run():
        with torch.no_grad():
            layer.joined(attend(*layer.heads(x), block_mask=blocks))

    run()
    return run


def inputs(width: int, T: int) -> np.ndarray:
    """Random x_BTD of one row, float32."""
    return np.random.default_rng(0).normal(size=(1, T, width)).astype(np.float32)


def require_equal(layer, width: int, heads: int, T: int) -> float:
    """Gives PyTorch's layer the weights of `MultiHead` and returns the largest difference of their outputs."""
    import torch

    module = MultiHead(heads).build(Dims(width, "float32", Rope()), nnx.Rngs(0))
    weights = {"/".join(map(str, path)): np.asarray(leaf) for path, leaf in nnx.to_flat_state(nnx.state(module))}
    with torch.no_grad():
        for name in ("query", "key", "value", "output"):
            (matrix,) = (weight for path, weight in weights.items() if path.startswith(name))
            getattr(layer, name).weight.copy_(torch.from_numpy(matrix.reshape(width, width).T.copy()))
        index = np.arange(T, dtype=np.int32)[None]
        meta = Meta(index, index, np.ones_like(index), np.zeros_like(index), np.zeros_like(index))
        x = inputs(width, T)
        ours = jax.jit(lambda x, meta: module(x, Context(meta, meta, DECODER))[0])(x, meta)
        error = float(np.abs(np.asarray(ours) - layer(torch.from_numpy(x)).numpy()).max())
    if not error <= TOLERANCE:
        raise RuntimeError(f"PyTorch's layer differs from MultiHead by {error}: they are not the same")
    return error


def run(quick: bool, say) -> dict:
    """Seconds of each side by number of positions and kind of program."""
    harness.need("torch")
    width, heads, window, lengths = (32, 2, 16, (32,)) if quick else (128, 2, 1024, (256, 1024, 4096, 16_384))
    specs = families(heads, window)
    if quick:
        specs = {name: specs[name] for name in ("multi-head", "window")}
    error = require_equal(torch_layer(width, heads, lengths[0]), width, heads, lengths[0])
    lines = []
    for T in lengths:
        layer = torch_layer(width, heads, T)
        for kind in bench.KINDS:
            say(f"T {T}, {kind}: compiling")
            programs = {name: bench.program(spec, kind, T, width, 1, "float32") for name, spec in specs.items()}
            sides = {name: lambda one=one: jax.block_until_ready(one.run()) for name, one in programs.items()}
            sides |= torch_sides(layer, kind, width, heads, T, window, flex=not quick and T > 256)
            seconds = harness.alternate(
                sides,
                2 if quick else harness.REPEATS,
                say=lambda text, T=T, kind=kind: say(f"T {T}, {kind}: {text}"),
                least=0.0 if quick else 0.03,
            )
            lines.append({"T": T, "kind": kind, "seconds": seconds})
    return {"width": width, "heads": heads, "window": window, "largest_error": error, "lines": lines}


def tables(result: dict) -> str:
    """A table per kind of program, a column per T."""
    parts = [
        f"Width {result['width']}, {result['heads']} heads, window {result['window']:,}. PyTorch's layer differs from "
        f"`MultiHead` with the same weights by at most {result['largest_error']:.1e}. Milliseconds."
    ]
    for kind in dict.fromkeys(line["kind"] for line in result["lines"]):
        lines = [line for line in result["lines"] if line["kind"] == kind]
        names = dict.fromkeys(name for line in lines for name in line["seconds"])
        rows = []
        for name in names:
            cells = [line["seconds"].get(name) for line in lines]
            rows.append([name, *(harness.with_quartiles(one, 1e3) if one else "" for one in cells)])
        ratios = [harness.ratio(line["seconds"][SDPA], line["seconds"]["multi-head"]) for line in lines]
        rows.append(["**SDPA / multi-head**", *(harness.with_quartiles(one) for one in ratios)])
        columns = [kind, *(f"T {line['T']:,}" for line in lines)]
        parts.append(harness.table(columns, rows))
    return "\n\n".join(parts)


def figures(result: dict) -> dict[str, str]:
    """What a window gains at the largest T."""
    found = {}
    for line in result["lines"]:
        if line["T"] == max(one["T"] for one in result["lines"]):
            seconds = line["seconds"]
            gain = harness.ratio(seconds["multi-head"], seconds["window"])["median"]
            found[f"window_{line['kind'].split()[-1]}"] = f"{gain:.1f}"
    return found


if __name__ == "__main__":
    harness.alone(sys.modules[__name__])
