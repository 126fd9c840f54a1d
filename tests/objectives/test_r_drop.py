"""R-Drop against its formula in float64."""

import jax
import numpy as np
import pytest
from given import Given, given, log_softmax, total
from test_distillation import batch  # noqa: F401

from polygpt.objectives.forward import REPEATED, Forward
from polygpt.objectives.r_drop import CLEAN, NoisyTokens, RDrop
from polygpt.sequence import TEXT

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


class Reading(Given):
    """The hidden vectors depend on the token of their position."""

    def hidden(self, params, batch, key=None):  # noqa: F811
        return params["table"][batch.tokens_BT], {}


def test_with_noise_the_second_pass_reads_other_tokens(batch):  # noqa: F811
    noise = NoisyTokens(V, rate=0.5)
    params = given(B, T, V) | {"table": np.float32(np.random.default_rng(5).normal(size=(V, 6)))}
    batch = batch.replace(tokens_BT=batch.tokens_BT % V)
    seen = jax.jit(noise)(batch, jax.random.split(KEY, B))
    np.testing.assert_array_equal(seen.extra[CLEAN], batch.tokens_BT)
    np.testing.assert_array_equal(seen.target_BT, batch.target_BT)
    changed_BT = np.asarray(seen.tokens_BT != batch.tokens_BT)
    assert changed_BT.any() and not changed_BT[batch.modality_BT != TEXT].any()
    p, q = (log_softmax(params | {"hidden": params["table"][one.tokens_BT]}) for one in (batch, seen))
    expected = (np.sum(np.exp(p) * (p - q), axis=-1) + np.sum(np.exp(q) * (q - p), axis=-1)) / 2
    found = RDrop(noise=noise).total(Forward(Reading(), params, seen), seen)
    np.testing.assert_allclose(found, np.sum(batch.weight_BT * expected), rtol=1e-5)
    assert found > 0
