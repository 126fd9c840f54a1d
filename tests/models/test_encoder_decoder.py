"""The encoder-decoder: who sees whom, packed rows, caches, media and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import LIGHT, VOCABULARY, columns, example, lively
from polygpt.attention.biases import T5Bias
from polygpt.attention.kernels import dispatch
from polygpt.attention.mamba2 import Mamba2
from polygpt.attention.masks import Mask
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.sliding import SlidingWindow
from polygpt.attention.transformer_xl import TransformerXL
from polygpt.blocks.block import Layer
from polygpt.blocks.cross import CrossSequential
from polygpt.data.example import Text
from polygpt.data.labels import Label
from polygpt.data.layout import LayoutSpec, prompt_batch
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.errors import SpecError
from polygpt.generation.generate import generate
from polygpt.generation.sampling import Sampling
from polygpt.models.decoder import Decoder, DecoderSpec
from polygpt.models.describe import describe
from polygpt.models.encoder_decoder import EncoderDecoder
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.models.prefix import ADDED, PrefixTuning
from polygpt.nn.mlp import MLP
from polygpt.nn.norms import LayerNorm
from polygpt.nn.positions import Learned, MRope
from polygpt.optim.mup import MuP
from polygpt.parameters import paths, tree_of
from sources import build_sources, small, small_model

T = 16
ROWS = [
    [(example(7, seed=1), 4), (example(6, seed=2), 2)],
    [(example(5, seed=3), 0), (example(9, seed=4), 8)],
    [(example(3, seed=5), 3)],
]
BATCH = build_sources(ROWS, T, adapters={})
FORMS = {
    "default": {},
    "as BART": {
        "norm_placement": "post",
        "norm": LayerNorm(),
        "position": Learned(T),
        "attention": MultiHead(4, bias=True),
        "scan": False,
    },
    "own": {"block": CrossSequential(MultiHead(2, head_width=3)), "pattern": (None, MultiHead(1)), "depth": 4},
}


def rows_of(batch, *rows):
    return jax.tree.map(lambda x: x[np.array(rows)], batch)


@pytest.mark.parametrize("form", ["default", "as BART"])
def test_packed_examples_equal_examples_alone(form):
    model, params = small_model(**FORMS[form])
    apply = jax.jit(model.apply)
    packed = np.asarray(apply(params, BATCH).logits_BTV)
    alone = np.asarray(apply(params, build_sources([[one] for row in ROWS for one in row], T, adapters={})).logits_BTV)
    places = [(0, slice(0, 7)), (0, slice(7, 13)), (1, slice(0, 5)), (1, slice(5, 14)), (2, slice(0, 3))]
    for number, (row, place) in enumerate(places):
        np.testing.assert_allclose(packed[row, place], alone[number, : place.stop - place.start], rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", ["default", pytest.param("own", marks=pytest.mark.slow)])
def test_who_sees_whom(form):
    """By gradient with respect to the embeddings: the decoder sees earlier targets and the whole source."""
    model, params = small_model(**FORMS[form])

    def outputs(x_BTD):
        with model._merged(params) as module:
            written, written_BTD, source, *_ = module._encode(x_BTD, BATCH, None)
            return module.decoder(written_BTD, written, None, None, source)[0].sum(axis=(0, 2))

    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(3, T, 16)), jnp.float32)
    seen = np.abs(np.asarray(jax.jit(jax.jacrev(outputs))(x_BTD))).max(axis=-1) > 0  # [T, B, T]
    t, s = np.indices((T, T))
    for b in range(3):
        segment, source = BATCH.segment_BT[b], BATCH.span_BT[b] == 1
        last = source & ~np.append(source[1:] & (segment[1:] == segment[:-1]), False)
        writes = (segment > 0) & (~source | last)
        own = segment[:, None] == segment[None, :]
        expected = own & (source[None, :] | (s <= t))
        np.testing.assert_array_equal(seen[writes, b], expected[writes])


def test_an_example_without_a_source_is_read_by_the_decoder_alone():
    """With biases too: cross-attention adds nothing, and other rows' sources do not matter."""
    model, params = small_model(attention=MultiHead(4, bias=True))
    decoder = model.spec.decoder.replace(block=DecoderSpec().block)
    alone = bind(ModelSpec(decoder), VOCABULARY)
    blocks = {name: own for name, own in params["decoder"]["blocks"].items() if not name.startswith("cross")}
    own = {"text": params["text"], "decoder": params["decoder"] | {"blocks": blocks}}
    expected = jax.jit(alone.apply)(own, BATCH.replace(span_BT=np.zeros_like(BATCH.span_BT))).logits_BTV
    found = jax.jit(model.apply)(params, BATCH).logits_BTV
    np.testing.assert_allclose(found[1, :5], expected[1, :5], rtol=0, atol=1e-5)
    assert np.abs(found[0, 4:7] - expected[0, 4:7]).max() > 0.1


