"""Prediction of several tokens ahead: targets within examples, and heads that share the output matrix."""

import jax
import numpy as np
import pytest

from batches import build, example, lively, tiny
from polygpt.errors import SpecError
from polygpt.heads.linear import LinearHead
from polygpt.models.functional import bind
from polygpt.objectives.forward import Forward
from polygpt.objectives.multi_token import MultiToken

HEADS = ("second", "third")
ROWS = [[example(6, seed=1), example(("image", 4), 5, seed=2)], [example(3, seed=3)], []]


@pytest.mark.parametrize("block", [None, 12])
def test_each_head_predicts_its_token_of_the_same_example(block):
    spec = tiny(depth=1).replace(heads={name: LinearHead(16) for name in HEADS})
    model, batch = bind(spec, 31), build(ROWS, 16, weight=0.5)
    params, objective = lively(model), MultiToken(HEADS)

    @jax.jit
    def outputs(params):
        found = Forward(model, params, batch, logits_block=block)
        return objective.total(found, batch), [model.logits(params, found.head(name)) for name in HEADS]

    total, logits = outputs(params)
    expected = count = 0
    for ahead, logits_BTV in enumerate(logits, start=1):
        log_p_BTV = np.float64(jax.nn.log_softmax(logits_BTV))
        for b, t in np.argwhere(batch.segment_BT > 0):
            later = t + ahead
            if later < 16 and batch.segment_BT[b, later] == batch.segment_BT[b, t] and batch.weight_BT[b, later]:
                expected -= 0.5 * log_p_BTV[b, t, batch.target_BT[b, later]]
                count += 0.5
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert objective.weight(batch) == count > 0


def test_heads_that_are_missing_or_of_another_width_are_refused():
    spec = tiny().replace(heads={"second": LinearHead(8)})
    with pytest.raises(SpecError, match="reads the head 'third', which is not in model.heads"):
        MultiToken(("third",)).check_with(spec, None)
    with pytest.raises(SpecError, match=r"model\.heads\.second\.outputs is 8: it must be the width of the decoder, 16"):
        MultiToken(("second",)).check_with(spec, None)
