"""Attention layers equal those of transformers on random weights: BLOOM, T5, Gemma 2, Qwen 3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import array, compare, linear, norm, randomise

from polygpt.attention.biases import ALiBi, BucketBias, T5Bias, slopes
from polygpt.attention.contract import Context, Dims
from polygpt.attention.masks import DECODER, ENCODER
from polygpt.attention.meta import Meta
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.scores import SoftCap
from polygpt.attention.sliding import SlidingWindow
from polygpt.nn.norms import RMSNorm
from polygpt.nn.positions import NoPosition, Rope

pytestmark = pytest.mark.parity
B, T, WIDTH, HEADS, HEAD_WIDTH = 2, 12, 32, 4, 8


def inputs() -> np.ndarray:
    return np.float32(np.random.default_rng(0).normal(size=(B, T, WIDTH)))


def ours(spec: MultiHead, position, params, mask=DECODER) -> np.ndarray:
    """What a layer with these parameters makes of the inputs."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: spec.build(Dims(WIDTH, position=position), nnx.Rngs(0))))
    assert jax.tree.map(np.shape, params) == jax.tree.map(jnp.shape, nnx.to_pure_dict(state)), (
        "every weight has a place"
    )
    nnx.replace_by_pure_dict(state, params)
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    meta = Meta(index, index, jnp.ones_like(index), jnp.zeros_like(index), jnp.zeros_like(index))
    return nnx.merge(graphdef, state)(inputs(), Context(meta, meta, mask))[0]


def causal(torch, window: int = T):
    """What transformers add to scores, float32 [1, 1, T, T]."""
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    return torch.tensor(
        np.where((distance >= 0) & (distance < window), 0, np.finfo(np.float32).min)[None, None]
    ).float()


def llama_names(layer) -> dict:
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    return {name: linear(getattr(layer, other)) for name, other in names.items()}


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 12, 20])
def test_alibi_has_the_slopes_of_bloom(torch, heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    alibi = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # slope times position
    np.testing.assert_allclose(slopes(heads), array(alibi)[:, 0, 1], rtol=1e-6)


def test_attention_with_alibi_is_blooms(torch):
    from transformers import BloomConfig
    from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

    config = BloomConfig(hidden_size=WIDTH, n_head=HEADS, hidden_dropout=0.0, attention_dropout=0.0)
    layer = randomise(BloomAttention(config, layer_idx=0))
    x_BTD = torch.tensor(inputs())
    with torch.no_grad():
        alibi = build_alibi_tensor(torch.ones(B, T), HEADS, torch.float32)
        expected = layer(x_BTD, torch.zeros_like(x_BTD), alibi, causal(torch))[0]
    # Heads, then query, key and value, then the channels of a head.
    kernel = array(layer.query_key_value.weight).T.reshape(WIDTH, HEADS, 3, HEAD_WIDTH)
    bias = array(layer.query_key_value.bias).reshape(HEADS, 3, HEAD_WIDTH)
    params = {
        name: {"kernel": kernel[:, :, i].reshape(WIDTH, WIDTH), "bias": bias[:, i].reshape(WIDTH)}
        for i, name in enumerate(("query", "key", "value"))
    }
    compare(ours(MultiHead(HEADS, bias=True), ALiBi(), params | {"output": linear(layer.dense)}), expected, "BLOOM")


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (32, 256), (64, 128), (8, 20), (16, 1000), (12, 50)])
def test_the_buckets_are_those_of_t5(torch, buckets, far, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = np.arange(-3000, 3001)
    expected = T5Attention._relative_position_bucket(torch.tensor(relative), bidirectional, buckets, far)
    np.testing.assert_array_equal(BucketBias(buckets, far, bidirectional).bucket(jnp.asarray(relative)), expected)


@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
def test_attention_with_buckets_is_t5s(torch, decoder):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        d_model=WIDTH, num_heads=HEADS, d_kv=HEAD_WIDTH, dropout_rate=0.0, relative_attention_num_buckets=8,
        relative_attention_max_distance=10, is_decoder=decoder, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer = randomise(T5Attention(config, has_relative_attention_bias=True, layer_idx=0))
    with torch.no_grad():
        layer.relative_attention_bias.weight.mul_(10)
        expected = layer(torch.tensor(inputs()), mask=causal(torch) if decoder else None)[0]
    params = {name: linear(getattr(layer, name[0])) for name in ("query", "key", "value", "output")}
    params["terms"] = {"table": array(layer.relative_attention_bias.weight)}
    spec = MultiHead(HEADS, scale=1.0)
    compare(
        ours(spec, T5Bias(8, 10, bidirectional=not decoder), params, DECODER if decoder else ENCODER), expected, "T5"
    )


@pytest.mark.parametrize("sliding", [True, False], ids=["sliding", "full"])
def test_attention_with_soft_cap_window_and_groups_is_gemma_2s(torch, sliding):
    from transformers import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding

    config = Gemma2Config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=6, sliding_window=5,
        query_pre_attn_scalar=10, attn_logit_softcapping=1.5, num_hidden_layers=2, max_position_embeddings=64,
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer = randomise(Gemma2Attention(config, layer_idx=0))
    assert layer.sliding_window == 5
    x_BTD = torch.tensor(inputs())
    with torch.no_grad():
        rotation = Gemma2RotaryEmbedding(config)(x_BTD, torch.arange(T)[None])
        expected = layer(x_BTD, rotation, causal(torch, 5 if sliding else T))[0]
    fields = {"kv_heads": 2, "head_width": 6, "scale": 10**-0.5, "scores": (SoftCap(1.5),)}
    spec = SlidingWindow(HEADS, window=5, **fields) if sliding else MultiHead(HEADS, **fields)
    compare(ours(spec, Rope(10000.0), llama_names(layer)), expected, "Gemma 2")


def test_attention_with_normalised_queries_and_keys_is_qwen_3s(torch):
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    config = Qwen3Config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-5,
        num_hidden_layers=1, max_position_embeddings=64,
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer = randomise(Qwen3Attention(config, layer_idx=0))
    x_BTD = torch.tensor(inputs())
    rotary = Qwen3RotaryEmbedding(config)
    with torch.no_grad():
        expected = layer(x_BTD, rotary(x_BTD, torch.arange(T)[None]), causal(torch))[0]
    params = llama_names(layer) | {"query_norm": norm(layer.q_norm), "key_norm": norm(layer.k_norm)}
    spec = MultiHead(HEADS, kv_heads=2, head_width=6, qk_norm=RMSNorm(1e-5), position=Rope(10000.0))
    compare(ours(spec, NoPosition(), params), expected, "Qwen 3")