@pytest.mark.parametrize(
    "form", ["default", *(pytest.param(one, marks=pytest.mark.slow) for one in ("as BART", "own"))]
)
def test_reading_in_pieces_equals_reading_at_once(form):
    """One row alone, its source within the first piece."""
    model, params = small_model(scale=0.2, **FORMS[form])
    apply, decode = jax.jit(model.apply), jax.jit(model.decode)
    for rows, pieces in (([[(example(12, seed=4), 6)]], (6, 9, 10, 11, 12)), ([[(example(4), 0)]], (1, 2, 3, 4))):
        batch = build_sources(rows, 12, adapters={})
        expected, cache, found, start = apply(params, batch).logits_BTV, model.init_cache(1, 12), [], 0
        for stop in pieces:
            logits_BTV, cache = decode(params, columns(batch, start, stop, media=False), cache)
            found, start = [*found, logits_BTV], stop
        np.testing.assert_allclose(np.concatenate(found, axis=1), expected[:, :start], rtol=0, atol=1e-5)


def test_the_cache_holds_the_source_and_later_calls_do_not_run_the_encoder():
    model, params = small_model()
    batch = build_sources([[(example(10, seed=4), 6)]], 10, adapters={})
    decode = jax.jit(model.decode)
    _, cache = decode(params, columns(batch, 0, 6, media=False), model.init_cache(1, 10))
    cross = cache.decoder.layers[0]["cross"]
    assert cross["key"].shape == cross["value"].shape == (1, 2, 6, 4), "[B, K, S, d]: no more than the source"
    spoiled = params | {"encoder": jax.tree.map(lambda x: x * np.nan, params["encoder"])}
    step = columns(batch, 6, 7, media=False)
    np.testing.assert_array_equal(decode(spoiled, step, cache)[0], decode(params, step, cache)[0])


def test_the_encoder_runs_in_the_first_call_only(monkeypatch):
    model, params = small_model()
    read, plain = [], Decoder.__call__

    def counted(self, *arguments, **keywords):
        read.append(self.spec.mask)
        return plain(self, *arguments, **keywords)

    monkeypatch.setattr(Decoder, "__call__", counted)
    batch, cache = build_sources([[(example(10, seed=4), 6)]], 10, adapters={}), model.init_cache(1, 10)
    _, cache = jax.eval_shape(model.decode, params, columns(batch, 0, 6, media=False), cache)
    assert read == ["bidirectional", "spans"]
    jax.eval_shape(model.decode, params, columns(batch, 6, 7, media=False), cache)
    assert read == ["bidirectional", "spans", "spans"]


def test_cross_attention_tells_backends_that_its_keys_are_others(monkeypatch):
    """Splash attention gives NaN if queries and keys are not of the same positions."""
    rules, plain = [], dispatch.attend

    def recording(rule, *arguments):
        rules.append(rule)
        return plain(rule, *arguments)

    monkeypatch.setattr(dispatch, "attend", recording)
    model = bind(small(), VOCABULARY)
    jax.eval_shape(model.apply, model.abstract(), BATCH)
    assert [rule.across for rule in rules] == [False, False, True], "of the encoder, the decoder, and between them"


@pytest.mark.parametrize("backend", ["chunked", pytest.param("flex", marks=pytest.mark.slow)])
def test_every_backend_computes_the_same(backend):
    """In small blocks, of which some hold no visible pair; values and gradients."""
    expected, params = small_model(depth=1, attention=MultiHead(2, backend="reference"))
    decoder = expected.spec.decoder.replace(attention=MultiHead(2, backend=backend, strict=True))
    model = bind(expected.spec.replace(decoder=decoder), VOCABULARY)

    def loss(params, model):
        logits_BTV = model.apply(params, BATCH).logits_BTV
        return jnp.sum(BATCH.weight_BT[..., None] * jnp.sin(logits_BTV)), logits_BTV

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    with dispatch.in_blocks_of(4):
        found, logits_BTV = gradient(params, model)
    wanted, wanted_BTV = gradient(params, expected)
    real = BATCH.segment_BT > 0
    np.testing.assert_allclose(logits_BTV[real], wanted_BTV[real], rtol=0, atol=2e-5)
    for name, leaf in paths(found).items():
        np.testing.assert_allclose(leaf, paths(wanted)[name], rtol=0, atol=2e-4, err_msg=name)


