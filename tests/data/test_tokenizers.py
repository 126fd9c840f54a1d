"""Tokenizers: every text comes back, no text gives a special id, files are checked."""

import itertools
import json
import pickle
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from polygpt.data.tokenizers import ranked
from polygpt.data.tokenizers.bpe import _BYTES, BPE, PIECE, _bounded, train_bpe
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.errors import SpecError, UserError
from polygpt.spec import from_json, to_json

TEXT = "the cat sat on the mat, the dog sat on the cat; who sat on the dog?\n" * 40 + "größe, naïveté, 日本語\n" * 5
LITERALS = ["<bos>", "<eos>", "<|endoftext|>", "<s>", "</s>", "<image>", "<audio>", "<pad>", "[MASK]", "256", "257"]
texts = st.one_of(st.text(), st.sampled_from(LITERALS), st.lists(st.sampled_from(LITERALS + [" ", "\n"])).map("".join))


@pytest.fixture(scope="module")
def bpe_spec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return train_bpe([folder / "text.txt"], 300, folder / "new" / "tokenizer.json")


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return (Bytes() if request.param == "bytes" else request.getfixturevalue("bpe_spec")).build()


@given(text=texts)
def test_text_round_trips_and_gives_no_special_id(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert (ids >= 0).all() and (ids < tokenizer.bos).all()
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@given(text=texts)
def test_specials_are_skipped_when_decoding(tokenizer, text):
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos, tokenizer.eos]) == text


def test_any_id_decodes(tokenizer):
    for first in range(0, tokenizer.vocabulary):
        assert isinstance(tokenizer.decode([first]), str)
    assert tokenizer.decode(np.array([0xC3 if tokenizer.vocabulary == 258 else tokenizer.encode("Ã")[0]])) == "\ufffd"


def test_specials_are_the_last_two_ids(tokenizer):
    assert (tokenizer.bos, tokenizer.eos) == (tokenizer.vocabulary - 2, tokenizer.vocabulary - 1)
    assert tokenizer.token_bytes.shape == (tokenizer.vocabulary,) and tokenizer.token_bytes.dtype == np.int32
    np.testing.assert_array_equal(np.flatnonzero(tokenizer.token_bytes == 0), [tokenizer.bos, tokenizer.eos])


@pytest.mark.parametrize("multiple", [1, 2, 64, 1000])
def test_a_vocabulary_is_rounded_up_by_ids_that_stand_for_nothing(bpe_spec, multiple):
    for spec in (Bytes(), bpe_spec):
        plain, padded = spec.build(), spec.replace(multiple=multiple).build()
        assert padded.vocabulary % multiple == 0 and 0 <= padded.vocabulary - plain.vocabulary < multiple
        assert (padded.used, padded.bos, padded.eos) == (plain.vocabulary, plain.bos, plain.eos)
        np.testing.assert_array_equal(padded.encode(TEXT), plain.encode(TEXT))
        assert padded.token_bytes.shape == (padded.vocabulary,) and padded.token_bytes.dtype == np.int32
        np.testing.assert_array_equal(padded.token_bytes[: plain.vocabulary], plain.token_bytes)
        assert not padded.token_bytes[plain.vocabulary :].any()
        assert padded.decode([ord("a"), *range(padded.used, padded.vocabulary), ord("b")]) == plain.decode([97, 98])
    assert from_json(to_json(bpe_spec.replace(multiple=8))) == bpe_spec.replace(multiple=8)
    with pytest.raises(SpecError, match="Bytes.multiple is 0: it must be at least 1"):
        Bytes(multiple=0)


