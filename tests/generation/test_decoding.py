"""The cache computes what the whole row computes, at every step and with media."""

from functools import partial

import jax
import numpy as np
import pytest

from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.image import ImageAdapter
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.stack import StackSpec
from polygpt.data.media.audio import LogMel
from polygpt.data.media.image import ImageFeatures
from polygpt.generation import decoding
from polygpt.generation.sampling import GREEDY, Sampling
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.positions import Learned, MRope, Rope
from polygpt.sequence import NAMED_ARRAYS, PADDING, Batch, Media, coordinates

V = 40
ROPE = Rope()
TOWER = StackSpec(width=8, depth=0)  # what a cache must remember does not depend on blocks there
ADAPTERS = {
    "image": ImageAdapter(features=ImageFeatures(height=8, width=8, channels=1), patch=4, items=2, tower=TOWER),
    "audio": AudioAdapter(features=LogMel(rate=8000, mels=8, window=200, hop=80, seconds=0.2), fold=2, tower=TOWER),
}
ROWS = [  # kind and number of positions, in order
    [("text", 3), ("image", 4), ("text", 2), ("audio", 3), ("text", 6)],
    [("audio", 5), ("text", 4)],
    [("text", 12)],
    [("text", 1), ("image", 4), ("image", 4), ("text", 5)],
]


def model_of(position=ROPE, kv_heads=None, **options):
    attention = MultiHead(heads=4, kv_heads=kv_heads)
    decoder = DecoderSpec(width=16, depth=2, attention=attention, position=position, **options)
    model = bind(ModelSpec(decoder=decoder, adapters=ADAPTERS), V)
    rng = np.random.default_rng(0)
    # A model as it is initialised hardly looks at its media: here all that it computes matters.
    return model, jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), model.abstract())


def batch_of(rows, T, spans=False, seed=0):
    """Rows of text and media, right-padded to T."""
    rng = np.random.default_rng(seed)
    B = len(rows)
    arrays = {
        name: np.zeros((B, T), np.int32)
        for name in ("tokens", "modality", "slot", "position", "segment", "span", "target")
    }
    arrays["modality"] += PADDING
    coordinate_BT3 = np.zeros((B, T, 3), np.int32)
    media = {}
    for name, adapter in ADAPTERS.items():
        features = np.zeros((B, adapter.items, *adapter.features.shape), np.float32)
        media[name] = Media(features, np.zeros((B, adapter.items), np.int32))
    for b, row in enumerate(rows):
        for medium in media.values():
            medium.features[b] = rng.normal(size=medium.features.shape[1:])
        t, used, span, origin = 0, dict.fromkeys(ADAPTERS, 0), 0, 0
        for kind, length in row:
            here = (b, slice(t, t + length))
            if kind == "text":
                arrays["tokens"][here] = rng.integers(0, V, length)
                arrays["modality"][here] = 0
                coordinate_BT3[here] = origin + np.arange(length)[:, None]
            else:
                span += 1
                arrays["modality"][here] = 1 + list(ADAPTERS).index(kind)
                arrays["slot"][here] = used[kind] * ADAPTERS[kind].positions + np.arange(length)
                arrays["span"][here] = span * spans
                media[kind].length_BN[b, used[kind]] = length
                used[kind] += 1
                coordinate_BT3[here] = origin + coordinates(ADAPTERS[kind].grid)[:length]
            origin = coordinate_BT3[b, : t + length].max(initial=-1) + 1
            t += length
        arrays["position"][b, :t], arrays["segment"][b, :t] = np.arange(t), 1
    arrays = {f"{name}_BT": array for name, array in arrays.items()}
    arrays["modality_BT"] = arrays["modality_BT"].astype(np.int8)
    return Batch(**arrays, weight_BT=np.zeros((B, T), np.float32), media=media, coordinate_BT3=coordinate_BT3)


def columns(batch, start, stop, media):
    arrays = {name: array[:, start:stop] for name, array in vars(batch).items() if name not in NAMED_ARRAYS}
    return Batch(**arrays, media=batch.media if media else {})


