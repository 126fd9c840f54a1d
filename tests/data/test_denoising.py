"""Transformations that make objectives: each gives back the original, and counts as its paper does."""

import dataclasses
import functools
import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from polygpt.data.example import Example, Medium, Text
from polygpt.data.transforms.base import transformed
from polygpt.data.transforms.fill_in_the_middle import MIDDLE, PREFIX, SUFFIX, FillInTheMiddle
from polygpt.data.transforms.prefix_lm import PrefixLM
from polygpt.data.transforms.span_corruption import SpanCorruption
from polygpt.data.transforms.ul2 import UL2, Denoiser, denoisers
from polygpt.errors import BadRecord
from polygpt.spec import from_json, to_json

PICTURE, SOUND = Medium("image", b"png"), Medium("audio", b"flac")
MIXED = (Text("see: ", 0.0), PICTURE, Text("a red house.", 1.0), SOUND, Text("it rings", 0.5), PICTURE)
TEXTS = st.builds(Text, st.text(max_size=12), st.sampled_from([0.0, 0.5, 1.0]))
PARTS = st.lists(st.one_of(TEXTS, st.sampled_from([PICTURE, SOUND])), max_size=5)
SEEDS = st.integers(0, 1000)
LENGTH, COUNT = 200, 600


def applied(transform, *given, seed=0):
    return transform(Example(given, "a place"), np.random.default_rng(seed)).parts


def many(transform, text):
    return [applied(transform, Text(text), seed=seed) for seed in range(COUNT)]


def joined(given) -> list:
    """The parts with neighbouring texts of one weight joined and empty ones left out, to compare examples."""
    kept = [part for part in given if not isinstance(part, Text) or part.text]
    groups = itertools.groupby(kept, key=lambda part: part.weight if isinstance(part, Text) else -1.0)
    return [
        entry
        for weight, group in groups
        for entry in (list(group) if weight == -1.0 else [Text("".join(part.text for part in group), weight)])
    ]


def split(given, *names):
    """The parts between special tokens."""
    places = [given.index(Text(name, 0.0, special=True)) for name in names]
    assert places == sorted(places) and places[0] == 0
    return [given[a + 1 : b] for a, b in itertools.pairwise([*places, len(given)])]


def sections(given):
    """(prefix, middle, suffix, whether suffix comes first) of a transformed example."""
    if given[1] == Text(SUFFIX, 0.0, special=True) and given.index(Text(MIDDLE, 0.0, special=True)) != 2:
        nothing, suffix, rest = split(given, PREFIX, SUFFIX, MIDDLE)
        return rest[:-1], rest[-1:], suffix, True
    prefix, suffix, middle = split(given, PREFIX, SUFFIX, MIDDLE)
    return prefix, middle, suffix, False


# --- fill in the middle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spm", [0.0, 1.0])
@pytest.mark.parametrize("unit", ["character", "word"])
@hypothesis.given(parts=PARTS, seed=SEEDS)
def test_prefix_middle_and_suffix_are_the_example(parts, seed, spm, unit):
    found = applied(FillInTheMiddle(1.0, spm, unit), *parts, seed=seed)
    if not any(isinstance(part, Text) and part.weight > 0 and part.text for part in parts):
        assert found == tuple(parts)
        return
    order = (PREFIX, SUFFIX, MIDDLE)
    first, suffix, rest = split(found, *order)
    prefix, middle = (rest[:-1], rest[-1:]) if spm else (first, rest)
    assert not spm or first == ()
    assert len(middle) == 1 and isinstance(middle[0], Text) and middle[0].weight > 0
    assert joined((*prefix, *middle, *suffix)) == joined(parts)


def test_the_rows_of_both_orders_are_those_of_the_paper():
    psm, spm = (applied(FillInTheMiddle(1.0, spm, middle=(2, 2)), Text("abcd"), seed=4) for spm in (0.0, 1.0))
    special = functools.partial(Text, weight=0.0, special=True)
    assert psm == (special(PREFIX), Text("a"), special(SUFFIX), Text("d"), special(MIDDLE), Text("bc"))
    assert spm == (special(PREFIX), special(SUFFIX), Text("d"), special(MIDDLE), Text("a"), Text("bc"))


def test_rates_and_lengths_are_those_of_uniform_cuts():
    found = many(FillInTheMiddle(), "x" * LENGTH)
    changed = [given for given in found if len(given) > 1]
    assert len(changed) / COUNT == pytest.approx(0.5, abs=0.06)
    places = [[part.text for part in given if part.special] for given in changed]
    assert all(place == [PREFIX, SUFFIX, MIDDLE] for place in places)
    assert np.mean([given[1].special for given in changed]) == pytest.approx(0.5, abs=0.08)
    # Two uniform cuts make three sections of equal length on average.
    assert np.mean([len(given[-1].text) for given in changed]) == pytest.approx(LENGTH / 3, rel=0.1)
    prefixes = [len(given[1].text if not given[1].special else given[-2].text) for given in changed]
    assert np.mean(prefixes) == pytest.approx(LENGTH / 3, rel=0.12)
    assert all(given == (Text("x" * LENGTH),) for given in found if len(given) == 1)


