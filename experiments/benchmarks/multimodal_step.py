"""Training step of the quickstart's model, pictures and recordings included, against the same model in PyTorch.

    python experiments/benchmarks/multimodal_step.py

Both have the same random weights and read the batches of the quickstart's own loader. Before anything is timed, the
logits, the loss and the norm of the gradient are compared. See multimodal_torch.py for PyTorch's side.
"""

import os
import sys

import harness
import jax
import numpy as np

from polygpt.optim.schedules import Constant
from polygpt.parameters import paths
from polygpt.spec import load_file
from polygpt.training.feed import Feed
from polygpt.training.program import assemble

TITLE = "Training step of the multimodal quickstart"
OURS = "polygpt"
TOLERANCE = 1e-4
"""Largest difference of logits at predicted positions and of losses, and relative difference of gradient norms."""
COMPARED = 3
"""Steps whose losses and norms are compared: those after the first depend on the optimizer too."""


def experiment(quick: bool):
    """The quickstart with a constant learning rate."""
    whole = load_file(harness.ROOT / "experiments" / "quickstart.py").experiment()
    whole = whole.replace(optim=whole.optim.replace(schedule=Constant(1e-3)))
    if not quick:
        return whole
    decoder = whole.model.decoder.replace(depth=1)
    return whole.replace(data=whole.data.replace(batch_size=2), model=whole.model.replace(decoder=decoder))


def batches(program, tokenizer, count: int) -> list:
    """The first batches of the run, on the device."""
    feed = Feed(program, tokenizer)
    feed.start()
    try:
        return [feed.take(lambda: False).batch for _ in range(count)]
    finally:
        feed.close()


def run(quick: bool, say) -> dict:
    """Seconds of each side, and the differences found before."""
    harness.need("torch")
    import multimodal_torch
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    chosen = experiment(quick)
    tokenizer = chosen.tokenizer.build()
    program = assemble(chosen, tokenizer.vocabulary)
    given = batches(program, tokenizer, 8)
    rows = [multimodal_torch.row_of(jax.device_get(batch)) for batch in given]
    state, done = program.first_state(), 0
    weights = {name: np.asarray(one) for name, one in paths(state.params).items()}
    say("comparing the models")
    logits = jax.jit(lambda params, batch: program.model.apply(params, batch).logits_BTV)(state.params, given[0])
    sides = {}
    errors = dict.fromkeys(("logits", "loss", "gradient norm"), 0.0)
    for name in ("PyTorch",) if quick else ("PyTorch", "torch.compile"):
        model = multimodal_torch.Quickstart(chosen.model, tokenizer.vocabulary)
        multimodal_torch.fill(model, weights)
        with torch.no_grad():
            difference = np.abs(np.asarray(logits) - model(rows[0]).numpy())[np.asarray(given[0].weight_BT) > 0].max()
        errors["logits"] = max(errors["logits"], float(difference))
        sides[name] = multimodal_torch.stepper(model, chosen.optim, rows, name == "torch.compile")

    def ours() -> tuple[float, float]:
        nonlocal state, done
        state, metrics = program.step(state, given[done % len(given)])
        done += 1
        return float(metrics["loss"]), float(metrics["gradient_norm"])

    for _ in range(COMPARED):
        loss, norm = ours()
        for step in sides.values():
            other_loss, other_norm = step()
            errors["loss"] = max(errors["loss"], abs(loss - other_loss))
            errors["gradient norm"] = max(errors["gradient norm"], abs(norm / other_norm - 1))
    if wrong := {name: error for name, error in errors.items() if not error <= TOLERANCE}:
        raise RuntimeError(f"PyTorch's model is not the same: {wrong}")
    seconds = harness.alternate({OURS: ours, **sides}, 2 if quick else 25, 1 if quick else 3, say)
    return {
        "rows": chosen.data.batch_size,
        "length": chosen.data.layout.seq_len,
        "parameters": sum(one.size for one in weights.values()),
        "errors": errors,
        "seconds": seconds,
        "ratio": {name: harness.ratio(seconds[name], seconds[OURS]) for name in sides},
    }


def tables(result: dict) -> str:
    """A row per side."""
    said = "{parameters:,} parameters, B {rows}, T {length}. Largest differences between the models: ".format(**result)
    said += ", ".join(f"{name} {error:.1e}" for name, error in result["errors"].items()) + "."
    rows = [
        [name, harness.with_quartiles(one, 1e3)]
        + [harness.with_quartiles(result["ratio"][name]) if name in result["ratio"] else ""]
        for name, one in result["seconds"].items()
    ]
    return said + "\n\n" + harness.table(["side", "ms per step", f"times as long as {OURS}"], rows)


def figures(result: dict) -> dict[str, str]:
    """The ratios by side."""
    return {name.split(".")[-1].lower(): f"{one['median']:.2f}" for name, one in result["ratio"].items()}


if __name__ == "__main__":
    harness.alone(sys.modules[__name__])
