"""A fetched corpus as a source: pieces of documents, and what is said where it has not been fetched."""

import itertools
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygpt.data.corpora import place, split_of
from polygpt.data.example import Text
from polygpt.data.fetch import fetch
from polygpt.data.sources.corpus import Corpus, spans
from polygpt.errors import SpecError, UserError

WORDS = st.sampled_from(["a", "people.", "Mr.", "peace", "1,000", "(so)", '"yes!"', "x" * 40, "are", "nation."])


@given(st.lists(WORDS, min_size=1, max_size=60).map(" ".join), st.integers(1, 50))
def test_pieces_are_the_text_but_for_spaces_between_them(text, characters):
    found = spans(text, characters)
    assert found[0][0] == 0 and found[-1][1] == len(text)
    assert all(0 < end - start <= characters for start, end in found)
    assert all(text[end:start] in ("", " ") for (_, end), (start, _) in itertools.pairwise(found))
    assert all(not text[start:end].startswith(" ") and not text[start:end].endswith(" ") for start, end in found)


@pytest.mark.parametrize(
    ("text", "characters", "pieces"),
    [
        ("We met here. Mr. Adams went home.", 20, ["We met here.", "Mr. Adams went home."]),
        ("We all met. Mr. Adams went home.", 18, ["We all met.", "Mr. Adams went", "home."]),
        ("Was it here? He said (here). No.", 28, ["Was it here? He said (here).", "No."]),
        ("Yes sir. abcdefghijklmnopqr stu", 20, ["Yes sir. abcdefghijk", "lmnopqr stu"]),
        ("under the U.S. flag all of us", 18, ["under the U.S.", "flag all of us"]),
        ("short", 100, ["short"]),
    ],
)
def test_a_piece_ends_with_a_sentence_else_a_word_else_where_it_is_full(text, characters, pieces):
    assert [text[start:end] for start, end in spans(text, characters)] == pieces


def test_documents_of_a_split_in_pieces(registry):
    fetch("state-of-the-union")
    held_out = set()
    for split in ("train", "test"):
        examples = Corpus("state-of-the-union", split, characters=100).open()
        texts = {}
        for example in examples:
            where, name, _ = example.place.split(", ")
            assert where == f"state-of-the-union/{split}" and split_of(name) == split
            assert len(example.parts) == 1 and example.parts[0].weight == 1.0 and len(example.answer) <= 100
            texts[name] = f"{texts[name]} {example.answer}" if name in texts else example.answer
        assert list(texts) == sorted(texts)
        for name, text in texts.items():
            assert text + "\n" == (place("state-of-the-union") / split / f"{name}.txt").read_text()
        held_out = texts.keys() if split == "test" else held_out
    assert 0 < len(held_out) < 15


def test_examples_by_index_and_in_other_processes(registry):
    fetch("state-of-the-union")
    examples = Corpus("state-of-the-union", characters=64).open()
    copy = pickle.loads(pickle.dumps(examples))
    assert len(copy) == len(examples) > 100 and copy[17] == examples[17] != examples[18]
    assert examples[-1] == examples[len(examples) - 1]
    with pytest.raises(IndexError):
        examples[len(examples)]


def test_a_prompt_is_read_only_and_shorter_pieces_are_left_out(registry):
    fetch("state-of-the-union")
    whole = Corpus("state-of-the-union", characters=64).open()
    examples = Corpus("state-of-the-union", characters=64, prompt=50).open()
    wanted = [example.answer for example in whole if len(example.answer) > 50]
    assert 0 < len(wanted) < len(whole)
    assert [example.parts for example in examples] == [(Text(t[:50], 0.0), Text(t[50:])) for t in wanted]


def test_a_corpus_that_was_not_fetched_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYGPT_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="fetch it with: polygpt data fetch state-of-the-union$") as caught:
        Corpus("state-of-the-union").open()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "state-of-the-onion"}, "state-of-the-union"),
        ({"characters": 0}, "characters is 0"),
        ({"prompt": 1022}, "prompt is 1022"),
    ],
)
def test_fields_out_of_bounds_are_told(fields, message):
    with pytest.raises(SpecError, match=message):
        Corpus(**{"name": "state-of-the-union"} | fields)