@pytest.mark.parametrize(
    "options, spans",
    [
        ({"position": ROPE, "kv_heads": 2}, False),
        ({"position": Learned(64), "tied": False, "scan": False}, True),
        ({"position": MRope(), "kv_heads": 2}, True),
    ],
    ids=["rope-causal", "learned-bidirectional", "mrope-bidirectional"],
)
def test_decoding_with_the_cache_equals_the_whole_row_at_every_step(options, spans):
    model, params = model_of(**options)
    whole = batch_of(ROWS, 20, spans)
    expected = np.asarray(jax.jit(model.apply)(params, whole).logits_BTV)
    prompt = 12  # all media lie before
    decode = jax.jit(model.decode)
    logits, cache = decode(params, columns(whole, 0, prompt, media=True), model.init_cache(len(ROWS), 24))
    got = [np.asarray(logits)]
    for t in range(prompt, 20):
        logits, cache = decode(params, columns(whole, t, t + 1, media=False), cache)
        got.append(np.asarray(logits))
    real = whole.segment_BT > 0
    assert np.abs(np.concatenate(got, axis=1) - expected)[real].max() < 1e-5
    assert np.ptp(expected[real], axis=0).max() > 0.1  # there is something to compare


def generated(model, params, batch, sampling, *, count=6, eos=V, size=8, indices=None, until=None):
    """Tokens of each row from the two compiled programs."""
    rows = batch.shape[0]
    indices = np.arange(rows, dtype=np.int32) if indices is None else np.int32(indices)
    limit = np.where(batch.segment_BT.any(axis=1), count, 0).astype(np.int32)
    choice = sampling.choice()
    model, params = model.merged, decoding.prepared(model, params)
    state = decoding.prefill(
        model, choice, size, params, batch, np.int32(eos), np.uint32(sampling.seed), indices, limit
    )
    for step in until or [size]:
        state = decoding.decode(model, choice, params, state, np.int32(eos), np.int32(step))
    return [list(row[:n]) for row, n in zip(np.asarray(state.tokens_BS), np.asarray(state.count_B), strict=True)]


def test_prefill_asks_for_the_logits_of_the_last_positions_alone(toy):
    model, params = toy
    batch, last = batch_of(ROWS, 20), np.int32([17, 8, 11, 13])
    cache = model.init_cache(len(ROWS), 24)
    both = jax.jit(lambda params: (model.decode(params, batch, cache)[0], *model.decode(params, batch, cache, last)))
    whole, few, cache = both(params)
    assert few.shape == (len(ROWS), 1, V) and int(cache.cursor) == 20
    np.testing.assert_allclose(few[:, 0], np.asarray(whole)[np.arange(len(ROWS)), last], atol=1e-5)

    given = Sampling().choice(), 4, params, batch, np.int32(V), np.uint32(0), last * 0, last * 0 + 4
    text = str(jax.make_jaxpr(partial(decoding.prefill, model, *given[:2]))(*given[2:]))
    assert f"f32[{len(ROWS)},1,{V}]" in text and f"f32[{len(ROWS)},20,{V}]" not in text


SAMPLED = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.3, seed=5)


@pytest.fixture(scope="module")
def toy():
    return model_of()


def by_hand(model, params, T, count):
    """Greedy tokens of each row from whole forward passes, no cache."""
    apply, batch = jax.jit(model.apply), batch_of(ROWS, T)
    tokens, rows = [], np.arange(len(ROWS))
    for _ in range(count):
        t = (batch.segment_BT > 0).sum(axis=1)
        tokens.append(np.asarray(apply(params, batch).logits_BTV)[rows, t - 1].argmax(axis=-1))
        largest = batch.coordinate_BT3.max(axis=(1, 2))
        batch.tokens_BT[rows, t], batch.modality_BT[rows, t] = tokens[-1], 0
        batch.position_BT[rows, t], batch.segment_BT[rows, t] = t, 1
        batch.coordinate_BT3[rows, t] = largest[:, None] + 1
    return np.transpose(tokens).tolist()


def test_the_loop_writes_what_whole_forward_passes_would(toy):
    batch = batch_of(ROWS, 18)
    got = generated(*toy, batch, GREEDY)
    assert got == by_hand(*toy, 26, 6)
    assert len({tuple(tokens) for tokens in got}) > 1


