"""The optimizer's state from phase to phase: moments follow their parameters, thawed ones begin anew."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.optim.groups import Group, trained_since
from polygpt.optim.optim import Optim
from polygpt.optim.optimizers import Adafactor, AdamW, Muon
from polygpt.optim.schedules import WarmupLinear
from polygpt.parameters import Traits
from polygpt.training.carry import carry
from polygpt.training.spikes import SpikeSpec
from polygpt.training.state import State

LAYERS = 4
SHAPES = {"blocks": {"kernel": (LAYERS, 6, 5), "scale": (LAYERS, 6)}, "head": {"kernel": (6, 3)}}
START, STEPS = 3, 9
SCHEDULE = WarmupLinear(0.1, warmup=2)


def tree(of):
    return jax.tree.map(of, SHAPES, is_leaf=lambda leaf: isinstance(leaf, tuple))


def normal(seed):
    rng = np.random.default_rng(seed)
    return tree(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32))


TRAITS = tree(
    lambda shape: Traits(
        shape,
        (None,) * len(shape),
        len(shape) > 2,
        layers=tuple(range(LAYERS)) if shape[0] == LAYERS else (),
        depth=LAYERS,
    )
)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What an experiment has that matters here."""

    optim: Optim
    data: int = 0

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


def programs(optimizer, *groups):
    optims = [Optim(SCHEDULE, optimizer, clip=None, groups=some) for some in groups]
    starts = range(0, START * len(groups), START)
    plain = [optim.rules(TRAITS) for optim in optims]
    for k, (optim, start) in enumerate(zip(optims, starts, strict=True)):
        since = trained_since(plain[: k + 1], list(starts)[: k + 1], TRAITS)
        yield SimpleNamespace(
            transformation=optim.build(TRAITS, STEPS, since=since),
            rules=optim.rules(TRAITS, since=since),
            seeds=(),
            start_step=start,
            experiment=Chosen(optim),
        )


def run(optimizer, *groups):
    """The updates of each step in phases of START steps."""
    found, state, before, params = [], None, None, normal(0)
    for program in programs(optimizer, *groups):
        if before is None:
            zero = jnp.zeros((), jnp.int32)
            state = State(zero, params, program.transformation.init(params), None, zero, zero)
        else:
            state = jax.jit(lambda state, before=before, after=program: carry(before, after, state))(state)
        update = jax.jit(program.transformation.update)
        for _ in range(START):
            updates, opt_state = update(normal(1 + int(state.step)), state.opt_state, state.params)
            state = State(state.step + 1, state.params, opt_state, None, zero, zero)
            found.append(updates)
        before = program
    return found


ALL = (Group("", learning_rate=0.5),)
BY_LAYER = (Group("blocks", layers=(1, 3), learning_rate=0.25), Group("head", weight_decay=0.5))


@pytest.mark.parametrize("optimizer", [AdamW(), Muon(), Adafactor(min_factored=5)], ids=lambda o: type(o).__name__)
def test_moments_follow_their_parameters_into_other_groups(optimizer):
    if isinstance(optimizer, Adafactor):  # clips each range as a block of its own
        optimizer = optimizer.replace(clip=1e9)
    plain = run(optimizer, (), (), ())
    moved = run(optimizer, (), BY_LAYER, ALL)
    for step in range(START):
        jax.tree.map(np.testing.assert_array_equal, moved[step], plain[step])
    middle, last = moved[START], moved[2 * START]
    for name in ("kernel", "scale"):
        ours, whole = middle["blocks"][name], plain[START]["blocks"][name]
        np.testing.assert_allclose(ours[::3], whole[::3], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(ours[1:3], 0.25 * whole[1:3], rtol=1e-5, atol=1e-7)
    jax.tree.map(
        lambda ours, whole: np.testing.assert_allclose(ours, 0.5 * whole, rtol=1e-5, atol=1e-7),
        last,
        plain[2 * START],
    )


def test_what_is_thawed_begins_with_fresh_moments_and_the_schedule_goes_on():
    frozen = (Group("blocks", layers=(0, 2), freeze=True), Group("head", freeze=True))
    found = run(AdamW(weight_decay=0.0), frozen, ())
    plain = run(AdamW(weight_decay=0.0), (), ())
    assert not any(np.any(step["head"]["kernel"]) for step in found[:START])
    assert not any(np.any(step["blocks"]["kernel"][:2]) for step in found[:START])
    rate = SCHEDULE.build(STEPS)(START)
    gradient = normal(1 + START)
    for ours, g in [(found[START]["head"]["kernel"], gradient["head"]["kernel"])] + [
        (found[START]["blocks"][name][:2], gradient["blocks"][name][:2]) for name in ("kernel", "scale")
    ]:
        np.testing.assert_allclose(ours, -rate * np.sign(g), rtol=1e-4)  # Adam's first step
    for step in range(2 * START):
        np.testing.assert_allclose(found[step]["blocks"]["kernel"][2:], plain[step]["blocks"]["kernel"][2:], rtol=1e-5)


def test_what_is_frozen_again_and_thawed_again_begins_anew():
    frozen = (Group("head", freeze=True),)
    found = run(AdamW(weight_decay=0.0), (), frozen, ())
    rate = SCHEDULE.build(STEPS)(2 * START)
    gradient = normal(1 + 2 * START)["head"]["kernel"]
    np.testing.assert_allclose(found[2 * START]["head"]["kernel"], -rate * np.sign(gradient), rtol=1e-4)


def test_recent_losses_count_on_only_if_the_loss_is_the_same():
    before, after = programs(AdamW(), (), ())
    params, zero = normal(0), jnp.zeros((), jnp.int32)
    window = SpikeSpec(window=4).begin()
    window = window.__class__(window.recent, zero + 4, zero + 2, zero)
    state = State(zero, params, before.transformation.init(params), None, zero, zero, window)
    assert carry(before, after, state).window.entered == 4
    after.experiment = Chosen(after.experiment.optim, data=1)
    found = carry(before, after, state).window
    assert (found.entered, found.spikes) == (0, 2)
