"""A prompt of one span: who sees whom, by gradient, from the laid out row on; and generation beside the whole row.

An encoder-decoder reads such prompts with its encoder.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_media import ADAPTERS, picture, recording

from polygpt.blocks.cross import CrossSequential
from polygpt.data.example import Example, Text
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.packing import collate, pack
from polygpt.data.tokenizers.bytes import ByteTokenizer
from polygpt.generation.generate import generate
from polygpt.generation.sampling import GREEDY
from polygpt.models.decoder import DecoderSpec
from polygpt.models.encoder_decoder import EncoderDecoder
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec

TOKENIZER = ByteTokenizer()
BOTH_WAYS = LayoutSpec(seq_len=64, prompt_span="bidirectional")
PROMPT = (picture(0), Text("+", 0.0), recording(1, 900), Text("is", 0.0))


@pytest.fixture(scope="module")
def toy():
    """(model, parameters that make much of what a position sees)."""
    return lively(ModelSpec(DecoderSpec(width=16, depth=2, scan=False), ADAPTERS))


@pytest.fixture(scope="module", params=["decoder", "encoder-decoder"])
def either(request):
    """As `toy`, and an encoder-decoder."""
    if request.param == "decoder":
        return request.getfixturevalue("toy")
    return lively(EncoderDecoder(DecoderSpec(width=16, depth=2, scan=False, block=CrossSequential()), ADAPTERS))


def lively(spec):
    model = bind(spec, TOKENIZER.vocabulary)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), model.abstract())
    params["text"]["table"] *= 0.05
    return model, params


def row_of(parts, layout=BOTH_WAYS):
    return lay_out(Example(tuple(parts), "the record"), layout, TOKENIZER, ADAPTERS)


@pytest.mark.parametrize("fusion", ["interleaved", "prefix"])
def test_a_prompt_sees_all_of_itself_and_nothing_of_the_answer(toy, fusion):
    model, params = toy
    row = row_of([*PROMPT, Text("five")], BOTH_WAYS.replace(fusion=fusion))
    other = row_of([Text("ab", 0.0), Text("c")])
    batch = collate([pack([row, other], ADAPTERS)], 32, ADAPTERS)
    t, s = np.indices((32, 32))
    prompt = (row.span > 0).sum()
    assert prompt == len(row) - len("five") - 1
    segment = batch.segment_BT[0]

    def logits(x_BTD):  # each of the row's positions by its logits, as a function of what the decoder is given
        module = model.module(params)
        return module.logits(module.decoder(x_BTD, batch)[0])[0].sum(axis=-1)

    x_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(1, 32, 16)), jnp.float32)
    seen = np.abs(np.asarray(jax.jit(jax.jacrev(logits))(x_BTD))[:, 0]).max(axis=-1) > 0
    together = (t < prompt) & (s < prompt)
    second = (segment == 2)[:, None] & (t - len(row) < 3) & (s - len(row) < 3)  # bos and two letters
    expected = (segment[:, None] == segment) & ((s <= t) | together | second)
    real = segment > 0
    np.testing.assert_array_equal(seen[real][:, real], expected[real][:, real])


@pytest.mark.parametrize("fusion", ["interleaved", "prefix"])
def test_generation_after_a_span_is_what_the_whole_row_predicts(either, fusion):
    """Greedy tokens of the cached loop are the likeliest of the row that holds them, laid out as training does."""
    model, params = either
    layout = BOTH_WAYS.replace(fusion=fusion)
    prompts = [PROMPT, (Text("only words", 0.0),), (picture(3),)]
    written = generate(model, params, TOKENIZER, prompts, layout, GREEDY.replace(max_tokens=8))
    apply = jax.jit(lambda params, batch: model.apply(params, batch).logits_BTV)
    for prompt, found in zip(prompts, written, strict=True):
        row = row_of([*prompt, Text("x" * len(found.tokens))], layout)
        answer = row.weight > 0
        tokens = row.tokens.copy()
        tokens[1:][answer[:-1]] = [*found.tokens, TOKENIZER.eos]
        batch = collate([row], 64, ADAPTERS)
        batch.tokens_BT[0, : len(row)] = tokens
        likeliest = np.asarray(apply(params, batch))[0, : len(row)].argmax(axis=-1)[answer]
        expected = [*found.tokens, TOKENIZER.eos] if found.finish == "eos" else [*found.tokens]
        assert likeliest[: len(expected)].tolist() == expected and expected
    for index, prompt in enumerate(prompts):
        alone = generate(model, params, TOKENIZER, [prompt], layout, GREEDY.replace(max_tokens=8))
        assert alone[0].tokens == written[index].tokens, "whatever else is in the batch"
    causal = generate(model, params, TOKENIZER, prompts, layout.replace(prompt_span="causal"), GREEDY)
    assert [one.tokens[:8] for one in causal] != [one.tokens for one in written], "the span makes a difference"
