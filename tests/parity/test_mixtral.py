"""A mixture of experts equals the sparse layer of Mixtral in transformers, on random weights, its loss included."""

from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from references import array, compare, randomise

from polygpt.nn.experts import MixtureOfExperts

pytestmark = pytest.mark.parity
WIDTH, HIDDEN, EXPERTS, T = 32, 48, 6, 40


@pytest.mark.parametrize("capacity", [None, 3.0], ids=["dropless", "room for all"])
def test_it_is_mixtrals(torch, capacity):
    from transformers.models.mixtral import modeling_mixtral as theirs
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig

    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=2,
        experts_implementation="eager",
    )  # fmt: skip
    layer = randomise(theirs.MixtralSparseMoeBlock(config))
    x_BTD = np.float32(np.random.default_rng(0).normal(size=(2, T, WIDTH)) * 3)
    with torch.no_grad():
        expected = array(layer(torch.tensor(x_BTD)))
        logits = layer.gate(torch.tensor(x_BTD))[0]
        length = np.int32([T, T - 9])
        real_BT = np.arange(T)[None] < length[:, None]
        balance = theirs.load_balancing_loss_func((logits,), EXPERTS, 2, torch.tensor(np.float32(real_BT)))

    spec = MixtureOfExperts(EXPERTS, 2, factor=HIDDEN / WIDTH, capacity=capacity, balance="batch")
    graphdef, state = nnx.split(spec.build(WIDTH, rngs=nnx.Rngs(0), dtype="float32", output_scale=1.0))
    gate_up, down = array(layer.experts.gate_up_proj), array(layer.experts.down_proj)
    params = {
        "router": {"kernel": array(layer.gate.weight).T},
        "experts": {
            "gate": {"kernel": gate_up[:, :HIDDEN].swapaxes(1, 2)},
            "up": {"kernel": gate_up[:, HIDDEN:].swapaxes(1, 2)},
            "down": {"kernel": down.swapaxes(1, 2)},
        },
    }
    nnx.replace_by_pure_dict(state, params)
    modality_BT = np.where(real_BT, 0, -1)
    query = SimpleNamespace(segment=real_BT.astype(np.int32), modality=modality_BT.astype(np.int32))
    got, losses = nnx.merge(graphdef, state)(x_BTD, SimpleNamespace(query=query, training=True))
    compare(np.asarray(got)[real_BT], expected[real_BT], "MixtralSparseMoeBlock")
    # Theirs lets the shares of choices add up to top_k, and is a mean over positions.
    np.testing.assert_allclose(2 * losses["load_balance"] / real_BT.sum(), float(balance), rtol=1e-5)
