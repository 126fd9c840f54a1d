"""Training and decoding on one GPU, against torch.compile with flash attention on the same card in the same run.

    python experiments/benchmarks --gpu

bfloat16, AdamW with clipping, float32 parameters. MFU = 3 F / (seconds per step x peak), where F counts 2 FLOPs per
weight of every matrix (the head included) and position, and 4 d H FLOPs of attention per position and visible key, for
both sides alike; recomputation does not count. The peak is the dense bfloat16 one of the datasheet. Decoding at batch 1
reads every weight once per token: its share of bandwidth is 2 bytes x weights / (seconds per token x bandwidth).
"""

import dataclasses
import gc
import os
import sys
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
import text_gpt

from polygpt.data.example import Text
from polygpt.data.layout import LayoutSpec
from polygpt.generation.generate import generate
from polygpt.generation.sampling import Sampling
from polygpt.models.functional import bind
from polygpt.models.presets import preset
from polygpt.scale.plan.chips import CHIPS, Chip
from polygpt.scale.plan.compilation import abstract_batch
from polygpt.scale.plan.flops import flops
from polygpt.training.program import assemble

TITLE = "One GPU"
TORCH = "torch.compile"


@dataclasses.dataclass(frozen=True)
class Size:
    """A text model and its batch: depth, width, T, B and the decoder's `remat`."""

    depth: int
    width: int
    length: int
    rows: int
    remat: str = "none"
    vocabulary: int = 50_304


SIZES = {
    "124M": Size(12, 768, 1024, 32),
    "350M": Size(24, 1024, 1024, 16),
    "1B": Size(22, 1920, 1024, 8),
}
TOY = {"toy": Size(1, 64, 64, 2, vocabulary=512)}
BACKENDS = {"cuDNN": "library", "flex": "flex", "chunked": "chunked"}


def chip() -> Chip | None:
    """The datasheet of the first device, if it is known."""
    kind = jax.devices()[0].device_kind.lower()
    return next((one for name, one in CHIPS.items() if name in kind), None)


def polygpt_step(experiment):
    """A function that trains one step and waits for it."""
    program = assemble(experiment, experiment.tokenizer.build().vocabulary)
    state, batch = program.first_state(), random_batch(experiment, program)
    step = program.step.lower(state, batch).compile()

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics["loss"])

    run()
    return run


def random_batch(experiment, program):
    """Full rows of random bytes; media of zeros for every item."""
    rng = np.random.default_rng(0)
    B, T = experiment.data.batch_size, experiment.data.layout.seq_len
    abstract = abstract_batch(experiment, program.parallel)
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    tokens = rng.integers(0, 256, (B, T + 1), dtype=np.int32)
    index = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    batch = batch.replace(
        tokens_BT=tokens[:, :-1],
        target_BT=tokens[:, 1:],
        position_BT=index,
        segment_BT=np.ones((B, T), np.int32),
        weight_BT=np.ones((B, T), np.float32),
        coordinate_BT3=np.repeat(index[..., None], 3, axis=-1),
    )
    full = {name: adapter.positions for name, adapter in experiment.model.adapters.items()}
    media = {
        name: dataclasses.replace(one, length_BN=np.full_like(one.length_BN, full[name]))
        for name, one in batch.media.items()
    }
    return program.parallel.put(batch.replace(media=media))