def test_padding_may_hold_anything():
    model, params = small_model()
    apply = jax.jit(model.apply)
    clean = apply(params, BATCH)
    padding_BT = BATCH.segment_BT == 0
    dirty = BATCH.replace(
        tokens_BT=np.where(padding_BT, 9, BATCH.tokens_BT),
        span_BT=np.where(padding_BT, 1, BATCH.span_BT),
        position_BT=np.where(padding_BT, 5, BATCH.position_BT),
    )
    found = apply(params, dirty)
    np.testing.assert_array_equal(found.logits_BTV[~padding_BT], clean.logits_BTV[~padding_BT])
    assert np.isfinite(found.logits_BTV).all()


@pytest.mark.parametrize(
    "position", [pytest.param({}, marks=pytest.mark.slow), {"position": MRope(sections=(1, 1, 0))}]
)
def test_media_are_read_by_the_encoder(position):
    """Packed and alone, with unused items and a modality that a batch does not have."""
    rows = [[(example(2, ("image", 4), 1, ("audio", 3), 4, seed=1), 10), (example(2, ("audio", 4), 3, seed=2), 6)]]
    model, params = small_model(adapters=LIGHT, **position)
    apply = jax.jit(model.apply)
    batch = build_sources(rows, 24, adapters=LIGHT, bidirectional=True)
    packed = np.asarray(apply(params, batch).logits_BTV)[0]
    alone = apply(params, build_sources([[one] for one in rows[0]], 24, adapters=LIGHT)).logits_BTV
    np.testing.assert_allclose(packed[:14], alone[0, :14], rtol=0, atol=2e-5)
    np.testing.assert_allclose(packed[14:23], alone[1, :9], rtol=0, atol=2e-5)
    other = dataclasses.replace(batch.media["image"], features=batch.media["image"].features + 1)
    found = apply(params, batch.replace(media=batch.media | {"image": other})).logits_BTV[0]
    moved = np.abs(found - packed)
    assert (moved[:14].max(axis=-1) > 0).all() and not moved[14:].any(), "the picture is seen in its own example only"
    speech = build_sources([rows[0][1:]], 24, adapters=LIGHT)
    less = speech.replace(media={"audio": speech.media["audio"]})
    np.testing.assert_allclose(apply(params, less).logits_BTV[0, :9], packed[14:23], rtol=0, atol=2e-5)


def test_losses_and_gradients_do_not_depend_on_scan_and_remat():
    scanned, params = small_model()

    def loss(params, model):
        scores = model.apply(params, BATCH).logits_BTV
        return jnp.sum(BATCH.weight_BT[..., None] * jnp.sin(scores))

    unrolled = bind(scanned.spec.replace(decoder=scanned.spec.decoder.replace(scan=False, remat="full")), VOCABULARY)
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    expected = paths(unstacked(gradient(params, scanned)))
    for name, leaf in paths(gradient(unstacked(params), unrolled)).items():
        assert np.abs(leaf).max() > 1e-3, f"{name} has a gradient"
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=2e-4, err_msg=name)


def unstacked(params):
    """The parameters of stacks that are not scanned."""

    def blocks(stack):
        return {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], stack["blocks"]) for i in range(2)}

    return params | {name: params[name] | {"blocks": blocks(params[name])} for name in ("encoder", "decoder")}


def test_bfloat16_is_near_float32():
    model, params = small_model(scale=0.2)
    half = bind(model.spec.replace(dtype="bfloat16"), VOCABULARY)
    exact, near = (jax.jit(one.apply)(params, BATCH) for one in (model, half))
    assert near.hidden_BTD.dtype == jnp.bfloat16
    real = BATCH.segment_BT > 0
    np.testing.assert_allclose(near.logits_BTV[real], exact.logits_BTV[real], rtol=0, atol=0.1)


