"""Several seeds in one program, below the loop; whole groups are in tests/ablation/test_together.py."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_experiment import experiment

from polygpt.errors import UserError
from polygpt.overrides import override
from polygpt.parameters import paths
from polygpt.runtime.checkpoint import records
from polygpt.training.loggers import Silent
from polygpt.training.loop import train
from polygpt.training.prefetch import Checks
from polygpt.training.program import assemble
from polygpt.training.seeds import Streams, select_seed, stopped_seeds

pytestmark = pytest.mark.usefixtures("compiled_once")

SEEDS = 0, 3, 1000


def smallest(**changes):
    plain = {"model.decoder.depth": "0", "optim.accumulate": "1", "optim.ema": "null", "train.steps": "6"}
    return override(experiment(), plain | {"train.evaluate_every": "null", "train.max_nonfinite": "2"} | changes)


def assembled(chosen, seeds=()):
    return assemble(chosen, chosen.tokenizer.build().vocabulary, seeds=seeds)


def streams(chosen, seeds=SEEDS):
    return Streams(chosen.data, chosen.tokenizer.build(), chosen.model.adapters, seeds)


def test_the_states_are_those_of_each_seed_and_count_steps_together():
    program = assembled(smallest(), SEEDS)
    states = program.parallel.create(program.initial)
    for i, seed in enumerate(SEEDS):
        alone = assembled(smallest().replace(seed=seed))
        jax.tree.map(
            np.testing.assert_array_equal,
            select_seed(states.params, i),
            alone.parallel.create(alone.initial).params,
        )
    assert states.step.shape == () and states.skipped.shape == (3,)
    assert "3 seeds in one program" in program.summary()


def test_parameters_that_are_given_are_those_of_every_seed():
    program = assembled(smallest(), SEEDS)
    name, shape = next(iter(paths(program.shapes).items()))
    states = program.parallel.create(program.initial, {name: jax.numpy.full(shape.shape, 7.0, shape.dtype)})
    assert np.unique(paths(states.params)[name]) == [7.0] and paths(states.params)[name].shape == (3, *shape.shape)


def test_a_seed_that_is_not_finite_for_too_long_stays_stopped():
    chosen = smallest()
    program, batch = assembled(chosen, SEEDS), next(streams(chosen))
    states = program.parallel.create(program.initial)
    poison = np.array([1, np.nan, 1], np.float32)
    healthy = dataclasses.replace(batch, weight_BT=batch.weight_BT)
    ill = dataclasses.replace(batch, weight_BT=batch.weight_BT * poison[:, None, None])
    counts = []
    for one in (healthy, ill, healthy, ill, ill, healthy):
        states, metrics = program.step(states, one)
        counts.append(metrics["skipped_in_row"][1].item())
        assert metrics["loss"].shape == (3,)
    assert counts == [0, 1, 0, 1, 2, 2], "it is counted anew until the limit, and not after it"
    assert stopped_seeds(states, 2) == [False, True, False] and states.skipped.tolist() == [0, 3, 0]


def test_the_loop_gives_loggers_a_list_and_no_checkpoint_is_the_best(tmp_path):
    told = []

    class Told(Silent):
        def step(self, step, loss):
            told.append(loss)

        def evaluation(self, step, results):
            told.append([one["tasks"]["text"]["loss"] for one in results["seeds"]])

    chosen = smallest(**{"train.evaluate_every": "3"})
    outcome = train(chosen, tmp_path, lambda *_: [Told()], seeds=SEEDS, on_message=lambda text: None)
    assert outcome.finished and len(told) == 6 + 2 and all(len(set(one)) == 3 for one in told)
    assert {record.metric for record in records(tmp_path / "checkpoints")} == {None}
    with pytest.raises(UserError, match=r"seeds \[0, 3, 1000\], not \[0, 3, 7\]"):
        train(chosen, tmp_path, lambda *_: [], seeds=(0, 3, 7), on_message=lambda text: None)


def test_settings_that_seeds_cannot_share_are_refused_before_training(tmp_path):
    chosen = smallest(**{"train.evaluate_every": "3", "train.patience": "1"})
    with pytest.raises(UserError, match="3 seeds cannot be trained together: train.patience"):
        train(chosen, tmp_path / "run", lambda *_: [], seeds=SEEDS)
    assert not (tmp_path / "run").exists()


def test_streams_continue_and_count_what_each_skipped():
    whole, cut = streams(smallest()), streams(smallest())
    next(whole), next(cut)
    state = cut.get_state()
    assert state["skipped"] == {} and state["examples"] == state["streams"][0]["examples"]
    again = streams(smallest())
    again.set_state([state])
    jax.tree.map(np.testing.assert_array_equal, next(again), next(whole))


@pytest.mark.parametrize("checked", [False, True], ids=["first", "later"])
def test_a_token_id_of_any_seed_is_checked(checked):
    batch = next(streams(smallest()))
    checks = Checks(258, {})
    if checked:
        checks(batch)
    tokens = batch.tokens_BT.copy()
    tokens[2, 1, 5] = 258
    with pytest.raises(UserError, match="row 1, position 5"):
        checks(dataclasses.replace(batch, tokens_BT=tokens))