def torch_step(size: Size, device: str):
    """The same for PyTorch; on a CPU, which only tests use, without generating code."""
    import text_torch
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    heads = max(1, size.width // 64)
    model = text_torch.GPT(size.depth, size.width, heads, size.length, size.vocabulary).to(device)
    forward = torch.compile(model, backend="inductor" if device == "cuda" else "eager")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, 256, (size.rows, size.length + 1), device=device)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            logits = forward(tokens[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    run()
    return run


def text_experiment(size: Size, backend: str = "auto"):
    """polygpt's experiment; with a named backend it is an error if that cannot be used."""
    whole = text_gpt.experiment(
        size.width, size.depth, size.length, size.rows, size.vocabulary, "bfloat16", remat=size.remat
    )
    if backend == "auto":
        return whole
    decoder = whole.model.decoder
    attention = decoder.attention.replace(backend=backend, strict=True)
    return whole.replace(model=whole.model.replace(decoder=decoder.replace(attention=attention)))


def train(name: str, size: Size, backends: dict[str, str], quick: bool, say) -> dict:
    """Seconds per step of each side, and why sides are missing."""
    sides, refused = {}, {}
    for side, backend in {"polygpt": "auto", **backends}.items():
        say(f"{name}: compiling {side}")
        try:
            sides[side] = polygpt_step(text_experiment(size, backend))
        except Exception as error:
            refused[side] = f"{error}".strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    say(f"{name}: compiling {TORCH}")
    sides[TORCH] = torch_step(size, "cpu" if jax.default_backend() == "cpu" else "cuda")
    seconds = harness.alternate(
        sides, 2 if quick else harness.REPEATS, say=lambda text: say(f"{name}: {text}"), least=0 if quick else 0.4
    )
    sides.clear()
    gc.collect()
    experiment = text_experiment(size)
    per_step = flops(experiment, experiment.tokenizer.build().vocabulary).useful
    return {
        "shape": dataclasses.asdict(size),
        "flops": per_step,
        "tokens": size.rows * size.length,
        "seconds": seconds,
        "refused": refused,
    }


def multimodal(quick: bool, say) -> dict:
    """The preset 150m, 124M parameters in its decoder, with towers for pictures and recordings."""
    say("multimodal: compiling")
    size = TOY["toy"] if quick else Size(12, 768, 2048, 8)
    whole = text_gpt.experiment(size.width, size.depth, size.length, size.rows, size.vocabulary, "bfloat16")
    model = preset("1m" if quick else "150m").model().replace(dtype="bfloat16")
    model = model.replace(decoder=model.decoder.replace(depth=1)) if quick else model
    experiment = whole.replace(model=model)
    run = polygpt_step(experiment)
    seconds = harness.alternate({"polygpt": run}, 2 if quick else harness.REPEATS, least=0 if quick else 0.4)
    media = {name: size.rows * adapter.items for name, adapter in model.adapters.items()}
    per_step = flops(experiment, experiment.tokenizer.build().vocabulary).useful
    return {"flops": per_step, "tokens": size.rows * size.length, "media": media, "seconds": seconds}


def decoding(name: str, size: Size, quick: bool, say) -> dict:
    """Seconds per token at batch 1: the difference of a long and a short continuation of one prompt."""
    say(f"{name}: decoding")
    experiment = text_experiment(size)
    tokenizer = experiment.tokenizer.build()
    tokenizer.eos = -1  # random weights may choose it
    model = bind(experiment.model, tokenizer.vocabulary)
    params = jax.jit(lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.init(jax.random.key(0))))()
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    short, long = (2, 8) if quick else (16, 272)
    made = {}

    def continued(tokens: int) -> None:
        sampling = Sampling(temperature=0.0, max_tokens=tokens)
        (found,) = generate(
            model, params, tokenizer, [[Text("The quick brown fox")]], LayoutSpec(size.length), sampling
        )
        made[tokens] = len(found.tokens)

    runs = {str(tokens): lambda tokens=tokens: continued(tokens) for tokens in (short, long)}
    seconds = harness.alternate(runs, 2 if quick else harness.REPEATS)
    pairs = zip(seconds[str(long)]["values"], seconds[str(short)]["values"], strict=True)
    return {"weights": weights, "seconds": harness.summary([(a - b) / (made[long] - made[short]) for a, b in pairs])}


def run(quick: bool, say) -> dict:
    """All measurements. Raises Unmeasurable without a GPU, except at toy size."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the card too
    if jax.default_backend() != "gpu" and not quick:
        raise harness.Unmeasurable(
            f"no GPU: jax computes on {jax.default_backend()} here; on a machine with one, pip install -e '.[gpu]'"
        )
    harness.need("torch")
    begun, known = time.monotonic(), chip()
    sizes = TOY if quick else SIZES
    largest = list(sizes)[-1]
    result = {"peak": known and known.flops, "bandwidth": known and known.bandwidth, "training": {}, "decoding": {}}
    for name, size in sizes.items():
        backends = BACKENDS if name == "124M" else {"chunked": "chunked"} if quick else {}
        result["training"][name] = train(name, size, backends, quick, say)
    result["multimodal"] = multimodal(quick, say)
    for name in dict.fromkeys((next(iter(sizes)), largest)):
        result["decoding"][name] = decoding(name, sizes[name], quick, say)
    return result | {"minutes": round((time.monotonic() - begun) / 60, 1)}


def tables(result: dict) -> str:
    """Training by size and side, the multimodal step, decoding."""
    peak, bandwidth, rows, notes = result["peak"], result["bandwidth"], [], []
    for name, one in result["training"].items():
        shape = "{depth} x {width}, T {length:,}, B {rows}, remat {remat}".format(**one["shape"])
        for side, seconds in one["seconds"].items():
            ratio = harness.ratio(one["seconds"][TORCH], seconds)
            rows.append([name, shape, side, *_speed(one, seconds, peak), harness.with_quartiles(ratio)])
        notes += [f"{name}, {side}: {reason}" for side, reason in one["refused"].items()]
    one = result["multimodal"]
    media = " and ".join(f"{count} items of {name}" for name, count in one["media"].items())
    rows.append(["multimodal", media, "polygpt", *_speed(one, one["seconds"]["polygpt"], peak), ""])
    columns = ["model", "shape", "side", "ms per step", "tokens/s", "MFU", f"{TORCH} / side"]
    parts = [harness.table(columns, rows), *[f"Not measured: {note}" for note in notes]]
    rows = [
        [name, f"{one['weights'] / 1e6:,.0f} M", harness.with_quartiles(one["seconds"], 1e3)]
        + [_share(2 * one["weights"], one["seconds"]["median"], bandwidth)]
        for name, one in result["decoding"].items()
    ]
    parts.append(harness.table(["decoding, batch 1", "weights", "ms per token", "of the bandwidth"], rows))
    return "\n\n".join(parts)


def _speed(one: dict, seconds: dict, peak: float | None) -> list[str]:
    tokens = harness.number(one["tokens"] / seconds["median"])
    return [harness.with_quartiles(seconds, 1e3), tokens, _share(one["flops"], seconds["median"], peak)]


def _share(amount: float, seconds: float, of: float | None) -> str:
    return f"{amount / seconds / of:.1%}" if of else "unknown peak"


if __name__ == "__main__":
    harness.alone(sys.modules[__name__])
