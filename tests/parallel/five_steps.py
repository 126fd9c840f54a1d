"""Runs five steps on four CPU devices in the modes that are named, and writes what came of it as one JSON object.

Arguments: modes, as "pmap/2" for two microbatches. Run as a process of its own: the number of devices is set once a
process.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 4)
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from bigram import VOCABULARY, Apart, random_batch  # noqa: E402

from polygpt.attention.multi_head import MultiHead  # noqa: E402
from polygpt.models.decoder import DecoderSpec  # noqa: E402
from polygpt.models.functional import bind  # noqa: E402
from polygpt.models.multimodal import ModelSpec  # noqa: E402
from polygpt.objectives.distillation import Distillation  # noqa: E402
from polygpt.objectives.loss import Loss  # noqa: E402
from polygpt.objectives.masked_lm import MaskedLM, MaskTokens  # noqa: E402
from polygpt.objectives.next_token import NextToken  # noqa: E402
from polygpt.objectives.z_loss import ZLoss  # noqa: E402
from polygpt.optim.mup import MuP  # noqa: E402
from polygpt.optim.optim import Optim  # noqa: E402
from polygpt.optim.schedules import Constant  # noqa: E402
from polygpt.training.parallel import build  # noqa: E402
from polygpt.training.state import create  # noqa: E402
from polygpt.training.step import Recipe, make_step  # noqa: E402

STEPS = 5


def run(mode: str, accumulate: int) -> dict:
    decoder = DecoderSpec(width=16, depth=2, attention=MultiHead(heads=2))
    model = bind(ModelSpec(decoder, mup=MuP({"decoder.width": 8})), VOCABULARY)
    optim = Optim(Constant(3e-3), accumulate=accumulate, ema=0.9)
    transformation = optim.build(model.traits, STEPS, model.growth)
    objectives = {"next_token": (NextToken(), 1.0), "z": (ZLoss(), 1e-2)}
    objectives |= {"masked": (MaskedLM(MaskTokens(0, VOCABULARY)), 0.5), "apart": (Apart(), 0.1)}
    objectives |= {"average": (Distillation("average", temperature=2.0), 0.3)}
    rate, trainable = optim.schedule.build(STEPS), optim.trainable(model.traits)
    recipe = Recipe(Loss(model, objectives, trainable, accumulate, logits_block=8), transformation, rate, 0, optim.ema)
    parallel = build(mode, model.axes())

    def initial():
        return create(model, transformation, 0, True)

    step, state = parallel.compile(lambda **wiring: make_step(recipe, **wiring), initial), parallel.create(initial)

    losses, donated = [], []
    for i in range(STEPS):
        before, batch = state, parallel.put(random_batch(rows=16, seed=i))
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        donated.append(all(leaf.is_deleted() for leaf in jax.tree.leaves(before)))
    leaves = jax.tree.leaves((state.params, state.ema, state.opt_state))
    copies_equal = all(
        np.array_equal(shard.data, leaf.addressable_shards[0].data)
        for leaf in leaves
        for shard in leaf.addressable_shards
    )

    poisoned = random_batch(rows=16, seed=STEPS)
    weight_BT = poisoned.weight_BT.copy()
    weight_BT[3] = np.nan  # a row of the first device alone
    after, metrics = step(jax.tree.map(lambda x: x.copy(), state), parallel.put(poisoned.replace(weight_BT=weight_BT)))
    return {
        "devices": len(parallel.devices),
        "losses": losses,
        "params": [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves((state.params, state.ema))],
        "donated": all(donated),
        "copies_equal": copies_equal,
        "skipped": int(after.skipped),
        "skip_kept_params": all(
            np.array_equal(new, old)
            for new, old in zip(jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True)
        ),
    }


if __name__ == "__main__":
    print(json.dumps({name: run(name.split("/")[0], int(name.split("/")[1])) for name in sys.argv[1:]}))
