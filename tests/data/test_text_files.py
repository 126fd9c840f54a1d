"""Text files as a source: units, places, what is refused and how."""

import pickle
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygpt.data.example import Text
from polygpt.data.pieces import is_blank
from polygpt.data.sources.text_files import TextFiles
from polygpt.errors import BadRecord, SpecError, UserError


def texts(examples):
    return [example.parts[0].text for example in examples]


def test_a_document_a_file(tmp_path):
    (tmp_path / "b.txt").write_text("zwei\nZeilen")
    (tmp_path / "a.txt").write_text("one")
    examples = TextFiles((str(tmp_path / "*.txt"),)).open()
    assert texts(examples) == ["one", "zwei\nZeilen"]
    assert examples[1].parts == (Text("zwei\nZeilen", 1.0),)
    assert examples[1].place == str(tmp_path / "b.txt")
    with pytest.raises(IndexError):
        examples[2]


def test_files_and_patterns_mean_each_file_once(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a")
    (tmp_path / "b[1].txt").write_text("b")  # a name that is a pattern too
    examples = TextFiles((str(tmp_path / "b[1].txt"), str(tmp_path / "**/*.txt"))).open()
    assert texts(examples) == ["b", "a"]


@pytest.mark.parametrize(("typed", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_of_paths_may_be_composed_or_not(tmp_path, typed, on_disk):
    (tmp_path / unicodedata.normalize(on_disk, "größe é.txt")).write_text("a")
    for pattern in ("größe é.txt", "größe*.txt"):
        assert texts(TextFiles((str(tmp_path / unicodedata.normalize(typed, pattern)),)).open()) == ["a"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "end"])
def test_a_line_is_an_example(tmp_path, end, last):
    file = tmp_path / "a.txt"
    file.write_bytes(f"one{end}größe{end}{last and last + end}".encode())
    examples = TextFiles((str(file),), unit="line").open()
    assert texts(examples) == ["one", "größe"] + [last] * bool(last)
    assert examples[1].place == f"{file}, line 2"


def test_a_last_line_without_end_and_several_files(tmp_path):
    (tmp_path / "a.txt").write_text("1\n2")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").write_text("3\n")
    examples = TextFiles((str(tmp_path / "*.txt"),), unit="line").open()
    assert texts(examples) == ["1", "2", "3"]
    assert examples[2].place == f"{tmp_path / 'c.txt'}, line 1"


@pytest.fixture(scope="module")
def pieces_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pieces")


@given(text=st.text(min_size=1).filter(lambda text: not is_blank(text)), size=st.integers(4, 20))
def test_pieces_join_to_the_text_and_cut_no_character(pieces_folder, text, size):
    file = pieces_folder / "a.txt"
    data = text.encode()
    file.write_bytes(data)
    examples = TextFiles((str(file),), unit="chunk", bytes=size).open()
    pieces = []
    for i in range(len(examples)):
        try:
            pieces.append(examples[i].parts[0].text)
        except BadRecord as error:
            assert error.reason == "empty text"
            start, end = examples._pieces[0].table[0][i : i + 2]
            pieces.append(data[start:end].decode())
    assert "".join(pieces) == text.removeprefix("\ufeff")
    assert all(len(piece.encode()) <= size for piece in pieces)
    assert all(len(piece.encode()) > size - 4 for piece in pieces[:-1])


@pytest.mark.parametrize("unit, place", [("document", "a.txt"), ("line", "a.txt, line 2"), ("chunk", "a.txt, chunk 1")])
def test_invalid_utf8_names_file_and_record(tmp_path, unit, place):
    (tmp_path / "a.txt").write_bytes(b"fine\ngr\xf6\xdfe\n")
    examples = TextFiles((str(tmp_path / "a.txt"),), unit=unit).open()
    with pytest.raises(BadRecord) as caught:
        texts(examples)
    assert (caught.value.reason, caught.value.place) == ("invalid UTF-8", str(tmp_path / place))
    assert "byte 7 of the file" in str(caught.value)


def test_continuation_bytes_alone_end_the_search_for_a_character(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x80" * 50)
    examples = TextFiles((str(tmp_path / "a.txt"),), unit="chunk", bytes=8).open()
    for i in range(len(examples)):
        with pytest.raises(BadRecord, match="invalid UTF-8"):
            examples[i]


@pytest.mark.parametrize("content", ["", " \n\t"])
def test_an_empty_document_is_a_bad_record(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(BadRecord, match=r"a\.txt: empty text$"):
        texts(TextFiles((str(tmp_path / "a.txt"),)).open())


@pytest.mark.parametrize("content", ["a\n \nb", "\n\na\n\t\r\n\nb\n\n", "a\r\n\r\nb\n  ", "", "\n", " \n\n "])
def test_blank_lines_are_skipped_and_the_others_keep_their_numbers(tmp_path, content):
    file = tmp_path / "a.txt"
    file.write_bytes(content.encode())
    expected = {n: line for n, line in enumerate(content.splitlines(), start=1) if line.strip()}
    examples = TextFiles((str(file),), unit="line").open()
    assert texts(examples) == list(expected.values())
    assert [example.place for example in examples] == [f"{file}, line {n}" for n in expected]


def test_missing_files_are_refused_by_name(tmp_path):
    for path in ("gone.txt", "*.txt", "."):
        with pytest.raises(UserError, match="no text file"):
            TextFiles((str(tmp_path / path),)).open()
    (tmp_path / "a.txt").write_text("a")
    examples = TextFiles((str(tmp_path / "a.txt"),)).open()
    assert len(examples) == 1
    (tmp_path / "a.txt").unlink()
    with pytest.raises(BadRecord, match=r"a\.txt: missing file"):
        examples[0]


def test_examples_travel_to_worker_processes(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    examples = pickle.loads(pickle.dumps(TextFiles((str(tmp_path / "a.txt"),), unit="line").open()))
    assert texts(examples) == ["one", "two"]


def test_fields_out_of_bounds_are_named():
    with pytest.raises(SpecError, match=r"TextFiles\.paths is"):
        TextFiles(())
    with pytest.raises(SpecError, match=r"TextFiles\.bytes is 3"):
        TextFiles(("a",), unit="chunk", bytes=3)
