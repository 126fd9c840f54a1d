"""Distillation against formulas in float64, and without the logits of a whole batch."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from given import Given, close, given, total, value_and_gradient

from equations import largest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from bigram import Bigram, random_batch

from batches import tiny
from polygpt.errors import SpecError
from polygpt.objectives.distillation import Distillation
from polygpt.objectives.forward import Forward
from polygpt.objectives.hidden_distillation import HiddenDistillation
from polygpt.objectives.loss import Loss

B, T, V = 3, 11, 17


@pytest.fixture
def batch():
    weight_BT = np.random.default_rng(1).choice([0.0, 0.5, 1.0], size=(B, T))
    weight_BT[-1] = 0  # a row of padding
    return random_batch(B, T, weight=weight_BT)


STUDENT, TEACHER = given(B, T, V), {"teacher": given(B, T, V, D=9, seed=1)}


def softened(params, temperature):
    logits_BTV = np.float64(params["hidden"]) @ np.float64(params["head"]) / temperature
    return np.exp(logits_BTV) / np.exp(logits_BTV).sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_the_divergence_times_the_square_of_the_temperature(direction, temperature, batch):
    objective = Distillation(temperature=temperature, direction=direction)
    value, gradient = value_and_gradient(objective, STUDENT, batch, TEACHER)
    student, teacher = (softened(one, temperature) for one in (STUDENT, TEACHER["teacher"]))
    p, q = (teacher, student) if direction == "forward" else (student, teacher)
    expected = temperature**2 * np.sum(batch.weight_BT * np.sum(p * np.log(p / q), axis=-1))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    if direction == "forward":  # equation 2: the gradient of a logit is (q - p) / T, here times T squared
        of_logits_BTV = temperature * (student - teacher) * batch.weight_BT[..., None]
        close(gradient["hidden"], of_logits_BTV @ STUDENT["head"].T.astype(np.float64), 2e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("block", [1, 7, 12, 1000])
def test_blocks_of_positions_give_the_same(direction, block, batch):
    objective = Distillation(temperature=2.0, direction=direction)
    plain, blocks = (value_and_gradient(objective, STUDENT, batch, TEACHER, n) for n in (None, block))
    close(blocks, plain, 1e-6)


def test_the_logits_of_all_positions_never_exist():
    rows, length, vocabulary = 2, 32, 2000
    batch = random_batch(rows, length, weight=1.0)
    student, teacher = given(rows, length, vocabulary), {"teacher": given(rows, length, vocabulary, seed=1)}

    def memory(block):
        return largest(jax.grad(lambda params: total(Distillation(), params, batch, teacher, block)), student)

    assert memory(None) == rows * length * vocabulary
    assert memory(8) == 8 * vocabulary


@pytest.mark.parametrize("objective", [Distillation(), HiddenDistillation(), HiddenDistillation(distance="square")])
@pytest.mark.parametrize("block", [None, 7])
def test_positions_without_weight_reach_neither_sum_nor_gradient(objective, block, batch):
    others = {"teacher": given(B, T, V, seed=1)}
    unused_BT1 = (batch.weight_BT == 0)[..., None]
    clean = value_and_gradient(objective, STUDENT, batch, others, block)
    for garbage in (np.nan, np.inf):
        dirty = [one | {"hidden": np.where(unused_BT1, garbage, one["hidden"])} for one in (STUDENT, others["teacher"])]
        found = value_and_gradient(objective, dirty[0], batch, {"teacher": dirty[1]}, block)
        if block is None:
            found[1]["head"] = clean[1]["head"]  # of all logits: a product with all hidden vectors
        jax.tree.map(np.testing.assert_array_equal, found, clean)
    assert not np.any(np.asarray(clean[1]["hidden"])[unused_BT1[..., 0]]) and np.any(clean[1]["hidden"])


def test_distances_of_hidden_vectors(batch):
    others = {"teacher": given(B, T, V, seed=1)}
    ours, theirs = (np.float64(one["hidden"]) for one in (STUDENT, others["teacher"]))
    lengths = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    cosine = np.sum(batch.weight_BT * (1 - np.sum(ours * theirs, axis=-1) / lengths))
    square = np.sum(batch.weight_BT * np.mean((ours - theirs) ** 2, axis=-1))
    np.testing.assert_allclose(total(HiddenDistillation(), STUDENT, batch, others), cosine, rtol=1e-6)
    np.testing.assert_allclose(total(HiddenDistillation(distance="square"), STUDENT, batch, others), square, rtol=1e-6)
    with pytest.raises(SpecError, match="the model's vectors have 6 numbers and those of 'teacher' 9"):
        total(HiddenDistillation(), STUDENT, batch, TEACHER)


def test_a_head_maps_hidden_vectors_to_the_teacher_s_width(batch):
    @dataclasses.dataclass(frozen=True)
    class WithHead(Given):
        def head(self, params, name, hidden_BTD, batch):
            return hidden_BTD @ params[name]

    own = STUDENT | {"wider": np.random.default_rng(5).normal(size=(6, 9))}
    objective = HiddenDistillation(distance="square", head="wider")
    found = objective.total(Forward(WithHead(), own, batch, None, {"teacher": (Given(), TEACHER["teacher"])}), batch)
    distance = np.float64(own["hidden"]) @ own["wider"] - TEACHER["teacher"]["hidden"]
    np.testing.assert_allclose(found, np.sum(batch.weight_BT * np.mean(distance**2, axis=-1)), rtol=1e-5)
    with pytest.raises(SpecError, match="reads the head 'wider', which is not in model.heads: there are none"):
        objective.check_with(tiny(), None)


def test_microbatches_with_blocks_give_the_gradient_of_the_whole_batch():
    model, batch = Bigram(), random_batch()
    params, average = (model.init(jax.random.key(i)) for i in range(2))
    objectives = {"self": (Distillation("average", 2.0), 0.5)}

    def gradient(accumulate, block):
        loss = Loss(model, objectives, jax.tree.map(lambda _: True, params), accumulate, block)
        seen = loss.seen(batch, jax.random.key(0))
        return loss.gradient(params, {"average": average}, seen, loss.weights(seen), None)

    whole = gradient(1, None)
    for accumulate, block in ((4, None), (2, 5)):
        close(gradient(accumulate, block), whole, 2e-6)


LAYERS = {"residual": ((0, 2), (-1, -1)), "mlp": ((1, 0),)}


@dataclasses.dataclass(frozen=True)
class Layered(Given):
    """Its activations are parameters too."""

    def hidden(self, params, batch, key=None, capture=()):
        return *super().hidden(params, batch, key), {site: params[site] for site in capture}

    def head(self, params, name, hidden_BTD, batch):
        return hidden_BTD @ params[name]


@pytest.mark.parametrize("site", LAYERS)
@pytest.mark.parametrize("distance", ["cosine", "square"])
def test_distances_of_inner_layers(site, distance, batch):
    rng = np.random.default_rng(7)
    ours_LBTD, theirs_LBTD = (rng.normal(size=(L, B, T, D)).astype(np.float32) for L, D in ((2, 6), (3, 9)))
    own, theirs = (
        STUDENT | {site: ours_LBTD, "wider": rng.normal(size=(6, 9))},
        TEACHER["teacher"] | {site: theirs_LBTD},
    )
    objective = HiddenDistillation(distance=distance, head="wider", layers=LAYERS[site], site=site)
    forward = Forward(Layered(), own, batch, None, {"teacher": (Layered(), theirs)}, captures=objective.captures)
    expected = 0.0
    for ours, other in LAYERS[site]:
        x_BTD, y_BTD = np.float64(ours_LBTD[ours]) @ own["wider"], np.float64(theirs_LBTD[other])
        cosine_BT = np.sum(x_BTD * y_BTD, -1) / np.linalg.norm(x_BTD, axis=-1) / np.linalg.norm(y_BTD, axis=-1)
        found_BT = 1 - cosine_BT if distance == "cosine" else np.mean((x_BTD - y_BTD) ** 2, axis=-1)
        expected += np.sum(batch.weight_BT * found_BT) / len(LAYERS[site])
    np.testing.assert_allclose(objective.total(forward, batch), expected, rtol=1e-5)


def test_blocks_that_are_not_there_are_told(batch):
    with pytest.raises(SpecError, match="layers: the model has no block 2: it has 2, numbered from 0"):
        HiddenDistillation(layers=((2, 0),)).check_with(tiny(), None)
    objective = HiddenDistillation(layers=((1, 3),))
    own = STUDENT | {"residual": np.zeros((2, B, T, 6), np.float32)}
    forward = Forward(Layered(), own, batch, None, {"teacher": (Layered(), own)}, captures=objective.captures)
    with pytest.raises(SpecError, match="layers: 'teacher' has no block 3: it has 2, numbered from 0"):
        objective.total(forward, batch)
    with pytest.raises(SpecError, match="the site 'residual', which its property `captures` lacks: it names none"):
        dataclasses.replace(forward, captures={}).captured("residual")


def test_objectives_of_one_view_share_a_pass_that_keeps_all_their_sites():
    calls = []

    class Counting(Layered):
        def hidden(self, params, batch, key=None, capture=()):
            calls.append(sorted(capture))
            return super().hidden(params, batch, key, capture)

    batch, same = random_batch(B, T), ((0, 0),)
    params = given(B, T, V) | {site: np.ones((1, B, T, 6), np.float32) for site in ("residual", "mlp", "attention")}
    objectives = {
        "last": (HiddenDistillation(), 1.0),
        "mlp": (HiddenDistillation(layers=same, site="mlp"), 1.0),
        "attention": (HiddenDistillation(layers=same, site="attention"), 1.0),
    }
    model = Counting()
    loss = Loss(model, objectives, jax.tree.map(lambda _: True, params), references={"teacher": model})
    seen = loss.seen(batch, jax.random.key(0))
    loss.gradient(params, {"teacher": params}, seen, loss.weights(seen), None)
    assert calls == [["attention", "mlp"]] * 2, "one pass of the model and one of the teacher"
