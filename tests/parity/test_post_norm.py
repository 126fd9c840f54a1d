"""Post-norm blocks equal those of torch.nn.TransformerEncoderLayer, on random weights."""

import jax
import numpy as np
import pytest
from flax import nnx
from references import array, compare, encoder, linear, listed, norm, randomise

from polygpt.attention.contract import Context
from polygpt.attention.masks import DECODER, ENCODER
from polygpt.attention.meta import Meta
from polygpt.blocks.stack import Stack

pytestmark = pytest.mark.parity
DEPTH, WIDTH, HEADS, T = 3, 32, 4, 10


def block(layer) -> dict:
    """torch keeps queries, keys and values in one matrix, [outputs, inputs]."""
    attention = layer.self_attn
    kernels = np.split(array(attention.in_proj_weight), 3)
    biases = np.split(array(attention.in_proj_bias), 3)
    parts = zip(("query", "key", "value"), kernels, biases, strict=True)
    projections = {name: {"kernel": kernel.T, "bias": bias} for name, kernel, bias in parts}
    return {
        "attention_norm": norm(layer.norm1),
        "attention": {**projections, "output": linear(attention.out_proj)},
        "mlp_norm": norm(layer.norm2),
        "mlp": {"up": linear(layer.linear1), "down": linear(layer.linear2)},
    }


@pytest.mark.parametrize("causal", [False, True])
def test_a_post_norm_stack_is_torchs(torch, causal):
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, activation="gelu", batch_first=True)
    reference = randomise(torch.nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False))
    spec = encoder(WIDTH, DEPTH, HEADS, "gelu", 1e-5, norm_placement="post")
    graphdef, state = nnx.split(Stack(spec, rngs=nnx.Rngs(0), dtype="float32"))
    params = {"blocks": listed([block(layer) for layer in reference.layers])}
    names = {"blocks": dict(enumerate(params["blocks"].values()))}
    assert jax.tree.map(np.shape, names) == jax.tree.map(np.shape, nnx.to_pure_dict(state)), (
        "every weight has its place"
    )
    nnx.replace_by_pure_dict(state, names)
    stack = nnx.merge(graphdef, state)
    x_BTD = np.float32(np.random.default_rng(0).normal(size=(2, T, WIDTH)))
    index_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
    zeros_BT = np.zeros_like(index_BT)
    meta = Meta(index_BT, index_BT, zeros_BT + 1, zeros_BT, zeros_BT)
    context = Context(meta, meta, DECODER if causal else ENCODER)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(T) if causal else None
    with torch.no_grad():
        expected = reference(torch.tensor(x_BTD), mask=mask, is_causal=causal)
    compare(jax.jit(lambda x_BTD: stack(x_BTD, context)[0])(x_BTD), expected, "post-norm encoder")