def test_a_text_is_chosen_by_its_length():
    found = [applied(FillInTheMiddle(1.0), Text("a" * 30), PICTURE, Text("b" * 10), seed=seed) for seed in range(COUNT)]
    middles = [given[-1].text[0] for given in found if given[-1].text]
    assert middles.count("b") / len(middles) == pytest.approx(0.25, abs=0.06)


def test_the_middle_has_the_length_asked_for_and_the_context_its_weight():
    asked = FillInTheMiddle(1.0, 0.0, "word", middle=(1, 2), context_weight=0.0)
    found = many(asked, "one two three four")
    assert {given[-1].text for given in found} >= {"one", " two", " two three", " three four"}
    assert {len(given[-1].text.split()) for given in found} == {1, 2}
    for given in found[:20]:
        example = Example(given, "a place")
        assert example.prompt == given[:-1] and example.answer == given[-1].text
        assert not any(part.weight for part in given[:-1])
    assert applied(asked.replace(middle=(3, 9)), Text("a b"))[-1] == Text("a b")


@pytest.mark.parametrize("spm, first", [(0.0, False), (0.5, False), (1.0, True)])
def test_the_prompt_of_an_infill_is_the_beginning_of_a_row_in_training(spm, first):
    spec = FillInTheMiddle(1.0, spm)
    prompt = spec.prompt([PICTURE, Text("ab")], [Text("d")])
    trained = {applied(spec, PICTURE, Text("abcd"), seed=seed)[:-1] for seed in range(300)}
    assert prompt in trained and sections((*prompt, Text("c")))[3] == first


# --- span corruption --------------------------------------------------------------------------------------------------


def restored(given):
    """The original parts of a corrupted example: each sentinel of the input replaced by the span that follows it in the
    target."""
    at = next(i for i, part in enumerate(given) if isinstance(part, Text) and part.special and part.weight > 0)
    seen, target = given[:at], given[at:]
    assert target[-1].special and len(target) % 2 == 1
    pairs = list(zip(target[:-1:2], target[1::2], strict=True))
    names = [name.text for name, _ in pairs]
    assert names == [f"<extra_id_{i}>" for i in range(len(pairs))] and target[-1].text == f"<extra_id_{len(pairs)}>"
    assert names == [part.text for part in seen if isinstance(part, Text) and part.special]
    spans = {name.text: span for name, span in pairs}
    assert all(span.weight == name.weight > 0 for name, span in pairs)
    assert not any(part.weight for part in seen if isinstance(part, Text))
    return [spans[part.text] if isinstance(part, Text) and part.special else part for part in seen]


@hypothesis.given(parts=PARTS, seed=SEEDS, density=st.sampled_from([0.15, 0.5, 0.9]), mean=st.sampled_from([1.0, 3.0]))
def test_input_and_target_interleave_to_the_original(parts, seed, density, mean):
    found = applied(SpanCorruption(density, mean, "character"), *parts, seed=seed)
    if not any(isinstance(part, Text) and part.weight > 0 and part.text for part in parts):
        assert found == tuple(parts)
        return
    flat = [dataclasses.replace(part, weight=0.0) if isinstance(part, Text) else part for part in restored(found)]
    plain = [dataclasses.replace(part, weight=0.0) if isinstance(part, Text) else part for part in parts]
    assert joined(flat) == joined(plain)


@pytest.mark.parametrize("density, mean_span", [(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 8.0), (0.15, 64.0)])
def test_density_and_mean_span_are_those_asked_for(density, mean_span):
    starts = np.zeros(LENGTH)
    for given in many(SpanCorruption(density, mean_span, "character"), "x" * LENGTH):
        spans = [len(part.text) for part in given if part.weight and not part.special]
        assert sum(spans) == round(density * LENGTH)
        assert len(spans) == max(1, round(sum(spans) / mean_span))
        covered = np.concatenate([[part.special] * (1 if part.special else len(part.text)) for part in given])
        starts[: LENGTH - sum(spans)] += covered[: LENGTH - sum(spans)]
    assert starts[:20].sum() > 0, "a text may begin with a span"


def test_lengths_vary_like_those_of_t5():
    """A random composition: of 30 units in 10 spans, a span is one unit long with probability 9 / 29."""
    found = many(SpanCorruption(0.15, 3.0, "character"), "x" * LENGTH)
    lengths = [len(part.text) for given in found for part in given if part.weight and not part.special]
    assert np.mean([length == 1 for length in lengths]) == pytest.approx(9 / 29, abs=0.02)


