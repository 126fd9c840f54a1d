"""R-Drop against its formula in float64."""

import jax
import numpy as np
import pytest
from given import Given, given, log_softmax, total
from test_distillation import batch  # noqa: F401

from polygpt.objectives.forward import REPEATED
from polygpt.objectives.r_drop import RDrop

B, T, V = 3, 11, 17
KEY = jax.random.key(3)


@pytest.mark.parametrize("block", [None, 7])
@pytest.mark.parametrize("second_pass", [0.0, 0.25])
def test_the_loss_is_the_mean_divergence_of_two_passes(block, second_pass, batch):  # noqa: F811
    params = given(B, T, V)
    keys = KEY, jax.random.fold_in(jax.random.fold_in(KEY, REPEATED), 1)
    p, q = (log_softmax(params | {"hidden": Given().hidden(params, batch, key)[0]}) for key in keys)
    expected = (np.sum(np.exp(p) * (p - q), axis=-1) + np.sum(np.exp(q) * (q - p), axis=-1)) / 2
    expected -= second_pass * np.take_along_axis(q, batch.target_BT[..., None], axis=-1)[..., 0]
    found = total(RDrop(second_pass), params, batch, block=block, key=KEY)
    np.testing.assert_allclose(found, np.sum(batch.weight_BT * expected), rtol=1e-5)


def test_it_is_0_without_dropout(batch):  # noqa: F811
    assert total(RDrop(), given(B, T, V), batch) == 0
