"""The coordinate check (2203.03466, appendix D.1): how activations, and what training changes of them, grow with width.

Under muP neither grows nor vanishes. The bound on slopes, 0.15, is a factor of 1.4 over the eightfold width, room for
corrections of finite width. Logits start smaller in wider models, as they should (1 / sqrt(width), appendix D.2).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batches import ADAPTERS, build, example
from polygpt.adapters import base as connectors
from polygpt.adapters.base import Connector
from polygpt.adapters.tower import Tower
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.block import Block
from polygpt.blocks.stack import StackSpec
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.objectives.next_token import NextToken
from polygpt.optim.mup import MuP
from polygpt.optim.optim import Optim
from polygpt.optim.optimizers import SGD, AdamW, Muon
from polygpt.optim.schedules import Constant

BASE = MuP({"decoder.width": 32, "adapters.image.tower.width": 16, "adapters.audio.tower.width": 16})
LETTERS = 6  # far fewer than channels: logits of random embeddings disturb each other as sqrt(vocabulary / width)
ROWS = [
    [example(5, ("image", 4), 7, seed=1), example(("audio", 3), 6, seed=2)],
    [example(9, ("audio", 2), 4, ("image", 4), 5, seed=3)],
]
ADAMW = Optim(Constant(0.01), AdamW())


def multimodal(width: int, mup: MuP | None) -> ModelSpec:
    tower = StackSpec(width // 2, 1, MultiHead(2), scan=False)  # blocks of a scan could not be looked at
    adapters = {name: one.replace(tower=tower, connector=Connector("mlp")) for name, one in ADAPTERS.items()}
    return ModelSpec(DecoderSpec(width, 2, MultiHead(4, 2), scan=False), adapters, mup=mup)


@pytest.fixture
def recorded(monkeypatch):
    """A list to which every block, tower and connector that is traced adds (name, output)."""
    found = []

    def record(cls, name, output):
        call = cls.__call__

        def recording(self, *arguments, **named):
            result = call(self, *arguments, **named)
            found.append((name, output(result)))
            return result

        monkeypatch.setattr(cls, "__call__", recording)

    record(Block, "block", lambda result: result[0])
    record(Tower, "tower", lambda result: result[0])
    record(connectors._Connector, "connector", lambda result: result)
    return found


def sizes(spec: ModelSpec, optim: Optim, recorded: list, steps: int = 5, seeds: int = 4) -> dict[str, np.ndarray]:
    """By activation, its root mean square at the start, and that of its change by `steps` steps of training."""
    model, batch, objective = bind(spec, LETTERS), build(ROWS, 28), NextToken()
    batch = batch.replace(tokens_BT=batch.tokens_BT % LETTERS, target_BT=batch.target_BT % LETTERS)
    transformation = optim.build(model.traits, steps, model.growth)

    def loss(params):
        recorded.clear()
        outputs = model.apply(params, batch)
        found = {f"{i} {name}": array for i, (name, array) in enumerate(recorded)} | {"logits": outputs.logits_BTV}
        return objective.total(outputs, batch) / objective.weight(batch), found

    def step(carry, _):
        params, state = carry
        gradient, found = jax.grad(loss, has_aux=True)(params)
        updates, state = transformation.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), found

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling takes the time
    @jax.vmap
    def run(key):
        params = model.init(key)
        _, found = jax.lax.scan(step, (params, transformation.init(params)), length=steps + 1)
        return {name: jnp.stack([jnp.mean(x[0] ** 2), jnp.mean((x[-1] - x[0]) ** 2)]) for name, x in found.items()}

    found = run(jax.random.split(jax.random.key(0), seeds))
    return {name: np.sqrt(np.mean(squares, axis=0)) for name, squares in found.items()}


def slopes(found: dict[int, dict[str, np.ndarray]]) -> dict[str, tuple[float, float]]:
    """By activation, the slopes of log size and log change over log width, by least squares."""
    x = np.log(list(found)) - np.mean(np.log(list(found)))
    names = next(iter(found.values()))
    table = {name: tuple(x @ np.log([one[name] for one in found.values()]) / (x @ x)) for name in names}
    for name, (size, change) in table.items():
        print(f"{name:14} size {size:+.2f}, change {change:+.2f}")
    return table


def check(table, bound: float = 0.15) -> None:
    assert [name.split()[-1] for name in table] == KINDS
    for name, (size, change) in table.items():
        assert abs(change) < bound, f"what training changes of {name} goes as width to the power of {change:.2f}"
        assert abs(size) < bound or name == "logits" and -0.6 < size < 0, f"{name} goes as width ** {size:.2f}"


# In the order in which they are computed: image, audio, decoder.
KINDS = ["block", "tower", "connector"] * 2 + ["block", "block", "logits"]


@pytest.mark.slow
def test_what_training_changes_is_the_same_at_all_widths_under_mup_and_grows_without(recorded):
    base = sizes(multimodal(32, None), ADAMW, recorded)  # the same with and without
    check(slopes({32: base, 256: sizes(multimodal(256, BASE), ADAMW, recorded)}))
    grows = slopes({32: base, 256: sizes(multimodal(256, None), ADAMW, recorded)})
    assert grows["logits"][1] > 0.3
    # What towers give is normalised, and cannot grow.
    assert min(change for name, (_, change) in grows.items() if "block" in name or "connector" in name) > 0.6


@pytest.mark.slow
def test_post_norm_blocks_keep_to_it_too(recorded):
    def post(width):
        spec = multimodal(width, BASE)
        return spec.replace(decoder=spec.decoder.replace(norm_placement="post"))

    check(slopes({width: sizes(post(width), ADAMW, recorded) for width in (32, 256)}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "optim",
    [ADAMW, Optim(Constant(0.01), Muon()), Optim(Constant(0.1), SGD(momentum=0.5), clip=None)],
    ids=["AdamW", "Muon", "SGD"],
)
def test_four_widths(optim, recorded):
    check(slopes({width: sizes(multimodal(width, BASE), optim, recorded) for width in (32, 64, 128, 256)}))
