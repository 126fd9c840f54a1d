"""What is held equal between variants comes out equal, by counts made another way."""

import math

import jax
import pytest
from tiny_runs import experiment

from polygpt.ablation.budget import Budget, costs
from polygpt.errors import SpecError
from polygpt.models.functional import bind
from polygpt.nn.mlp import MLP, GatedMLP


def parameters(made) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(bind(made.model, 258).abstract()))


def test_costs_are_the_models_own():
    made = experiment()
    assert costs(made).parameters == parameters(made)
    assert costs(made).positions == 4 * 48
    assert costs(made.replace(seed=7)) == costs(made)
    matrices = 4 * 16 * 16 + 3 * 16 * made.model.decoder.mlp.hidden_width(16)
    attention = 4 * 16 * (48 + 1) // 2
    assert costs(made).flops == 3 * 4 * 48 * (2 * matrices + attention + 2 * 16 * 258)


def test_steps_leave_everything_as_it_is():
    other = experiment(data__batch_size=8)
    assert Budget().applied(other, experiment()) is other


def test_equal_tokens_are_other_steps():
    assert Budget("tokens").applied(experiment(data__batch_size=8), experiment()).train.steps == 6
    assert Budget("tokens").applied(experiment(data__layout__seq_len=16), experiment()).train.steps == 36


def test_equal_flops_are_equal_to_half_a_step():
    base, wide = experiment(train__steps=1000), experiment(train__steps=1000, model__decoder__width=32)
    made = Budget("flops").applied(wide, base)
    assert made == wide.replace(train=wide.train.replace(steps=made.train.steps))
    assert made.train.steps < 500
    assert abs(made.train.steps * costs(made).flops - 1000 * costs(base).flops) <= costs(made).flops / 2


def test_a_budget_that_steps_cannot_meet_is_told():
    with pytest.raises(SpecError, match="with 1 steps it has 3,072 tokens, but the base has 2,304: no value"):
        Budget("tokens").applied(experiment(data__batch_size=64, train__steps=3), experiment())
    assert Budget("tokens", tolerance=0.34).applied(experiment(data__batch_size=64), experiment()).train.steps == 1


@pytest.mark.parametrize("factor", [pytest.param(1.0, marks=pytest.mark.slow), 20.0])
def test_equal_parameters_by_a_number(factor):
    base = experiment(model__decoder__mlp=MLP(4.0))
    gated = experiment(model__decoder__mlp=GatedMLP(factor, multiple=1))
    made = Budget("parameters", "model.decoder.mlp.factor", tolerance=0.005).applied(gated, base)
    assert parameters(made) == pytest.approx(parameters(base), rel=0.005)
    assert made.model.decoder.mlp.factor == pytest.approx(8 / 3, rel=0.05)
    assert made.replace(model=gated.model) == gated


@pytest.mark.parametrize(("start", "found"), [(16, 32), (32, 32), (96, 32)])
def test_equal_parameters_by_a_whole_number_that_must_be_a_multiple(start, found):
    base = experiment(model__decoder__width=32)
    other = experiment(model__decoder__width=start)
    made = Budget("parameters", "model.decoder.width").applied(other, base)
    assert made.model.decoder.width == found


def test_parameters_that_no_value_gives_are_told_with_the_nearest():
    base = experiment(model__decoder__width=32, model__decoder__depth=2)
    with pytest.raises(SpecError, match="budget: with model.decoder.width .* it has .* parameters, but the base"):
        Budget("parameters", "model.decoder.width", tolerance=1e-4).applied(experiment(), base)


@pytest.mark.parametrize("field", ["model.decoder.mlp.activation", "model.decoder.nothing", "model.decoder.tied"])
def test_what_is_searched_must_be_a_number(field):
    with pytest.raises(SpecError, match=f"budget: {field} is .*: it must be a number"):
        Budget("parameters", field).applied(experiment(), experiment(model__decoder__width=32))


def test_equal_parameters_need_a_field():
    with pytest.raises(SpecError, match="Budget.field is .*set if by is parameters"):
        Budget("parameters")


@pytest.mark.parametrize("by", ["steps", "parameters", "tokens", "flops"])
def test_parameters_are_held_equal_beside_steps_tokens_or_flops(by):
    base = experiment(model__decoder__mlp=MLP(4.0), train__steps=40)
    gated = experiment(model__decoder__mlp=GatedMLP(1.0, multiple=1), data__batch_size=8, train__steps=40)
    made = Budget(by, "model.decoder.mlp.factor").applied(gated, base)
    assert parameters(made) == pytest.approx(parameters(base), rel=0.02)
    assert made.train.steps == (20 if by in ("tokens", "flops") else 40)
    assert (by in ("steps", "parameters")) or made.train.steps * costs(made).flops == pytest.approx(
        40 * costs(base).flops, rel=0.05
    )
