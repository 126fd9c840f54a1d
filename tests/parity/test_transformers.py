"""Our models equal those of transformers on random weights: GPT-2, Llama, Whisper's encoder, SigLIP's encoder."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from references import array, compare, conv1d, encoder, encoder_block, linear, listed, norm, randomise

from batches import build, example
from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.image import ImageAdapter, patches
from polygpt.attention.contract import Context
from polygpt.attention.masks import ENCODER
from polygpt.attention.meta import Meta
from polygpt.attention.multi_head import MultiHead
from polygpt.data.media.audio import LogMel
from polygpt.data.media.image import ImageFeatures
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.mlp import MLP, GatedMLP, activate
from polygpt.nn.norms import LayerNorm, RMSNorm
from polygpt.nn.positions import Learned, Rope, Sinusoidal

pytestmark = pytest.mark.parity
DEPTH, WIDTH, HEADS = 3, 32, 4
MARKS = {"bos_token_id": 0, "eos_token_id": 0}


def stack(blocks):
    """Blocks as a scanned model holds them."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)


def gpt2(torch):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=31, n_positions=16, n_embd=WIDTH, n_layer=DEPTH, n_head=HEADS, **MARKS)
    reference = randomise(GPT2LMHeadModel(config))
    ours = DecoderSpec(
        WIDTH, DEPTH, MultiHead(HEADS, bias=True), MLP(), LayerNorm(config.layer_norm_epsilon), Learned(16), tied=True
    )

    def block(layer):
        parts = [slice(i * WIDTH, (i + 1) * WIDTH) for i in range(3)]
        query, key, value = (conv1d(layer.attn.c_attn, part) for part in parts)
        return {
            "attention_norm": norm(layer.ln_1),
            "attention": {"query": query, "key": key, "value": value, "output": conv1d(layer.attn.c_proj)},
            "mlp_norm": norm(layer.ln_2),
            "mlp": {"up": conv1d(layer.mlp.c_fc), "down": conv1d(layer.mlp.c_proj)},
        }

    core = reference.transformer
    decoder = {
        "blocks": stack([block(layer) for layer in core.h]),
        "norm": norm(core.ln_f),
        "position": {"table": array(core.wpe.weight)},
    }
    return reference, ours, {"text": {"table": array(core.wte.weight)}, "decoder": decoder}


def llama(torch):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31, hidden_size=WIDTH, intermediate_size=80, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, rms_norm_eps=1e-5, **MARKS,
    )  # fmt: skip
    reference = randomise(LlamaForCausalLM(config))
    attention, mlp = MultiHead(HEADS, kv_heads=2), GatedMLP(factor=2.5, multiple=1)
    ours = DecoderSpec(WIDTH, DEPTH, attention, mlp, RMSNorm(1e-5), Rope(10000.0), tied=False)

    def block(layer):
        projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
        return {
            "attention_norm": norm(layer.input_layernorm),
            "attention": {name: linear(getattr(layer.self_attn, other)) for name, other in projections.items()},
            "mlp_norm": norm(layer.post_attention_layernorm),
            "mlp": {name: linear(getattr(layer.mlp, f"{name}_proj")) for name in ("gate", "up", "down")},
        }

    core = reference.model
    decoder = {"blocks": stack([block(layer) for layer in core.layers]), "norm": norm(core.norm)}
    params = {"text": {"table": array(core.embed_tokens.weight)}, "decoder": decoder, "head": linear(reference.lm_head)}
    return reference, ours, params


@pytest.mark.parametrize("reference_of", [gpt2, llama], ids=["GPT-2", "Llama"])
def test_a_decoder_gives_the_reference_logits(torch, reference_of):
    reference, spec, params = reference_of(torch)
    model = bind(ModelSpec(spec), 31)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, model.abstract()), "every weight has its place"
    batch = build([[example(16, seed=row)] for row in range(3)], 16, adapters={})
    logits_BTV = jax.jit(model.apply)(params, batch).logits_BTV
    with torch.no_grad():
        expected = reference(torch.tensor(batch.tokens_BT, dtype=torch.long)).logits
    compare(logits_BTV, expected, type(reference).__name__)


def layer_by_layer(tower, x_BTD):
    """What enters the first block of an unrolled tower, what leaves each, and the normalised end."""
    B, T, _ = x_BTD.shape
    index = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    zeros = np.zeros_like(index)
    meta = Meta(index, index, zeros + 1, zeros, zeros)
    found = [x_BTD + tower.position(index)]
    for block in tower.blocks:
        found.append(block(found[-1], Context(meta, meta, ENCODER))[0])
    return [*found, tower.norm(found[-1])]


