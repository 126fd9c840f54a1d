"""The catalogue of corpora, and how their text is cleaned and divided."""

import re
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_corpus import TEXTS, package, tarball

from polygpt.data import corpora
from polygpt.data.sources.corpus import Corpus


def test_every_corpus_can_be_named_and_is_pinned():
    assert set(typing.get_args(typing.get_type_hints(Corpus)["name"])) == set(corpora.CATALOGUE)
    for name, entry in corpora.CATALOGUE.items():
        assert re.fullmatch("[a-z-]+", name) and re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert entry.characters > 5_000_000 and entry.size > 1_000_000 and entry.licence


def test_the_address_of_a_scoped_package():
    assert package(b"").file == "@tiny/corpus/-/corpus-1.2.3.tgz"


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("  one\n\n two\tthree\u00a0four \n", "one two three four"),
        ("\u201cIt\u2019s\u201d &quot;fine&quot;", '"It\'s" "fine"'),
        ("war\u2014and peace &mdash; 1941\u20131945", "war--and peace -- 1941-1945"),
        ("the 49\u00b0 parallel", "the 49 degrees parallel"),
        ("na\u00efve, C\u00f3rdoba", "naive, Cordoba"),
        ("4 and 4 1\x02 per cent", "4 and 4 1/2 per cent"),
        ("Thank you. (Applause.) Now [Laughter] we [p.12] go on (all of us).", "Thank you. Now we go on (all of us)."),
    ],
)
def test_text_becomes_plain_ascii(raw, plain):
    assert corpora.clean(raw) == plain


@pytest.mark.parametrize("raw", ["a \u4e2d b", "a\x07b", "a\N{REPLACEMENT CHARACTER}b"])
def test_what_has_no_counterpart_is_told(raw):
    with pytest.raises(ValueError, match="not a printable ASCII character"):
        corpora.clean(raw)


@given(st.text(st.characters(min_codepoint=9, max_codepoint=255, exclude_categories=["Cc"])))
def test_what_is_cleaned_is_printable_with_single_spaces(raw):
    try:
        text = corpora.clean(raw)
    except ValueError as error:
        assert "not a printable ASCII character" in str(error)
        return
    assert text.isascii() and (text.isprintable() or not text)
    assert "  " not in text and text == text.strip()


def test_about_a_tenth_is_held_out_by_name_alone():
    names = [f"document {i}" for i in range(10_000)]
    held_out = [name for name in names if corpora.split_of(name) == "test"]
    assert 900 < len(held_out) < 1100
    # By hand, with sha256sum: 0xe6e50238ff132551 ends in 9 in decimal, 0x3ce02b5450ae8386 in 0.
    assert [corpora.split_of(name) for name in ("1790_george_washington", "1911_william_h_taft")] == ["train", "test"]


def test_documents_are_the_members_that_match_in_order(tmp_path):
    data = tarball(dict(reversed(TEXTS.items())))
    (tmp_path / "a.tgz").write_bytes(data)
    found = corpora.documents(tmp_path / "a.tgz", package(data))
    assert list(found) == sorted(TEXTS)
    assert found["1807_president_7"].startswith('Fellow citizens: This is the 7th "address". Fellow')
