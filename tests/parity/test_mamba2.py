"""Our Mamba-2 layer equals that of transformers on random weights, whole and one token after the other."""

import jax
import numpy as np
import pytest
from flax import nnx
from references import array, compare, linear, randomise

from polygpt.attention.contract import Context, Dims
from polygpt.attention.mamba2 import Mamba2
from polygpt.attention.masks import DECODER
from polygpt.attention.meta import Meta

pytestmark = pytest.mark.parity
WIDTH, HEADS, GROUPS, STATE, T = 16, 4, 2, 8, 21


@pytest.fixture(scope="module")
def reference(torch):
    """(transformers' mixer with random weights, an input [2, T, WIDTH], its output)"""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=WIDTH, num_heads=HEADS, head_dim=2 * WIDTH // HEADS, n_groups=GROUPS, state_size=STATE,
        num_hidden_layers=1, chunk_size=8, use_bias=True,
    )  # fmt: skip
    mixer = randomise(Mamba2Mixer(config, layer_idx=0))
    with torch.no_grad():
        mixer.norm.weight += 1  # a gain about 0 would leave little to compare
        mixer.in_proj.weight *= 4
        mixer.out_proj.weight *= 4
    x_BTD = np.float32(np.random.default_rng(0).normal(size=(2, T, WIDTH)))
    with torch.no_grad():
        expected = mixer(torch.tensor(x_BTD))
    return mixer, x_BTD, array(expected)


def ours(mixer, spec):
    """The module of `spec` with the weights of `mixer`; torch keeps a depthwise kernel as [channels, 1, W]."""
    params = {
        "input": linear(mixer.in_proj),
        "output": linear(mixer.out_proj),
        "convolve": {"kernel": array(mixer.conv1d.weight)[:, 0].T, "bias": array(mixer.conv1d.bias)},
        "A_log": array(mixer.A_log),
        "dt_bias": array(mixer.dt_bias),
        "D": array(mixer.D),
        "norm_scale": array(mixer.norm.weight),
    }
    graphdef, state = nnx.split(spec.build(Dims(WIDTH), nnx.Rngs(0)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, nnx.to_pure_dict(state)), "every weight a place"
    nnx.replace_by_pure_dict(state, params)
    return graphdef, state


def test_mamba2_is_that_of_transformers(reference):
    mixer, x_BTD, expected = reference
    spec = Mamba2(HEADS, state_width=STATE, groups=GROUPS, bias=True, chunk=8)
    graphdef, state = ours(mixer, spec)
    index_BT = np.broadcast_to(np.arange(T, dtype=np.int32)[None], (2, T))
    meta = Meta(index_BT, index_BT, index_BT * 0 + 1, index_BT * 0, index_BT * 0)

    @jax.jit
    def call(x_BTD, meta, cache):
        return nnx.merge(graphdef, state)(x_BTD, Context(meta, meta, DECODER), cache)

    whole, _ = call(x_BTD, meta, None)
    cache, steps = spec.init_cache(Dims(WIDTH), 2, T), []
    for t in range(T):
        y_BTD, cache = call(x_BTD[:, t : t + 1], jax.tree.map(lambda x, t=t: x[:, t : t + 1], meta), cache)
        steps.append(y_BTD)
    for name, got in (("whole", whole), ("step by step", np.concatenate(steps, axis=1))):
        compare(got, expected, f"Mamba2Mixer, {name}")