def load(adapter, params):
    """The adapter's module with these parameters; its connector as it starts."""
    graphdef, state = nnx.split(adapter.build(WIDTH, rngs=nnx.Rngs(0), dtype="float32"))
    pure = nnx.to_pure_dict(state)
    names = functools.partial(jax.tree.map, np.shape)
    params = {**params, "tower": {**params["tower"], "blocks": dict(enumerate(params["tower"]["blocks"].values()))}}
    assert names(params) == names({key: value for key, value in pure.items() if key != "connector"})
    nnx.replace_by_pure_dict(state, {**pure, **params})
    return nnx.merge(graphdef, state)


def check_tower(module, embed, features, layers, last):
    """Every layer of the encoder, then the whole of it in one call."""
    found = jax.jit(lambda x: layer_by_layer(module.tower, embed(x)))(features)
    for depth, (got, expected) in enumerate(zip(found, [*layers, last], strict=True)):
        compare(got, expected, f"layer {depth}")
    whole = jax.jit(lambda x: module.encode(x, np.full(len(x), last.shape[1], np.int32))[0])(features)
    compare(whole, last, "the whole encoder")


def layers_of(torch, reference, layers, inputs):
    """(what enters the first of `layers` and what leaves each, the output of the whole) for channels-first inputs."""
    seen = []

    def before(_, arguments, keywords):
        seen.append(arguments[0] if arguments else keywords["hidden_states"])

    def after(_, arguments, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(after) for layer in layers]
    with torch.no_grad():
        output = reference(torch.tensor(np.moveaxis(inputs, -1, 1))).last_hidden_state
    for handle in handles:
        handle.remove()
    return [array(tensor) for tensor in seen], array(output)


def test_the_audio_encoder_is_whispers(torch):
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=WIDTH, encoder_layers=DEPTH, encoder_attention_heads=HEADS, encoder_ffn_dim=4 * WIDTH,
        num_mel_bins=16, max_source_positions=20,
    )  # fmt: skip
    reference = WhisperEncoder(config)
    sinusoids = array(reference.embed_positions.weight)
    randomise(reference)
    with torch.no_grad():
        reference.embed_positions.weight.copy_(torch.tensor(sinusoids))
    tower = encoder(WIDTH, DEPTH, HEADS, "gelu", 1e-5, key_bias=False, position=Sinusoidal())
    adapter = AudioAdapter(LogMel(0.4, mels=16), tower=tower)
    np.testing.assert_allclose(
        Sinusoidal().build(WIDTH, rngs=nnx.Rngs(0))(np.arange(20, dtype=np.int32)[None])[0],
        sinusoids,
        rtol=0,
        atol=1e-5,
    )

    def convolution(conv):
        """torch keeps [outputs, inputs, size]."""
        kernel = array(conv.weight).transpose(2, 1, 0)
        return {"linear": {"kernel": kernel.reshape(-1, kernel.shape[-1]), "bias": array(conv.bias)}}

    names = ("self_attn_layer_norm", "final_layer_norm", "out_proj")
    blocks = [encoder_block(layer, *names, layer) for layer in reference.layers]
    module = load(
        adapter,
        {
            "first": convolution(reference.conv1),
            "second": convolution(reference.conv2),
            "tower": {"blocks": listed(blocks), "norm": norm(reference.layer_norm)},
        },
    )
    mel_BFM = np.float32(np.random.default_rng(0).normal(size=(2, 40, 16)))

    def embed(mel_BFM):
        return activate("gelu", module.second(activate("gelu", module.first(mel_BFM))))

    check_tower(module, embed, mel_BFM, *layers_of(torch, reference, reference.layers, mel_BFM))


def test_the_image_encoder_is_siglips(torch):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        image_size=12, patch_size=4, vision_use_head=False,
    )  # fmt: skip
    reference = randomise(SiglipVisionModel(config))
    core = getattr(reference, "vision_model", reference)
    tower = encoder(WIDTH, DEPTH, HEADS, "gelu_tanh", config.layer_norm_eps, position=Learned(9))
    adapter = ImageAdapter(ImageFeatures(12, 12), patch=4, tower=tower)
    # torch keeps [outputs, channels, height, width]; a patch here is [height, width, channels] flattened.
    kernel = array(core.embeddings.patch_embedding.weight).transpose(2, 3, 1, 0).reshape(-1, WIDTH)
    table = array(core.embeddings.position_embedding.weight)
    blocks = [
        encoder_block(layer, "layer_norm1", "layer_norm2", "out_proj", layer.mlp) for layer in core.encoder.layers
    ]
    module = load(
        adapter,
        {
            "patch": {"kernel": kernel, "bias": array(core.embeddings.patch_embedding.bias)},
            "tower": {"blocks": listed(blocks), "norm": norm(core.post_layernorm), "position": {"table": table}},
        },
    )
    pixels_BHWC = np.float32(np.random.default_rng(0).normal(size=(2, 12, 12, 3)))
    seen = layers_of(torch, reference, core.encoder.layers, pixels_BHWC)
    check_tower(module, lambda pixels: module.patch(patches(pixels, 4)), pixels_BHWC, *seen)
