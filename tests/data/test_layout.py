"""The layout: where texts and media of an example stand in its row, what is predicted, and what is refused."""

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygpt import sequence
from polygpt.data.augment import Noise, RandomShift, SpecAugment
from polygpt.data.example import Example, Medium, Text
from polygpt.data.layout import LayoutSpec, MediaCache, lay_out, prompt_batch
from polygpt.data.packing import collate
from polygpt.errors import BadRecord
from polygpt.sequence import TEXT

WIDE = LayoutSpec(seq_len=200)
BOS, EOS = 256, 257


def row_of(parts, small, layout=WIDE, **more):
    return lay_out(Example(tuple(parts), "the record"), layout, small.tokenizer, small.adapters, **more)


def test_a_text_alone(small):
    row = row_of([Text("hey", 1.0)], small)
    np.testing.assert_array_equal(row.tokens, [BOS, *b"hey", EOS])
    np.testing.assert_array_equal(row.target, [*b"hey", EOS, 0])
    np.testing.assert_array_equal(row.weight, [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(row.position, range(5))
    np.testing.assert_array_equal(row.segment, [1] * 5)
    assert not row.modality.any() and not row.slot.any() and not row.span.any()
    assert not any(row.media.values())
    for name in ("tokens", "modality", "slot", "position", "segment", "span", "target"):
        assert getattr(row, name).dtype == np.int32
    assert row.weight.dtype == np.float32
    np.testing.assert_array_equal(row.coordinate, [[t] * 3 for t in range(5)])
    assert row.coordinate.dtype == np.int32


def test_interleaved_media_stand_where_they_are(small):
    parts = [
        Text("a", 0.0),
        Medium("image", small.png(1)),
        Text("b", 0.0),
        Medium("audio", small.flac(1)),
        Text("yes", 1.0),
    ]
    row = row_of(parts, small)
    n = row.media["audio"][0][1]
    np.testing.assert_array_equal(row.modality, [0, 0, *[1] * 4, 0, *[2] * n, 0, 0, 0, 0])
    np.testing.assert_array_equal(row.tokens, [BOS, 97, 0, 0, 0, 0, 98, *[0] * n, *b"yes", EOS])
    np.testing.assert_array_equal(row.target, [97, 0, 0, 0, 0, 98, *[0] * n, *b"yes", EOS, 0])
    np.testing.assert_array_equal(row.weight, [0] * (6 + n) + [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(row.slot, [0, 0, 0, 1, 2, 3, 0, *range(n), 0, 0, 0, 0])


def test_coordinates_of_text_media_and_text(small):
    """A picture lies at one time, in rows and columns; a recording advances like text; both end where text goes on."""
    wide = dataclasses.replace(small.adapters["image"], grid=(1, 1, 4))
    clip = Medium("audio", small.flac(1))
    parts = [
        Text("a", 0.0),
        Medium("image", small.png(1)),
        Text("b", 0.0),
        clip,
        Medium("image", small.png(2)),
        Text("z"),
    ]
    for adapter, extent in ((small.adapters["image"], 2), (wide, 4)):
        adapters = small.adapters | {"image": adapter}
        row = lay_out(Example(tuple(parts), "the record"), WIDE, small.tokenizer, adapters)
        n = row.media["audio"][0][1]
        assert n < small.adapters["audio"].positions

        def text(start, count):
            return [[start + i] * 3 for i in range(count)]

        def picture(start, columns=extent):
            return [[start, start + i // columns, start + i % columns] for i in range(4)]

        sound = 2 + extent + 1
        second = sound + n
        expected = text(0, 2) + picture(2) + text(2 + extent, 1) + text(sound, n) + picture(second)
        np.testing.assert_array_equal(row.coordinate, expected + text(second + extent, 2))
        np.testing.assert_array_equal(row.position, range(len(row)))


@pytest.mark.parity
def test_coordinates_equal_those_of_qwen2_vl(small):
    pytest.importorskip("transformers")
    import torch
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    first, second = (Medium("image", small.png(seed)) for seed in (1, 2))
    row = row_of([Text("ab", 0.0), first, Text("or", 0.0), second, Text("both")], small)
    model = SimpleNamespace(  # all that the method asks of its model; the weights are not needed
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=1)),
        get_vision_position_ids=partial(Qwen2VLModel.get_vision_position_ids, None),
    )
    kind = torch.tensor(row.modality)[None]
    expected, _ = Qwen2VLModel.get_rope_index(model, kind, kind, torch.tensor([[1, 2, 2]] * 2))
    np.testing.assert_array_equal(row.coordinate, expected[:, 0].T)


def test_the_last_position_of_a_medium_predicts_the_text_that_follows(small):
    row = row_of([Medium("image", small.png(1)), Text("z", 1.0)], small)
    np.testing.assert_array_equal(row.target, [0, 0, 0, 0, ord("z"), EOS, 0])
    np.testing.assert_array_equal(row.weight, [0, 0, 0, 0, 1, 1, 0])


def test_the_second_item_has_the_next_slots(small):
    row = row_of([Medium("image", small.png(1)), Text("and", 0.0), Medium("image", small.png(2)), Text("z")], small)
    np.testing.assert_array_equal(row.slot[row.modality == 1], range(8))
    for seed, (features, length) in zip((1, 2), row.media["image"], strict=True):
        expected, _ = small.adapters["image"].features.extract(
            small.adapters["image"].features.decode(small.png(seed), "p")
        )
        np.testing.assert_array_equal(features, expected)
        assert length == 4


def test_prefix_fusion_puts_media_in_front_in_their_order(small):
    parts = [Text("a", 0.0), Medium("audio", small.flac(1)), Text("b", 1.0), Medium("image", small.png(1))]
    row = row_of(parts, small, WIDE.replace(fusion="prefix"))
    n = row.media["audio"][0][1]
    np.testing.assert_array_equal(row.modality, [0, *[2] * n, *[1] * 4, 0, 0, 0])
    np.testing.assert_array_equal(row.tokens[-3:], [97, 98, EOS])
    np.testing.assert_array_equal(row.weight[-4:], [0, 1, 1, 0])


def test_media_spans(small):
    parts = [Medium("image", small.png(1)), Medium("image", small.png(2)), Text("b")]

    def spans(**fields):
        return row_of(parts, small, WIDE.replace(**fields)).span

    np.testing.assert_array_equal(spans(media_span="bidirectional"), [0, *[1] * 4, *[2] * 4, 0, 0])
    np.testing.assert_array_equal(spans(media_span="bidirectional", fusion="prefix"), [0, *[1] * 8, 0, 0])
    assert not spans(fusion="prefix").any()


BOTH_WAYS = WIDE.replace(prompt_span="bidirectional")


@pytest.mark.parametrize("media_span", ["causal", "bidirectional"])
def test_a_prompt_may_be_one_span(small, media_span):
    """bos, media and texts up to the first that is predicted; media behind it are as they would be without."""
    picture, parts = Medium("image", small.png(1)), [Text("ab", 0.0), Text("cd"), Text("e", 0.0)]
    layout = BOTH_WAYS.replace(media_span=media_span)
    second = 2 if media_span == "bidirectional" else 0
    row = row_of([picture, *parts, picture, Text("f")], small, layout)
    np.testing.assert_array_equal(row.span, [*[1] * 7, 0, 0, 0, *[second] * 4, 0, 0])
    row = row_of([picture, *parts, picture, Text("f")], small, layout.replace(fusion="prefix"))
    np.testing.assert_array_equal(row.span, [*[1] * 11, 0, 0, 0, 0, 0])
    assert row_of([Text("ab")], small, layout).span.tolist() == [1, 0, 0, 0]


def test_texts_without_a_weight_may_be_given_one(small):
    parts = [Medium("image", small.png(1)), Text("ab", 0.0), Text("c", 2.0), Text("d", 0.0)]
    np.testing.assert_array_equal(row_of(parts, small).weight, [0, 0, 0, 0, 0, 0, 2, 0, 0, 0])
    row = row_of(parts, small, prompt_weight=0.5)
    np.testing.assert_array_equal(row.weight, [0, 0, 0, 0, 0.5, 0.5, 2, 0.5, 0.5, 0])
    np.testing.assert_array_equal(row.target, row_of(parts, small).target)
    with pytest.raises(BadRecord, match="no text with a loss weight"):
        row_of([Text("ab", 0.0)], small, prompt_weight=0.5)


def test_the_end_has_the_weight_of_the_last_text(small):
    np.testing.assert_array_equal(row_of([Text("a", 0.5), Text("b", 0.0)], small).weight, [0.5, 0, 0, 0])
    np.testing.assert_array_equal(row_of([Text("a", 0.0), Text("b", 2.0)], small).weight, [0, 2, 2, 0])


@given(seed=st.integers(0, 10_000), fusion=st.sampled_from(["interleaved", "prefix"]))
def test_rows_satisfy_the_layout(small, seed, fusion):
    example = small.example(seed)
    row = lay_out(example, WIDE.replace(fusion=fusion), small.tokenizer, small.adapters)
    sequence.check(collate([row], 200, small.adapters), small.tokenizer.vocabulary, small.positions)
    text = row.modality == TEXT
    np.testing.assert_array_equal(row.target[:-1][text[1:]], row.tokens[1:][text[1:]])
    assert not row.weight[:-1][~text[1:]].any() and row.weight[-1] == 0
    assert small.tokenizer.decode(row.target[row.weight > 0]) == example.answer
    for name, items in row.media.items():
        number = list(small.adapters).index(name) + 1
        assert (row.modality == number).sum() == sum(length for _, length in items)


def test_what_cannot_be_a_row_is_refused_by_name(small):
    picture, clip = Medium("image", small.png(0)), Medium("audio", small.flac(0))
    cases = [
        ([Text("x" * 199)], "too long", "201 positions, a row of the layout has 200"),
        ([picture] * 3 + [Text("x")], "too many media", "the model takes 2 of image per row"),
        ([clip] * 2 + [Text("x")], "too many media", "the model takes 1 of audio per row"),
        ([Medium("smell", b"1"), Text("x")], "the model has no such adapter", "'smell'"),
        ([picture], "empty text", "no text with a loss weight"),
        ([picture, Text("x", 0.0)], "empty text", "no text with a loss weight"),
        ([Text("", 1.0)], "empty text", "no text with a loss weight"),
        ([Medium("image", b"junk"), Text("x")], "unknown image format", "PNG"),
    ]
    for parts, reason, detail in cases:
        with pytest.raises(BadRecord) as caught:
            row_of(parts, small)
        assert (caught.value.reason, caught.value.place) == (reason, "the record")
        assert detail in caught.value.detail
    assert len(row_of([Text("x" * 198)], small)) == 200


def test_augmentation_changes_only_its_modality_and_only_with_a_generator(small):
    parts = [Medium("image", small.png(0)), Medium("audio", small.flac(0)), Text("x")]
    plain = row_of(parts, small)
    shifted = row_of(parts, small, rng=np.random.default_rng(3), augment=[RandomShift(0.5)])
    noisy = row_of(parts, small, rng=np.random.default_rng(1), augment=[Noise((0, 0)), SpecAugment(frequency_width=4)])
    still = row_of(parts, small, augment=[RandomShift(0.5), Noise()])

    def differ(a, b, name):
        return (a.media[name][0][0] != b.media[name][0][0]).any()

    assert differ(shifted, plain, "image") and not differ(shifted, plain, "audio")
    assert differ(noisy, plain, "audio") and not differ(noisy, plain, "image")
    assert not differ(still, plain, "image") and not differ(still, plain, "audio")
    frames = len(small.adapters["audio"].features.decode(small.flac(0), "p")) // 40
    assert not noisy.media["audio"][0][0][frames:].any()


@pytest.mark.parametrize("augment", [(), (SpecAugment(frequency_width=4),), (Noise(), RandomShift(0.5))])
@pytest.mark.parametrize("megabytes", [0, 1])
def test_a_cache_changes_nothing(small, augment, megabytes):
    cache = MediaCache(megabytes)
    for seed in [*range(10), *range(10)]:
        rng = [np.random.default_rng(seed) for _ in range(2)]
        example = small.example(seed)
        row = lay_out(example, WIDE, small.tokenizer, small.adapters, rng[0], augment)
        cached = lay_out(example, WIDE, small.tokenizer, small.adapters, rng[1], augment, cache)
        for name, items in row.media.items():
            for (a, length), (b, cached_length) in zip(items, cached.media[name], strict=True):
                np.testing.assert_array_equal(a, b)
                assert length == cached_length
    assert bool(cache.kept) == bool(megabytes) and cache.room >= 0


def test_a_cache_holds_features_of_each_specification(small):
    cache, example = MediaCache(1), Example((Medium("image", small.png(0)), Text("x")), "the record")
    image = small.adapters["image"]
    other = dataclasses.replace(image, features=image.features.replace(mean=0.25))
    for adapter in (image, other, image):
        plain = lay_out(example, WIDE, small.tokenizer, {"image": adapter})
        cached = lay_out(example, WIDE, small.tokenizer, {"image": adapter}, cache=cache)
        np.testing.assert_array_equal(plain.media["image"][0][0], cached.media["image"][0][0])
    assert len(cache.kept) == 2


def test_a_full_cache_takes_no_more(small):
    cache = MediaCache(1)
    for i in range(40):
        cache.put(("audio", False, bytes([i]) * 40_000), (np.zeros(1000, np.float32), 1))
    assert len(cache.kept) == 2**20 // 44_500


# --- prompts ----------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10_000),
    fusion=st.sampled_from(["interleaved", "prefix"]),
    prompt_span=st.sampled_from(["causal", "bidirectional"]),
)
def test_a_prompt_is_the_beginning_of_its_row(small, seed, fusion, prompt_span):
    example, layout = small.example(seed), WIDE.replace(fusion=fusion, prompt_span=prompt_span)
    row = lay_out(example, layout, small.tokenizer, small.adapters)
    batch = prompt_batch([example.prompt], layout, small.tokenizer, small.adapters)
    sequence.check(batch, small.tokenizer.vocabulary, small.positions)
    t = batch.shape[1]
    assert t == len(row) - len(example.answer.encode()) - 1
    for name in ("tokens", "modality", "slot", "position", "segment", "span"):
        np.testing.assert_array_equal(getattr(batch, f"{name}_BT")[0], getattr(row, name)[:t])
    np.testing.assert_array_equal(batch.coordinate_BT3[0], row.coordinate[:t])
    assert not batch.weight_BT.any()
    for name, items in row.media.items():
        for n, (features, length) in enumerate(items):
            np.testing.assert_array_equal(batch.media[name].features[0, n], features)
            assert batch.media[name].length_BN[0, n] == length


def test_prompts_of_different_lengths_are_padded_on_the_right(small):
    batch = prompt_batch([[Text("abc")], [], [Medium("image", small.png(0))]], WIDE, small.tokenizer, small.adapters)
    np.testing.assert_array_equal(batch.segment_BT, [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(batch.tokens_BT, [[BOS, *b"abc", 0], [BOS, 0, 0, 0, 0], [BOS, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.modality_BT, [[0, 0, 0, 0, -1], [0, -1, -1, -1, -1], [0, 1, 1, 1, 1]])


def test_a_prompt_that_is_too_long_is_named(small):
    with pytest.raises(BadRecord, match="^prompt 1: too long: 201 positions"):
        prompt_batch([[Text("a")], [Text("a" * 200)]], WIDE, small.tokenizer, small.adapters)
    with pytest.raises(BadRecord, match="^mine: too many media"):
        prompt_batch([[Medium("image", small.png(0))] * 3], WIDE, small.tokenizer, small.adapters, ["mine"])


def test_the_path_of_a_medium_may_be_text():
    assert Medium("image", "a/b.png") == Medium("image", Path("a/b.png"))
