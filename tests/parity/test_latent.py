"""Multi-head latent attention equals that of DeepSeek-V3 in transformers, on random weights, in both forms."""

import numpy as np
import pytest
from flax import nnx
from references import array, compare, linear, norm, randomise

from polygpt.attention.contract import Context, Dims
from polygpt.attention.latent import MultiHeadLatent
from polygpt.attention.masks import DECODER
from polygpt.attention.meta import Meta
from polygpt.nn.positions import Rope

pytestmark = pytest.mark.parity
WIDTH, HEADS, T = 32, 4, 12


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch", reason="parity needs torch: pip install 'polygpt[parity]'")
    pytest.importorskip("transformers", reason="parity needs transformers: pip install 'polygpt[parity]'")
    torch.set_num_threads(1)
    return torch


def reference(torch, spec: MultiHeadLatent, x_BTD):
    """(their module, its output for `x_BTD`)"""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

    d = spec.width_of_head(WIDTH)
    config = DeepseekV3Config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=spec.q_rank,
        kv_lora_rank=spec.rank(WIDTH), qk_nope_head_dim=d, qk_rope_head_dim=spec.width_of_rope(WIDTH), v_head_dim=d,
        attention_bias=spec.bias, max_position_embeddings=64, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    module = randomise(theirs.DeepseekV3Attention(config, 0))
    x = torch.tensor(x_BTD)
    place = theirs.DeepseekV3RotaryEmbedding(config)(x, torch.arange(T)[None])
    causal = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        return module, array(module(x, place, causal)[0])


def parameters(theirs, spec: MultiHeadLatent) -> dict:
    """Their weights by our names. Their rotary channels come in neighbouring pairs, ours a half apart."""
    d, r, R = spec.width_of_head(WIDTH), spec.width_of_rope(WIDTH), spec.rank(WIDTH)
    apart = np.concatenate([np.arange(0, r, 2), np.arange(1, r, 2)])

    def columns(parameters, chosen):
        return {name: np.ascontiguousarray(x[..., chosen]) for name, x in parameters.items()}

    def of_heads(parameters, chosen):
        """The chosen channels of every head."""
        kernel = parameters["kernel"].reshape(len(parameters["kernel"]), HEADS, -1)[:, :, chosen]
        return {"kernel": kernel.reshape(len(kernel), -1)}

    down, up = linear(theirs.kv_a_proj_with_mqa), linear(theirs.kv_b_proj)
    found = {
        "latent": columns(down, np.arange(R)),
        "latent_norm": norm(theirs.kv_a_layernorm),
        "rope_key": columns(down, R + apart),
        "key": of_heads(up, np.arange(d)),
        "value": of_heads(up, d + np.arange(d)),
        "output": linear(theirs.o_proj),
    }
    whole = np.concatenate([np.arange(d), d + apart])
    if spec.q_rank is None:
        return found | {"query": of_heads(linear(theirs.q_proj), whole)}
    return found | {
        "query_latent": linear(theirs.q_a_proj),
        "query_latent_norm": norm(theirs.q_a_layernorm),
        "query": of_heads(linear(theirs.q_b_proj), whole),
    }


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("q_rank", [None, 10], ids=["queries at once", "latent queries"])
def test_it_is_deepseeks(torch, q_rank, form):
    spec = MultiHeadLatent(HEADS, bias=q_rank is not None, kv_rank=12, q_rank=q_rank, rope_width=6, form=form)
    x_BTD = np.float32(np.random.default_rng(0).normal(size=(2, T, WIDTH)) * 3)
    theirs, expected = reference(torch, spec, x_BTD)
    module = spec.build(Dims(WIDTH, position=Rope()), nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    params = parameters(theirs, spec)
    pure = nnx.to_pure_dict(state)
    shapes = [{k: {n: x.shape for n, x in v.items()} for k, v in tree.items()} for tree in (params, pure)]
    assert shapes[0] == shapes[1], "every weight has its place"
    nnx.replace_by_pure_dict(state, params)
    index = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
    meta = Meta(index, index, np.ones_like(index), *[np.zeros_like(index)] * 2)
    got, _ = nnx.merge(graphdef, state)(x_BTD, Context(meta, meta, DECODER))
    compare(got, expected, f"DeepseekV3Attention, {form}")
