"""Augmentations of text and sentence order: what they change, how much, and what they leave."""

import collections

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from polygpt.data.example import Example, Medium, Text
from polygpt.data.transforms.deletion import Deletion
from polygpt.data.transforms.sentences import SentenceOrder, SentencePermutation
from polygpt.data.transforms.token_noise import TokenNoise
from polygpt.data.transforms.word_swap import WordSwap
from polygpt.errors import BadRecord
from polygpt.spec import from_json, to_json

ALL = [TokenNoise(), Deletion(), WordSwap(), SentencePermutation()]
PICTURE, TOKEN = Medium("image", b"png"), Text("<mode>", 0.0, special=True)
STORY = "It rained. We stayed in!  Did you? Yes.\nThen came the sun"
WORDS = " ".join(f"w{i}" for i in range(50))
texts = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(["a", "b.", "C!", " ", "\n", "é"])).map("".join))


def changed(transform, *given, seed=0):
    return transform(Example(given, "a place"), np.random.default_rng(seed)).parts


def written(parts) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text))


@pytest.mark.parametrize("transform", ALL, ids=lambda one: type(one).__name__)
@hypothesis.settings(max_examples=50)
@hypothesis.given(text=texts, seed=st.integers(0, 100))
def test_units_are_moved_replaced_or_left_out_and_never_made_up(transform, text, seed):
    found = written(changed(transform.replace(texts="all"), Text(text), seed=seed))
    before, after = (collections.Counter(some.split()) for some in (text, found))
    if isinstance(transform, TokenNoise):
        assert set(after) <= set(before) and after.total() == before.total()
    elif isinstance(transform, Deletion):
        assert after <= before and bool(found) == bool(text)
    else:
        assert after == before and sorted(found) == sorted(text)


@pytest.mark.parametrize("transform", ALL, ids=lambda one: type(one).__name__)
def test_only_the_texts_asked_for_change_and_media_and_tokens_never_do(transform):
    given = (TOKEN, Text(STORY, 0.0), PICTURE, Text(STORY, 1.0))
    for texts, which in (("prompts", {1}), ("answers", {3}), ("all", {1, 3})):
        chosen, different = transform.replace(texts=texts), set()
        for seed in range(40):
            first, *middle = changed(chosen, *given, seed=seed)
            at = middle.index(PICTURE)
            assert first == TOKEN
            different |= ({1} if written(middle[:at]) != STORY else set()) | (
                {3} if written(middle[at:]) != STORY else set()
            )
        assert different == which
    assert changed(transform, PICTURE) == (PICTURE,) and from_json(to_json(transform)) == transform
    assert changed(transform, *given, seed=3) == changed(transform, *given, seed=3)


def test_token_noise_has_its_rate_and_its_units_no_loss_weight():
    noise, rates = TokenNoise(texts="all", rate=0.2), []
    for seed in range(300):
        parts = changed(noise, Text(WORDS), seed=seed)
        assert len(written(parts).split()) == 50
        rates.append(sum(len(part.text.split()) for part in parts if part.weight == 0) / 50)
        kept = [word for part in parts if part.weight for word in part.text.split()]
        assert kept == [word for word in WORDS.split() if word in kept]
    assert np.mean(rates) == pytest.approx(0.2, abs=0.01)


def test_deletion_has_its_rate():
    left = [len(written(changed(Deletion("all", 0.2), Text(WORDS), seed=seed)).split()) for seed in range(300)]
    assert np.mean(left) / 50 == pytest.approx(0.8, abs=0.01)
    assert written(changed(Deletion("all", 1.0), Text(WORDS))).strip() in WORDS.split()


def test_a_word_swap_exchanges_as_many_pairs_as_eda():
    for rate, words in ((0.02, 2), (0.1, 10)):  # one pair, five pairs
        found = [written(changed(WordSwap("all", rate), Text(WORDS), seed=seed)).split() for seed in range(200)]
        moved = [sum(a != b for a, b in zip(some, WORDS.split(), strict=True)) for some in found]
        assert max(moved) == words and min(moved) > words // 3
    assert written(changed(WordSwap("all"), Text("a  b"))) == "b  a"
    assert written(changed(WordSwap("all"), Text(" a "))) == " a "


def test_every_order_of_sentences_is_as_likely():
    orders = collections.Counter(
        written(changed(SentencePermutation("all"), Text("A. B. C."), seed=seed)) for seed in range(1200)
    )
    assert len(orders) == 6 and min(orders.values()) > 150
    assert set(orders) >= {"A. B. C.", "C. B. A."}


def test_sentence_order_is_asked_for_as_text():
    prompts = collections.defaultdict(set)
    for seed in range(400):
        given = (Text("? ", 0.0), PICTURE, Text("A. B. C. ", 0.5))
        first, picture, text, answer = changed(SentenceOrder(), *given, seed=seed)
        assert (first, picture, text.weight, answer.weight) == (Text("? ", 0.0), PICTURE, 0.0, 0.5)
        prompts[answer.text].add(text.text)
    assert prompts == {" in order": {"A. B. C. "}, " exchanged": {"B. C. A. ", "C. A. B. "}}
    answers = [changed(SentenceOrder(), Text("A. B."), seed=seed)[-1].text for seed in range(400)]
    assert answers.count(" exchanged") == pytest.approx(200, abs=40)
    assert changed(SentenceOrder(), PICTURE) == (PICTURE,)
    with pytest.raises(BadRecord, match="a place: one sentence: .*give longer texts"):
        changed(SentenceOrder(), Text("Only one. "))