def test_what_is_captured_of_both_stacks():
    model, params = small_model()
    sites = ("cross", "residual", "encoder/residual")
    hidden_BTD, _, found = jax.jit(model.hidden, static_argnames="capture")(params, BATCH, capture=sites)
    assert all(found[site].shape == (2, 3, T, 16) for site in sites)
    assert np.abs(found["cross"][:, 0, 3:7]).max() > 0 and not found["cross"][:, 1, :5].any(), "without a source"
    last = np.asarray(found["encoder/residual"][1])
    normalised = last / np.sqrt(np.mean(np.square(last), axis=-1, keepdims=True) + 1e-6)
    expected = normalised * params["encoder"]["norm"]["scale"]
    np.testing.assert_allclose(hidden_BTD[0, :3], expected[0, :3], rtol=0, atol=1e-4)


def test_attention_weights_are_of_targets_and_of_the_source():
    model, params = small_model(scan=False)
    found = jax.jit(model.attention)(params, BATCH, np.arange(4, 7))
    assert [weights.shape for weights in found.values()] == [(3, 8, 3, T)] * 2
    for weights_BHRT in found.values():
        own_HRT, cross_HRT = weights_BHRT[0, :4], weights_BHRT[0, 4:]
        np.testing.assert_allclose(own_HRT[..., 3:7].sum(axis=-1), 1, atol=1e-5)
        np.testing.assert_allclose(cross_HRT[..., :4].sum(axis=-1), 1, atol=1e-5)
        assert not weights_BHRT[1, 4:, 0].any(), "position 4 of the second row has no source"


def test_sizes_and_costs_are_counted_by_stack():
    spec = small(encoder=DecoderSpec(width=16, depth=3, mask="bidirectional"))
    model = bind(spec, VOCABULARY)
    found = describe(spec, VOCABULARY, T)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(model.abstract()))
    parts = {part.name: part for part in found.parts}
    matrices = {path: leaf.size for path, leaf in paths(model.abstract()).items() if path.endswith("kernel")}
    kernels = {
        name: sum(size for path, size in matrices.items() if path.startswith(name)) for name in ("encoder", "decoder")
    }
    assert parts["encoder"].flops == 2 * kernels["encoder"] + 3 * 4 * 16 * T
    assert parts["decoder"].flops == 2 * kernels["decoder"] + 2 * 2 * 4 * 16 * (T + 1) // 2
    assert parts["start"].parameters == 16


def test_an_encoder_like_the_decoder_has_biases_for_both_directions():
    assert small(position=T5Bias(buckets=8)).encoder_stack().position == T5Bias(buckets=8, bidirectional=True)
    assert small().encoder_stack().replace(mask="spans", block=CrossSequential()) == small().decoder


def test_mup_scales_both_stacks_and_cross_attention():
    mup = MuP({"decoder.width": 8})
    spec = small(width=16, pattern=(None, Layer(block=CrossSequential(MultiHead(2)))), mlp=MLP()).replace(mup=mup)
    growth = paths(bind(spec, VOCABULARY).growth)
    hidden = ("encoder/blocks/attention/query", "decoder/blocks/0/cross/key", "decoder/blocks/1/cross/output")
    assert {growth[f"{name}/kernel"].kind for name in hidden} == {"hidden"}
    assert (growth["start"].kind, growth["start"].initial) == ("input", 1.0)
    scaled = spec.scaled()
    first, second = (layer.block.cross_of(layer.attention) for layer in scaled.decoder.period())
    assert first.scale == scaled.encoder_stack().attention.scale == 2**-0.5 * 2 / 4
    assert second.scale == 4**-0.5 * 4 / 8
    given = spec.replace(encoder=DecoderSpec(width=16, attention=MultiHead(4), mask="bidirectional"), mup=None)
    with pytest.raises(SpecError, match="model.mup.base: .*it must be 8 in the encoder"):
        given.replace(mup=mup)
    assert (
        given.replace(mup=MuP({"decoder.width": 8, "encoder.width": 8})).scaled().encoder.attention.scale == first.scale
    )


@pytest.mark.parametrize("scan", [True, False])
def test_a_prefix_belongs_to_cross_attention_too(scan):
    spec = small(scan=scan)
    model = bind(spec.replace(prefix=PrefixTuning(length=3, pattern="/cross$")), VOCABULARY)
    params = lively(model)
    found = jax.jit(jax.grad(lambda params: jnp.square(model.apply(params, BATCH).logits_BTV).sum()))(params)
    moved = {name: np.abs(value).max() > 0 for name, value in paths(found).items() if ADDED.search(name)}
    assert len(moved) == (2 if scan else 4) and all(moved.values())
    weights = [weights_BHRT[0, 4:] for weights_BHRT in model.attention(params, BATCH, np.arange(4, 7)).values()]
    assert all((0 < one.sum(axis=-1)).all() and (one.sum(axis=-1) < 1).all() for one in weights), "the rest is its own"
    alone = model.apply(params, BATCH).logits_BTV[1, :5]
    plain = {name: value for name, value in paths(params).items() if not ADDED.search(name)}
    without = bind(spec, VOCABULARY).apply(tree_of(plain), BATCH).logits_BTV[1, :5]
    np.testing.assert_allclose(alone, without, rtol=0, atol=1e-5, err_msg="an example without a source")


