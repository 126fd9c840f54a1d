"""Encoder-decoders equal those of transformers on random weights: T5 (pre-norm, biases), Marian (post-norm)."""

import jax
import numpy as np
import pytest
from references import array, linear, norm, randomise

from batches import example
from polygpt.attention.biases import T5Bias
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.cross import CrossSequential
from polygpt.models.decoder import DecoderSpec
from polygpt.models.encoder_decoder import EncoderDecoder
from polygpt.models.functional import bind
from polygpt.nn.mlp import MLP, GatedMLP
from polygpt.nn.norms import LayerNorm, RMSNorm
from polygpt.nn.positions import Learned
from sources import build_sources

pytestmark = pytest.mark.parity
DEPTH, WIDTH, HEADS, T, START = 2, 32, 4, 14, 3
SHARED = {"pad_token_id": START, "eos_token_id": 0, "decoder_start_token_id": START}


def stacked(blocks):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)


def t5(torch):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=31, d_model=WIDTH, d_kv=6, d_ff=80, num_layers=DEPTH, num_decoder_layers=DEPTH + 1, num_heads=HEADS,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, relative_attention_num_buckets=8,
        relative_attention_max_distance=10, **SHARED,
    )  # fmt: skip
    reference = randomise(T5ForConditionalGeneration(config))
    attention = MultiHead(HEADS, head_width=6, scale=1.0)
    fields = {"width": WIDTH, "attention": attention, "mlp": GatedMLP(2.5, 1, "gelu_tanh")}
    fields |= {"norm": RMSNorm(1e-6), "tied": False}
    bias = {"buckets": 8, "max_distance": 10}
    encoder = DecoderSpec(depth=DEPTH, position=T5Bias(bidirectional=True, **bias), mask="bidirectional", **fields)
    decoder = DecoderSpec(depth=DEPTH + 1, position=T5Bias(**bias), block=CrossSequential(), **fields)

    def projections(attention):
        return {name: linear(getattr(attention, name[0])) for name in ("query", "key", "value", "output")}

    def block(stack, layer):
        own, *others = layer.layer
        table = {"table": array(stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight)}
        found = {
            "attention_norm": norm(own.layer_norm),
            "attention": projections(own.SelfAttention) | {"terms": table},
            "mlp_norm": norm(others[-1].layer_norm),
            "mlp": {
                name: linear(getattr(others[-1].DenseReluDense, other))
                for name, other in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo"))
            },
        }
        if len(others) == 2:
            found |= {"cross_norm": norm(others[0].layer_norm), "cross": projections(others[0].EncDecAttention)}
        return found

    def stack(one):
        blocks = stacked([block(one, layer) for layer in one.block])
        return {"blocks": blocks, "norm": norm(one.final_layer_norm)}

    params = {"encoder": stack(reference.encoder), "decoder": stack(reference.decoder)}
    table = array(reference.shared.weight)
    params |= {"text": {"table": table}, "start": table[START], "head": linear(reference.lm_head)}
    return reference, EncoderDecoder(decoder, encoder=encoder), params


def marian(torch):
    from transformers import MarianConfig, MarianMTModel

    sizes = {"encoder_layers": DEPTH + 1, "decoder_layers": DEPTH, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
    config = MarianConfig(
        vocab_size=31, d_model=WIDTH, max_position_embeddings=T, activation_function="relu", forced_eos_token_id=None,
        **sizes, **heads, **SHARED,
    )  # fmt: skip
    reference = randomise(MarianMTModel(config))
    fields = {"width": WIDTH, "attention": MultiHead(HEADS, bias=True), "mlp": MLP(factor=2, activation="relu")}
    fields |= {"norm": LayerNorm(1e-5), "norm_placement": "post", "position": Learned(T)}
    encoder = DecoderSpec(depth=DEPTH + 1, mask="bidirectional", **fields)
    decoder = DecoderSpec(depth=DEPTH, block=CrossSequential(), **fields)

    def projections(attention):
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
        return {name: linear(getattr(attention, other)) for name, other in names.items()}

    def block(layer):
        found = {
            "attention_norm": norm(layer.self_attn_layer_norm),
            "attention": projections(layer.self_attn),
            "mlp_norm": norm(layer.final_layer_norm),
            "mlp": {"up": linear(layer.fc1), "down": linear(layer.fc2)},
        }
        if hasattr(layer, "encoder_attn"):
            found |= {"cross_norm": norm(layer.encoder_attn_layer_norm), "cross": projections(layer.encoder_attn)}
        return found

    def stack(one):
        positions = {"table": array(one.embed_positions.weight)}
        return {"blocks": stacked([block(layer) for layer in one.layers]), "position": positions}

    core = reference.model
    table = array(core.shared.weight)
    params = {"encoder": stack(core.encoder), "decoder": stack(core.decoder)}
    params |= {"text": {"table": table}, "start": table[START]}
    return reference, EncoderDecoder(decoder, encoder=encoder), params


@pytest.mark.parametrize("reference_of", [t5, marian], ids=["T5", "Marian"])
def test_an_encoder_decoder_gives_the_reference_logits(torch, reference_of):
    reference, spec, params = reference_of(torch)
    model = bind(spec, 31)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, model.abstract()), "every weight has its place"
    rows = [[(example(9, seed=1), 5), (example(5, seed=2), 3)], [(example(14, seed=3), 6)]]
    batch = build_sources(rows, T, adapters={})
    logits_BTV = np.asarray(jax.jit(model.apply)(params, batch).logits_BTV)
    for row, first, source, stop in ((0, 0, 5, 9), (0, 9, 3, 14), (1, 0, 6, 14)):
        tokens = torch.tensor(batch.tokens_BT[row, first:stop], dtype=torch.long)[None]
        begun = torch.cat([torch.full((1, 1), START), tokens[:, source:]], dim=1)
        with torch.no_grad():
            expected = reference(input_ids=tokens[:, :source], decoder_input_ids=begun).logits[0].numpy()
        assert expected.std() > 0.1
        found = logits_BTV[row, first + source - 1 : stop]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
