"""Next-sentence prediction: what pairs are made of, how many follow, and that a stream of them can be resumed."""

import dataclasses
import json
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from small_data import ADAPTERS
from test_loader import assert_equal, take

from polygpt.data.example import Example, Medium, Text
from polygpt.data.labels import Label
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task, train_batches
from polygpt.data.sources.base import Source
from polygpt.data.sources.embedded import Embedded
from polygpt.data.sources.next_sentence import NextSentence
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.errors import BadRecord, UserError

PICTURE = Medium("image", b"png")
BIBLE = Embedded("text", "test", characters=2000)


@dataclasses.dataclass(frozen=True)
class Documents(Source):
    """Documents of sentences such as "3.7 is here." (document, sentence)."""

    count: int = 40
    length: int = 6

    def open(self) -> Sequence[Example]:
        texts = [" ".join(f"{i}.{k} is here." for k in range(self.length)) for i in range(self.count)]
        return [
            Example((Text("? ", 0.0), PICTURE, Text(text, 0.5)), f"document {i}", {"kind": i})
            for i, text in enumerate(texts)
        ]


@dataclasses.dataclass(frozen=True)
class Texts(Source):
    """Texts as they are given."""

    texts: tuple[str, ...]

    def open(self) -> Sequence[Example]:
        return [Example((Text(text),), f"text {i}") for i, text in enumerate(self.texts)]


def halves(example: Example) -> list[list[tuple[int, int]]]:
    """The (document, sentence) of each sentence before and after the separator."""
    sides = example.answer.split(" | ")
    return [[tuple(map(int, word.split("."))) for word in side.split() if word[0].isdigit()] for side in sides]


def test_half_of_the_pairs_follow_and_the_label_says_which():
    pairs = NextSentence(Documents(), pairs=10, separator=" | ").open()
    assert len(pairs) == 400
    labels = []
    for number, pair in enumerate(pairs):
        ((document, first),), ((other, second),) = halves(pair)
        follows = pair.labels["follows"]
        assert document == number % 40 and second >= 1, "pair i is of example i, and nothing follows a beginning"
        assert (other == document and second == first + 1) if follows else other != document
        labels.append(follows)
    assert sum(labels) == pytest.approx(200, abs=40)
    assert {halves(pair)[0][0][1] for pair in pairs} == set(range(5)), "every sentence but the last comes first"
    assert {halves(pair)[1][0][1] for pair, label in zip(pairs, labels, strict=True) if not label} == set(range(1, 6))


def test_a_pair_keeps_what_stands_around_the_text_and_other_labels():
    pair = NextSentence(Documents(), label="next").open()[3]
    assert pair.parts[:2] == (Text("? ", 0.0), PICTURE) and pair.parts[2].weight == 0.5 and len(pair.parts) == 3
    assert pair.place == "document 3" and pair.labels == {"kind": 3, "next": pair.labels["next"]}


def test_several_sentences_stand_on_either_side():
    pairs = NextSentence(Documents(length=9), sentences=3, separator=" | ").open()
    sides = [halves(pair) for pair in pairs]
    assert {len(side) for both in sides for side in both} == {1, 2, 3}
    for first, second in sides:
        assert [k for _, k in first] == list(range(first[0][1], first[0][1] + len(first)))
        assert {document for document, _ in second} == {second[0][0]}


def test_lines_end_sentences_and_a_sentence_like_the_next_one_is_not_taken_for_another():
    source = NextSentence(Texts(("one\ntwo", "three. Same!", "four?\n\nSame!", "  five\nSame!")), pairs=60)
    for pair in source.open():
        if pair.labels["follows"] == 0 and pair.place != "text 0":
            assert pair.answer.endswith(" two")
    assert source.open()[0].answer.startswith("one ")


def test_a_pair_depends_only_on_seed_and_index():
    spec = NextSentence(BIBLE, separator="\0", seed=3)
    pairs = spec.open()
    assert list(pairs[i] for i in range(9)) == [spec.open()[i] for i in range(9)] and pairs[-1] == pairs[len(pairs) - 1]
    assert pickle.loads(pickle.dumps(pairs))[5] == pairs[5]
    assert [spec.replace(seed=4).open()[i] for i in range(9)] != [pairs[i] for i in range(9)]
    passages = [example.answer for example in BIBLE.open()]
    assert all(any(part in text for text in passages) for part in pairs[7].answer.split("\0"))


def test_a_stream_of_pairs_is_resumed_to_the_bit():
    text = {"pairs": Task(NextSentence(BIBLE, pairs=2))}
    data = DataSpec(text, LayoutSpec(seq_len=1024, labels={"follows": Label(classes=2)}), batch_size=3)
    running = train_batches(data, Bytes().build(), ADAPTERS, seed=1)
    take(running, 2)
    state = json.loads(json.dumps(running.get_state()))
    expected = take(running, 3)
    resumed = train_batches(data, Bytes().build(), ADAPTERS, seed=1)
    resumed.set_state([state])
    for a, b in zip(expected, take(resumed, 3), strict=True):
        assert_equal(a, b)
    labels = expected[0].extra["follows"]
    assert set(labels[~np.isnan(labels)]) == {0.0, 1.0}


def test_texts_that_make_no_pairs_are_refused_in_one_line():
    with pytest.raises(UserError, match="NextSentence: its source Texts has 1 of the 2 examples that it needs.*add"):
        NextSentence(Texts(("A. B.",))).open()
    with pytest.raises(BadRecord, match="text 1: fewer than two sentences: .*give longer texts"):
        NextSentence(Texts(("A. B.", "Only one."))).open()[1]
    pairs = NextSentence(Texts(("A. B.", "Only one.")), pairs=40).open()
    with pytest.raises(BadRecord, match="text 0: no other sentence: 20 others .*give longer"):
        [pairs[i] for i in range(0, 80, 2)]
    with pytest.raises(BadRecord, match="document 2: fewer than two sentences"):
        NextSentence(Documents(length=1)).open()[2]
