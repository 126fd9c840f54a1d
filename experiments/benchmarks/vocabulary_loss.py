"""Cross entropy over a large vocabulary with its gradient: logits in blocks against all logits at once.

    python experiments/benchmarks/vocabulary_loss.py --width 256

Prints the memory that each needs besides arguments and results, by the compiler's analysis, and the CPU time of both,
measured in turn in one process.
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp

from polygpt.objectives.blocked import AUTOMATIC, Head, token_losses
from polygpt.objectives.next_token import NextToken
from polygpt.objectives.z_loss import ZLoss

OBJECTIVES = {"next_token": NextToken(), "z": ZLoss()}


def programs(B: int, T: int, D: int, V: int, dtype: str, block: int) -> tuple[dict, tuple]:
    """Both compiled programs, and their arguments."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden_BTD = jax.random.normal(keys[0], (B, T, D), dtype)
    weight_VD = jax.random.normal(keys[1], (V, D)) * D**-0.5
    target_BT = jax.random.randint(keys[2], (B, T), 0, V)
    weight_BT = jnp.full((B, T), 1 / (B * T))

    def blocks(hidden_BTD, weight_VD, target_BT, weight_BT):
        batch = SimpleNamespace(target_BT=target_BT, weight_BT=weight_BT)
        head = Head(weight_VD, ("vocabulary", "width"), dtype=dtype)
        return token_losses(OBJECTIVES, {"next_token": 1.0, "z": 1e-4}, hidden_BTD, head, batch, block)[0]

    def whole(hidden_BTD, weight_VD, target_BT, weight_BT):
        logits = jnp.einsum(
            "nd,vd->nv", hidden_BTD.reshape(-1, D), weight_VD.astype(dtype), preferred_element_type=jnp.float32
        )
        outputs = SimpleNamespace(logits_BTV=logits.reshape(B, T, V))
        batch = SimpleNamespace(target_BT=target_BT, weight_BT=weight_BT)
        next_token, z = (objective.total(outputs, batch) for objective in OBJECTIVES.values())
        return next_token + 1e-4 * z

    arguments = hidden_BTD, weight_VD, target_BT, weight_BT
    made = {
        name: jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
        for name, loss in {"all logits": whole, "in blocks": blocks}.items()
    }
    return made, arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {
        "rows": 8,
        "length": 1024,
        "width": 256,
        "vocabulary": 50_304,
        "block": AUTOMATIC // 50_304,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each; default: 3")
    given = parser.parse_args()
    made, arguments = programs(given.rows, given.length, given.width, given.vocabulary, given.dtype, given.block)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for round_ in range(given.rounds + 1):
        for name, program in made.items():
            begin = time.process_time()
            jax.block_until_ready(program(*arguments))
            if round_:  # the first is a warm-up
                seconds[name].append(time.process_time() - begin)
    print(f"{'':12}{'memory':>12}{'CPU time':>12}")
    for name, program in made.items():
        memory = program.memory_analysis().temp_size_in_bytes
        print(f"{name:12}{memory / 1e6:9,.0f} MB{statistics.median(seconds[name]):10.2f} s")


if __name__ == "__main__":
    main()