def test_generated_text_goes_on_behind_the_largest_coordinate():
    """With prompts of pictures and recordings, ragged, against whole passes; each prompt alone writes the same."""
    model, params = model_of(MRope())
    params["decoder"]["blocks"]["attention"]["query"]["kernel"] *= 8  # so that it matters who stands where
    batch = batch_of(ROWS, 18)
    got = generated(model, params, batch, GREEDY)
    assert got == by_hand(model, params, 26, 6)
    for row in range(len(ROWS)):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
        assert generated(model, params, one, GREEDY) == [got[row]]
    forgetful = batch.replace(coordinate_BT3=None)  # the position in all three
    assert generated(model, params, forgetful, GREEDY) != got


@pytest.mark.slow
def test_plain_rotary_positions_need_no_coordinates(toy):
    batch = batch_of(ROWS, 18)
    assert generated(*toy, batch.replace(coordinate_BT3=None), GREEDY) == generated(*toy, batch, GREEDY)


def test_samples_differ_by_seed_and_by_number_alone(toy):
    same = batch_of(ROWS[2:3], 18)
    same = jax.tree.map(lambda x: np.repeat(x, 4, axis=0), same)
    first = generated(*toy, same, SAMPLED)
    assert len({tuple(tokens) for tokens in first}) > 1
    assert generated(*toy, same, SAMPLED, indices=[3, 2, 1, 0]) == first[::-1]
    assert generated(*toy, same, SAMPLED.replace(seed=6)) != first


def test_decoding_in_chunks_changes_nothing(toy):
    batch = batch_of(ROWS, 18)
    assert generated(*toy, batch, SAMPLED, until=[1, 2, 5, 8]) == generated(*toy, batch, SAMPLED)


def test_a_finished_row_stops_and_leaves_the_others_alone(toy):
    batch = batch_of(ROWS, 18)
    free = generated(*toy, batch, GREEDY)
    eos = free[0][2]
    for row, tokens in zip(generated(*toy, batch, GREEDY, eos=eos), free, strict=True):
        assert row == (tokens[: tokens.index(eos) + 1] if eos in tokens else tokens)


def test_a_padding_row_writes_nothing(toy):
    batch = batch_of([*ROWS[:3], []], 18)
    *rows, padding = generated(*toy, batch, GREEDY)
    assert padding == []
    assert rows == generated(*toy, batch_of(ROWS, 18), GREEDY)[:3]


def test_what_padding_and_unused_media_hold_does_not_matter(toy):
    batch = batch_of(ROWS, 18)
    expected = generated(*toy, batch, GREEDY)
    batch.tokens_BT[batch.segment_BT == 0] = 7
    batch.position_BT[batch.segment_BT == 0] = 3
    batch.coordinate_BT3[batch.segment_BT == 0] = 99
    for media in batch.media.values():
        media.features[media.length_BN == 0] = np.nan
    assert generated(*toy, batch, GREEDY) == expected


def test_the_prompt_is_read_by_one_program_and_the_text_written_by_another(toy):
    batch = batch_of(ROWS, 18)
    generated(*toy, batch, GREEDY)
    assert decoding.prefill._cache_size() and decoding.decode._cache_size()
    programs = decoding.prepared, decoding.prefill, decoding.decode
    before = [program._cache_size() for program in programs]
    generated(*toy, batch_of(ROWS[::-1], 18, seed=3), GREEDY.replace(seed=9, max_tokens=3), count=3, until=[2, 3])
    assert [program._cache_size() for program in programs] == before


def test_the_cache_is_used_up_and_not_copied(toy):
    model, params = toy
    batch, four = batch_of(ROWS, 18), np.arange(4, dtype=np.int32)
    state = decoding.prefill(model, GREEDY.choice(), 8, params, batch, np.int32(V), np.uint32(0), four, four + 1)
    kept = jax.tree.leaves(state.cache)[0]
    decoding.decode(model, GREEDY.choice(), params, state, np.int32(V), np.int32(8))
    assert kept.is_deleted()