@dataclasses.dataclass(frozen=True)
class SameSpeaker(Mask):
    """Query and key have the same label."""

    def labels(self):
        return frozenset({"speaker"})

    def __call__(self, query, key):
        return query.extra["speaker"] == key.extra["speaker"]


@dataclasses.dataclass(frozen=True)
class BySpeaker(MultiHead):
    """Attention to positions of one speaker."""

    def mask(self, mask):
        return mask & SameSpeaker()


def test_the_encoder_reads_labels_in_generation_too():
    """The first token is the most likely one after the same prompt, whose speakers change what it is."""
    spec = small(encoder=DecoderSpec(width=16, depth=2, attention=BySpeaker(4), mask="bidirectional"))
    tokenizer, layout = Bytes().build(), MARKED.replace(labels={"speaker": Label(classes=2)})
    model = bind(spec, tokenizer.vocabulary)
    params, speakers = lively(model), ((0, 1, 0), (0, 0, 0), (0, 1, 1))
    prompts = [
        [Text(text, 0.0, labels={"speaker": one}) for text, one in zip(("ab", "cd", "ef"), some, strict=True)]
        for some in speakers
    ]
    batch = prompt_batch(prompts, layout, tokenizer, {})
    expected = np.asarray(model.apply(params, batch).logits_BTV[:, -1].argmax(axis=-1)).tolist()
    found = generate(model, params, tokenizer, prompts, layout, Sampling(temperature=0.0, max_tokens=1))
    assert [answer.tokens[0] for answer in found] == expected and len(set(expected)) > 1


ENCODER = DecoderSpec(width=16, mask="bidirectional")
MARKED = LayoutSpec(16, prompt_span="bidirectional")
WRONG = {
    "a decoder without cross-attention": (
        lambda: EncoderDecoder(DecoderSpec()),
        r"DecoderSpec.block is Sequential\(\): it must be CrossSequential",
    ),
    "cross-attention without an encoder": (
        lambda: ModelSpec(small().decoder),
        "DecoderSpec.block is .* it must be one without cross-attention, or the model an EncoderDecoder",
    ),
    "another width": (lambda: small(encoder=ENCODER.replace(width=8)), "DecoderSpec.width is 8: it must be 16"),
    "a causal encoder": (
        lambda: small(encoder=ENCODER.replace(mask="spans")),
        "mask is 'spans': it must be 'bidirectional'",
    ),
    "a decoder that sees ahead": (
        lambda: small(mask="bidirectional"),
        "mask is 'bidirectional': it must be 'spans' in the decoder",
    ),
    "an encoder with cross-attention": (
        lambda: small(encoder=ENCODER.replace(block=CrossSequential())),
        "block is .* without cross-attention in an encoder",
    ),
    "cross-attention like a layer without heads": (
        lambda: small(attention=Mamba2(heads=2)),
        "CrossSequential.cross is None: it must be an attention variant, because Mamba2",
    ),
    "an encoder like a decoder that reads in one direction": (
        lambda: small(attention=Mamba2(heads=2), block=CrossSequential(MultiHead(2))),
        "the encoder has Mamba2, which reads a row in one direction: set model.encoder",
    ),
    "cross-attention by labels": (lambda: CrossSequential(BySpeaker()), "cross is .* whose mask reads no labels"),
    "cross-attention in a window": (
        lambda: CrossSequential(SlidingWindow(2, window=3)),
        "cross is .* attention to the whole source, without a window",
    ),
    "cross-attention in pieces": (lambda: CrossSequential(TransformerXL(2)), "cross is .* attention to the whole sour"),
    "rows without marked sources": (lambda: small().check_with(LayoutSpec(16)), "prompt_span is 'causal': EncoderDeco"),
    "longer rows than the encoder's positions": (
        lambda: small(encoder=ENCODER.replace(position=Learned(15))).check_with(MARKED),
        "seq_len is 16: it must be at most 15, the number of positions of model.encoder.position",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_refuses_in_one_line(fault):
    make, words = WRONG[fault]
    with pytest.raises(SpecError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
