"""Tables of byte offsets: built in blocks, kept between starts, right for any block size; encodings."""

import os
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygpt.data import pieces
from polygpt.data.pieces import INVISIBLE, KIND, Pieces, is_blank
from polygpt.errors import BadRecord, UserError

LINES = st.lists(
    st.sampled_from(["", "a", " \t", "größe", "\u3000", "\u2028\u00a0", "\ufeff", "のの", "x" * 9, "\x80"]), max_size=12
)


def texts(found: Pieces) -> list[str]:
    return [found.text(i) for i in range(len(found))]


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Every table is stored, in a cache folder of the test's own; how often a file was scanned."""
    monkeypatch.setenv("POLYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pieces, "SMALL", 0)
    scans, scan = [], Pieces._scan
    monkeypatch.setattr(Pieces, "_scan", lambda self: scans.append(self.file) or scan(self))
    return scans


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pieces")


@given(lines=LINES, ended=st.booleans(), block=st.sampled_from([1, 2, 3, 7, 1 << 20]))
def test_lines_are_those_of_the_whole_file_whatever_the_block(folder, lines, ended, block):
    content = "\n".join(lines) + "\n" * (ended and bool(lines))
    file = folder / "lines.txt"
    file.write_text(content, encoding="utf-8", newline="")
    # On its first line the mark is that of the file; elsewhere it shows nothing.
    expected = [(n, line) for n, line in enumerate(content.split("\n"), start=1) if not is_blank(line)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "BLOCK", block)
        found = Pieces(file, "line")
        assert [found.place(i).rpartition(" ")[2] for i in range(len(found))] == [str(n) for n, _ in expected]
        assert texts(found) == [line for _, line in expected]


@given(text=st.text(min_size=1).filter(lambda text: "\0" not in text), size=st.integers(4, 9), block=st.integers(1, 30))
def test_chunks_are_the_same_whatever_the_block(folder, text, size, block):
    file = folder / "chunks.txt"
    file.write_bytes(text.encode())
    whole = Pieces(file, size).table[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "BLOCK", block)
        np.testing.assert_array_equal(Pieces(file, size).table[0], whole)


def test_a_table_is_built_once_and_mapped_afterwards(stored, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n\ntwo\n")
    for _ in range(2):
        found = Pieces(file, "line")
        assert texts(found) == ["one", "two"] and found.place(1) == f"{file}, line 3"
        assert all(isinstance(array, np.memmap) for array in found.table)
    assert texts(pickle.loads(pickle.dumps(found))) == ["one", "two"]
    assert stored == [file]
    assert len(Pieces(file, 4)) == 3 and len(stored) == 2  # chunks have a table of their own
    stored.pop()
    (tmp_path / "link.txt").symlink_to(file)
    assert texts(Pieces(tmp_path / "link.txt", "line")) == ["one", "two"] and len(stored) == 1


def test_a_table_of_lines_without_blanks_holds_edges_alone(stored, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    found = Pieces(tmp_path / "a.txt", "line")
    assert found.table[1] is None and found.table[0].tolist() == [0, 4, 7]
    assert [path.name for path in tmp_path.glob("cache/text/*/*")] == ["edges"]
    (tmp_path / "a.txt").write_text(" \n\n ")
    assert len(Pieces(tmp_path / "a.txt", "line")) == 0


def test_another_size_or_time_makes_another_table(stored, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n")
    assert texts(Pieces(file, "line")) == ["one", "two"]
    file.write_text("one\ntwo\nthree\n")
    assert texts(Pieces(file, "line")) == ["one", "two", "three"]
    status = file.stat()
    file.write_text("a\nb\nc\nd\ne\nf\ng\n")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert file.stat().st_size == status.st_size and len(Pieces(file, "line")) == 7 and len(stored) == 3


def test_a_file_that_is_not_the_one_indexed_is_a_bad_record(stored, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\nsix\n")
    status = file.stat()
    assert len(Pieces(file, "line")) == 3
    for content in ("o\n\ntwo\nsix\n", "onetwo six!\n", "one\n"):
        file.write_text(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        found = Pieces(file, "line")
        found.table = (np.array([0, 4, 8, 12]), None)
        with pytest.raises(BadRecord, match="changed file"):
            texts(found)


def test_a_file_that_changes_between_processes_is_an_error(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n")
    found = Pieces(file, "line")
    assert len(found) == 1
    copy = pickle.loads(pickle.dumps(found))
    file.write_text("one\ntwo\n")
    with pytest.raises(UserError, match="changed while in use"):
        len(copy)


def test_memory_does_not_grow_with_the_file(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", 1 << 14)
    file = tmp_path / "a.txt"
    file.write_bytes((b"x" * 63 + b"\n") * (1 << 15))  # 2 MiB
    for unit in ("line", 64):
        tracemalloc.start()
        found = Pieces(file, unit)
        assert len(found) == 1 << 15 and found.text(30_000)[:63] == "x" * 63
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 18


def test_a_cache_that_cannot_be_written_is_named(stored, tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot write the index of .*set POLYGPT_CACHE"):
        len(Pieces(tmp_path / "a.txt", "line"))


def test_a_piece_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "LARGEST", 10)
    (tmp_path / "a.txt").write_text("x" * 11)
    with pytest.raises(BadRecord, match="too large: .*unit='line'"):
        Pieces(tmp_path / "a.txt", None).text(0)


@pytest.mark.parametrize("unit", [None, "line", 5])
def test_a_byte_order_mark_is_no_text(tmp_path, unit):
    (tmp_path / "a.txt").write_text("größe", encoding="utf-8-sig")
    found = "".join(texts(Pieces(tmp_path / "a.txt", unit)))
    assert found == "größe"
    with pytest.raises(BadRecord, match="byte 5 of the file"):
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfgr\xf6\xdfe")
        texts(Pieces(tmp_path / "a.txt", unit))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_named_with_the_remedy(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("größe\nund breite\n, allerlei\n".encode(encoding))
    name = "UTF-32" if encoding == "utf-32" else "UTF-16"
    for unit in ("line", 100):
        with pytest.raises(UserError, match=f"it is {name}: .*iconv -f {name} -t UTF-8") as caught:
            len(Pieces(tmp_path / "a.txt", unit))
        assert not isinstance(caught.value, BadRecord)
    with pytest.raises(BadRecord, match=f"invalid UTF-8: it is {name}"):  # one document of many
        Pieces(tmp_path / "a.txt", None).text(0)


def test_every_invisible_character_is_looked_at():
    plane = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    invisible = [letter for letter in plane if INVISIBLE.fullmatch(letter)]
    assert {"\u00a0", "\u3000", "\u2028", "\u200b", "\ufeff"} < set(invisible)
    assert all(KIND[list(letter.encode())].max() < 2 for letter in invisible)
    assert {letter for letter in plane if letter.isspace()} < set(invisible)