def test_media_and_prompts_stay_in_the_input():
    found = applied(SpanCorruption(0.5, 1.0), *MIXED)
    seen = found[: found.index(Text("<extra_id_0>", 1.0, special=True))]
    assert [part for part in found if isinstance(part, Medium)] == [PICTURE, SOUND, PICTURE]
    assert seen[0] == MIXED[0] and seen[-1] == PICTURE
    assert {part.weight for part in found if isinstance(part, Text)} == {0.0, 0.5, 1.0}


def test_a_text_with_too_many_spans_names_the_remedy():
    with pytest.raises(BadRecord, match="a place: too many spans: 11 sentinels are needed.*raise sentinels"):
        applied(SpanCorruption(0.15, 3.0, "character", sentinels=10), Text("x" * LENGTH))
    assert restored(applied(SpanCorruption(0.15, 3.0, "character", sentinels=11), Text("x" * LENGTH)))


# --- prefix language model and UL2 ------------------------------------------------------------------------------------


@hypothesis.given(parts=PARTS, seed=SEEDS)
def test_a_prefix_lm_changes_weights_alone(parts, seed):
    found = applied(PrefixLM(unit="character"), *parts, seed=seed)
    weights = [part.weight for part in joined(found) if isinstance(part, Text)]
    as_read = [dataclasses.replace(part, weight=1.0) if isinstance(part, Text) else part for part in found]
    assert joined(as_read) == joined(
        [dataclasses.replace(part, weight=1.0) if isinstance(part, Text) else part for part in parts]
    )
    if any(isinstance(part, Text) and part.weight > 0 and part.text for part in parts):
        assert any(weights) and Example(found, "a place").answer
    else:
        assert found == tuple(parts)


def test_the_split_is_uniform_within_its_bounds():
    for share in ((0.0, 1.0), (0.5, 1.0), (0.25, 0.25)):
        found = many(PrefixLM(share, "character"), "x" * LENGTH)
        read = [sum(len(part.text) for part in given if not part.weight) / LENGTH for given in found]
        assert min(read) >= share[0] - 0.006 and max(read) <= share[1]
        assert np.mean(read) == pytest.approx(sum(share) / 2, abs=0.03)
        assert np.std(read) == pytest.approx((share[1] - share[0]) / 12**0.5, abs=0.02)


def test_ul2_draws_the_papers_denoisers_in_equal_parts():
    found = many(UL2(denoisers("character")), "x" * LENGTH)
    modes = [given[0].text for given in found]
    for mode, count in (("[R]", 2), ("[S]", 1), ("[X]", 4)):
        assert modes.count(mode) / COUNT == pytest.approx(count / 7, abs=0.05)
    predicted = {mode: set() for mode in modes}
    for given in found:
        assert given[0].special and not given[0].weight
        predicted[given[0].text].add(sum(len(part.text) for part in given if part.weight and not part.special))
    assert predicted["[R]"] == {30} and predicted["[X]"] == {30, 100}
    assert np.mean(list(predicted["[S]"])) == pytest.approx(LENGTH / 4, rel=0.1)


def test_weights_of_denoisers_and_their_tokens():
    some = (Denoiser("[A]", PrefixLM(), 3.0), Denoiser("[B]", SpanCorruption(sentinels=3)))
    spec = UL2(some)
    assert spec.special == ("[A]", "[B]", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>")
    modes = [given[0].text for given in many(spec, "one two three")]
    assert modes.count("[A]") / COUNT == pytest.approx(0.75, abs=0.05)
    assert from_json(to_json(spec)) == spec


# --- all --------------------------------------------------------------------------------------------------------------

ALL = [FillInTheMiddle(1.0), SpanCorruption(), PrefixLM(), UL2()]


@pytest.mark.parametrize("transform", ALL, ids=lambda one: type(one).__name__)
def test_examples_without_a_text_to_score_are_left_as_they_are(transform):
    for given in ((PICTURE,), (), (Text("", 1.0),), (PICTURE, Text("a prompt", 0.0))):
        found = applied(transform, *given)
        assert found[1:] == given if isinstance(transform, UL2) else found == given


@pytest.mark.parametrize("transform", ALL, ids=lambda one: type(one).__name__)
def test_one_character_can_be_predicted_and_the_generator_decides(transform):
    for seed in range(10):
        assert Example(applied(transform, Text("a"), seed=seed), "a place").answer == "a"
    assert applied(transform, *MIXED, seed=5) == applied(transform, *MIXED, seed=5)
    assert len({applied(transform, *MIXED, seed=seed) for seed in range(20)}) > 3
    assert from_json(to_json(transform)) == transform
    twice = transformed(Example(MIXED, "a place"), (transform, PrefixLM()), np.random.default_rng(0))
    assert twice.place == "a place"