def test_half_a_surrogate_pair_does_not_stop_encoding(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_a_tokenizer_travels_to_worker_processes(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(copy.encode(TEXT), tokenizer.encode(TEXT))


def test_bytes_are_the_ids():
    tokenizer = Bytes().build()
    assert tokenizer.vocabulary == 258
    np.testing.assert_array_equal(tokenizer.encode("aé"), [97, 0xC3, 0xA9])


def test_bpe_learns_merges_up_to_its_vocabulary(bpe_spec):
    tokenizer = bpe_spec.build()
    assert tokenizer.vocabulary == 300
    assert len(tokenizer.encode(TEXT)) < 0.6 * len(TEXT.encode())
    assert from_json(to_json(bpe_spec)) == bpe_spec


def test_training_repeats_itself(bpe_spec, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    train_bpe([tmp_path / "text.txt"], 300, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == open(bpe_spec.file, "rb").read()


def test_training_refuses_what_it_cannot_use_and_writes_nothing(tmp_path):
    out = tmp_path / "tokenizer.json"
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: invalid UTF-8"):
        train_bpe([tmp_path / "latin.txt"], 300, out)
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read: No such file"):
        train_bpe([tmp_path / "gone.txt"], 300, out)
    with pytest.raises(UserError, match="vocabulary of 257 is too small"):
        train_bpe([tmp_path / "latin.txt"], 257, out)
    with pytest.raises(UserError, match="no text file"):
        train_bpe([], 300, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latin.txt"]


@given(st.lists(st.sampled_from(["a", "word", " ", "x" * 255, "y" * 257, " \t" * 200, "日" * 700, "\n"]), max_size=8))
def test_long_stretches_are_cut_and_nothing_else(words):
    line = "".join(words)
    pieces = list(_bounded(line))
    assert "".join(pieces) == line
    runs = {match.span() for match in re.finditer(r"\S+|\s+", line)}
    ends = list(itertools.accumulate(map(len, pieces)))[:-1]
    expected = [cut for start, end in sorted(runs) for cut in range(start + PIECE, end, PIECE)]
    assert ends == expected


def test_text_without_spaces_is_learned_in_pieces(tmp_path):
    (tmp_path / "text.txt").write_text("ab" * 20_000)
    tokenizer = train_bpe([tmp_path / "text.txt"], 300, tmp_path / "bpe.json").build()
    assert 64 <= tokenizer.token_bytes.max() <= PIECE  # in one piece, tokens would double up to 16,384 bytes
    assert tokenizer.decode(tokenizer.encode("ab" * 5000)) == "ab" * 5000


@pytest.mark.parametrize("phase", ["reading", "merging"])
def test_training_tells_how_far_it_is_and_can_be_interrupted(tmp_path, phase):
    # Words of their own, so that merging takes longer than reading is watched at.
    rng = np.random.default_rng(0)
    (tmp_path / "text.txt").write_text("\n".join(map(str, rng.integers(10**12, size=100_000))))
    told = []

    def progress(what, done, total):
        told.append((what, done, total))
        if what.startswith(phase):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_bpe([tmp_path / "text.txt"], 2000, tmp_path / "bpe.json", progress)
    assert told[-1][0].startswith(phase) and told[-1][2] == 1 and [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_training_text_may_have_a_byte_order_mark_and_no_other_encoding(tmp_path):
    files = {name: tmp_path / name for name in ("plain", "marked", "wide")}
    for (_, file), encoding in zip(files.items(), ("utf-8", "utf-8-sig", "utf-16"), strict=True):
        file.write_text(TEXT, encoding=encoding)
    plain, marked = (train_bpe([files[name]], 300, tmp_path / f"{name}.json").file for name in ("plain", "marked"))
    assert open(plain).read() == open(marked).read()
    with pytest.raises(UserError, match="wide: it is UTF-16: .*iconv"):
        train_bpe([files["wide"]], 300, tmp_path / "wide.json")


def test_missing_and_unsuitable_files_are_refused_by_name(bpe_spec, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer file .*gone\.json"):
        BPE(str(tmp_path / "gone.json")).build()
    path = tmp_path / "bad.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"bad\.json: not a tokenizer file"):
        BPE(str(path)).build()
    good = json.loads(open(bpe_spec.file).read())
    token = {"id": 298, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False}
    changes = [
        ({"added_tokens": [{**token, "normalized": False, "special": True}]}, "added tokens"),
        ({"normalizer": {"type": "Lowercase"}}, "changes the text"),
        ({"pre_tokenizer": {**good["pre_tokenizer"], "add_prefix_space": True}}, "changes the text"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not a byte-level BPE"),
        ({"model": {**good["model"], "vocab": {"a": 0, "b": 1}, "merges": []}}, "of the 256 bytes have no token"),
        ({"model": {**good["model"], "dropout": 0.1}}, "drops"),
        ({"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}}, "truncates"),
        ({"post_processor": {**good["pre_tokenizer"], "trim_offsets": True}}, "adds tokens"),
    ]
    for change, message in changes:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=message):
            BPE(str(path)).build()


def library(merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """A byte-level BPE of the library with these merges."""
    tokens = list(dict.fromkeys([*_BYTES, *(first + second for first, second in merges)]))
    model = tokenizers.models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)
    found = tokenizers.Tokenizer(model)
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return found


def test_where_tiktoken_is_used_it_encodes_as_the_library():
    rng = np.random.default_rng(0)
    words = ["".join(word) for size in range(1, 10) for word in itertools.product("ab", repeat=size)]
    used = 0
    for _ in range(120):
        tokens, merges = ["a", "b"], []
        for _ in range(rng.integers(1, 7)):
            pair = tuple(rng.choice(tokens, 2))
            if pair not in merges and len(pair[0] + pair[1]) < 6:
                merges.append(pair)
                tokens = list(dict.fromkeys([*tokens, "".join(pair)]))
        model = library(merges)
        if (fast := ranked.ranked(model, _BYTES)) is not None:
            used += 1
            assert [found.ids for found in model.encode_batch(words)] == fast.encode_ordinary_batch(words), merges
    assert 40 < used < 120, "some have merges that tiktoken would make in another order"


@pytest.fixture(scope="module")
def bpe(bpe_spec):
    return bpe_spec.build()


@given(text=texts)
def test_both_cut_a_text_into_the_same_pieces(bpe, text):
    assert bpe.ranked is not None
    assert list(bpe.encode(text)) == bpe._model.encode(text.encode("utf-8", "replace").decode()).ids


def test_a_long_text_is_left_to_the_library(bpe):
    text = " \n\t" * ranked.LONGEST + "end"
    assert bpe.decode(bpe.encode(text)) == text
