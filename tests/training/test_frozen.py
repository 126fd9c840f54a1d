"""What is frozen costs the backward pass nothing: no activations are kept, no gradients exist."""

import re

import jax
import numpy as np
import pytest

from batches import ADAPTERS, VOCABULARY, build, example, lively, tiny
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.stack import StackSpec
from polygpt.models.functional import bind
from polygpt.models.low_rank import LowRank
from polygpt.objectives.loss import Loss
from polygpt.objectives.next_token import NextToken
from polygpt.optim.groups import Group
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import Constant
from polygpt.parameters import paths

ROWS = [(example(9, ("image", 4), 6, seed=row),) for row in range(8)]
"""Enough that activations take more memory than matrices."""

FROZEN = "^adapters/image/(?!connector)"


def compiled(
    depth: int, scan: bool, frozen: str | None, accumulate: int = 1, low_rank=None, width: int = 32, rows: int = 8
):
    """The means and the gradient of a model with a deep tower, and the compiled program."""
    tower = StackSpec(width=width, depth=depth, attention=MultiHead(heads=2), scan=scan)
    adapters = {"image": ADAPTERS["image"].replace(tower=tower)}
    model = bind(tiny(adapters=adapters, depth=1).replace(low_rank=low_rank), VOCABULARY)
    groups = () if frozen is None else (Group(frozen, freeze=True),)
    optim = Optim(Constant(1e-3), groups=groups)
    loss = Loss(model, {"next": (NextToken(), 1.0)}, optim.trainable(model.traits), accumulate)
    batch = build(ROWS[:rows], 24, adapters=adapters)

    def gradient(params, batch):
        seen = loss.seen(batch, jax.random.key(0))
        return loss.gradient(params, {}, seen, loss.weights(seen), None)

    return model, jax.jit(gradient).lower(model.abstract(), batch).compile(), batch


def temporary(*given, **named) -> int:
    return compiled(*given, **named)[1].memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_activations_of_a_frozen_tower_are_not_kept(scan):
    shallow, deep = (temporary(depth, scan, FROZEN) for depth in (1, 4))
    assert deep < 1.02 * shallow, "they would grow with depth"
    trained = [temporary(depth, scan, None) for depth in (1, 4)]
    assert trained[1] - trained[0] > 20 * max(deep - shallow, 1), "as they do in a trained tower"


def test_frozen_parameters_get_no_gradient_and_others_that_of_a_model_in_which_all_are_trained():
    (model, program, batch), (_, whole, _) = (compiled(2, True, frozen) for frozen in (FROZEN, None))
    params = lively(model)
    (means, found), (expected_means, expected) = program(params, batch), whole(params, batch)
    np.testing.assert_allclose(means["next"], expected_means["next"], rtol=1e-6)
    for name, value in paths(found).items():
        if re.search(FROZEN, name):
            assert not np.any(value) and np.any(paths(expected)[name]), name
        else:
            np.testing.assert_allclose(value, paths(expected)[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_no_zeros_are_summed_over_microbatches_for_frozen_matrices():
    given = {"low_rank": LowRank("tower/.*kernel$", rank=1), "width": 128, "rows": 2}
    model, whole, _ = compiled(4, True, None, 1, **given)
    _, accumulated, _ = compiled(4, True, None, 2, **given)
    frozen = sum(4 * np.prod(own.shape) for own in jax.tree.leaves(model.traits) if not own.trained)
    temporary, before = (one.memory_analysis().temp_size_in_bytes for one in (accumulated, whole))
    assert temporary < before + 0.1 * frozen
