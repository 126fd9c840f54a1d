"""A folder with metadata.jsonl as a source: rows, placeholders, what is refused and how."""

import json
import unicodedata

import pytest

from polygpt.data.example import Medium, Text
from polygpt.data.media.image import ImageFeatures
from polygpt.data.sources.folder import MediaFolder
from polygpt.errors import BadRecord, UserError


@pytest.fixture
def folder(tmp_path):
    """A function that writes metadata rows (objects, or raw lines) and opens the folder."""
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)

    def write(*rows, **fields):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (root / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return MediaFolder(str(root), **fields).open()

    write.root = root
    return write


def image(folder, name):
    return Medium("image", folder.root / name)


def audio(folder, name):
    return Medium("audio", folder.root / name)


def test_a_picture_and_its_caption(folder):
    examples = folder({"file_name": "a.PNG", "text": "a cat"}, {"file_name": "sub/b.wav", "text": "meow"})
    assert len(examples) == 2
    assert examples[0].parts == (image(folder, "a.PNG"), Text("a cat", 1.0))
    assert examples[1].parts == (audio(folder, "sub/b.wav"), Text("meow", 1.0))
    assert examples[1].place.endswith("metadata.jsonl, line 2")
    assert examples[1].answer == "meow" and examples[1].prompt == (audio(folder, "sub/b.wav"),)


def test_text_alone_keeps_what_looks_like_a_placeholder(folder):
    assert folder({"text": "write <image> here"})[0].parts == (Text("write <image> here", 1.0),)


def test_prompts_have_no_loss_weight(folder):
    rows = {"file_name": "a.wav", "text": "hello"}, {"file_name": "a.wav", "text": "five", "prompt": "<audio>, say it:"}
    examples = folder(*rows, prompt="Transcribe: <audio> ")
    clip = audio(folder, "a.wav")
    assert examples[0].parts == (Text("Transcribe: ", 0.0), clip, Text(" ", 0.0), Text("hello", 1.0))
    assert examples[1].parts == (clip, Text(", say it:", 0.0), Text("five", 1.0))


def test_placeholders_interleave_several_media(folder):
    names = ["1.png", "2.flac", "3.png"]
    text = "<image> and <image> sound like <audio>."
    parts = folder({"file_names": names, "text": text}, text_placeholders=True)[0].parts
    assert parts == (
        *(image(folder, "1.png"), Text(" and ", 1.0), image(folder, "3.png")),
        *(Text(" sound like ", 1.0), audio(folder, "2.flac"), Text(".", 1.0)),
    )


def test_media_of_a_modality_without_placeholder_come_first(folder):
    parts = folder({"file_names": ["1.png", "2.flac", "3.flac"], "prompt": "<image>?", "text": "yes"})[0].parts
    assert parts == (
        *(audio(folder, "2.flac"), audio(folder, "3.flac")),
        image(folder, "1.png"),
        Text("?", 0),
        Text("yes"),
    )


@pytest.mark.parametrize(
    "row, reason",
    [
        ('{"file_name": "a.png", "text": ', "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ('{"text": "x", "n": ' + "9" * 5000 + "}", "malformed JSON"),
        ("[1, 2]", "malformed metadata"),
        ({"file_name": 3, "text": "x"}, "malformed metadata"),
        ({"file_name": "a\0.png", "text": "x"}, "malformed metadata"),
        ({"file_names": "a.png", "text": "x"}, "malformed metadata"),
        ({"file_names": ["a.png"], "file_name": "a.png", "text": "x"}, "malformed metadata"),
        ({"text": ["x"]}, "malformed metadata"),
        ({"file_name": "a.png"}, "empty text"),
        ({"file_name": "a.png", "text": "  "}, "empty text"),
        ({"file_name": "a.png", "text": "\u3000\u200b"}, "empty text"),
        ('{"text": "\\ud800"}', "invalid UTF-8"),
        ({"file_name": "../a.png", "text": "x"}, "outside the folder"),
        ({"file_name": "/etc/a.png", "text": "x"}, "outside the folder"),
        ({"file_name": "link/a.png", "text": "x"}, "outside the folder"),
        ({"file_name": "a.exe", "text": "x"}, "unknown file type"),
        ({"file_name": "a.png", "prompt": "<image><image>", "text": "x"}, "placeholders"),
        ({"file_names": ["a.png", "b.png"], "prompt": "<image>", "text": "x"}, "placeholders"),
        ({"text": "x", "license": 3}, "unread field"),
    ],
)
def test_bad_rows_name_file_and_line(folder, row, reason):
    (folder.root / "link").symlink_to("/")
    examples = folder({"text": "fine"}, row, {"text": "fine again"})
    with pytest.raises(BadRecord, match=r"metadata\.jsonl, line 2: ") as caught:
        examples[1]
    assert caught.value.reason == reason and "\n" not in str(caught.value)
    assert examples[2].answer == "fine again"


def test_a_tag_in_an_answer_is_text_unless_asked(folder):
    row = {"file_name": "a.png", "text": r"the tag <image> and \<image>"}
    cat = image(folder, "a.png")
    assert folder(row)[0].parts == (cat, Text(row["text"], 1.0))
    parts = folder(row, text_placeholders=True)[0].parts
    assert parts == (Text("the tag ", 1.0), cat, Text(" and <image>", 1.0))
    assert folder({"file_name": "a.png", "text": "<image>"})[0].answer == "<image>"
    with pytest.raises(BadRecord, match="empty text"):
        folder({"file_name": "a.png", "text": "<image> "}, text_placeholders=True)[0]


def test_tags_of_absent_modalities_are_text(folder):
    row = {"file_name": "a.png", "prompt": "<image> Write <audio>. ", "text": '<audio src="a.ogg">'}
    cat = image(folder, "a.png")
    for asked in (False, True):
        parts = folder(row, text_placeholders=asked)[0].parts
        assert parts == (cat, Text(" Write <audio>. ", 0.0), Text('<audio src="a.ogg">', 1.0))


@pytest.mark.parametrize(
    ("prompt", "before", "after"),
    [
        (r"no \<image> yet: <image>", "no <image> yet: ", ""),
        (r"\\<image>\<audio>", "\\", "<audio>"),
        (r"\\\<image> a\b <image>", r"\<image> a\b ", ""),
    ],
)
def test_a_backslash_makes_a_tag_text(folder, prompt, before, after):
    parts = folder({"file_name": "a.png", "prompt": prompt, "text": "yes"})[0].parts
    assert parts == (Text(before, 0.0), image(folder, "a.png"), *[Text(after, 0.0)] * bool(after), Text("yes", 1.0))


def test_one_tag_too_many_names_the_escape(folder):
    row = {"file_name": "a.png", "prompt": "customer: <image> agent: I see no <image> yet. ", "text": "asks"}
    with pytest.raises(BadRecord, match=r"line 1: placeholders: 2 <image> for 1 image file\(s\): \\<image>"):
        folder(row)[0]


def test_a_medium_under_another_key_is_told(folder):
    (folder.root / "p.png").write_bytes(b"a picture")
    for value in ("p.png", ["p.png"]):
        with pytest.raises(BadRecord, match="unread field: 'image' names the file 'p.png': call the field file_name"):
            folder({"image": value, "text": "a cat"})[0]


def test_fields_that_nothing_reads_are_told_unless_they_are_to_be_ignored(folder):
    row = {"file_name": "a.png", "text": "a cat", "promt": "what?", "width": 3}
    with pytest.raises(BadRecord, match="unread field: 'promt': did you mean prompt.*`ignore`"):
        folder(row)[0]
    assert folder(row, ignore=("width", "promt"))[0].parts == (image(folder, "a.png"), Text("a cat", 1.0))


def test_links_are_followed_where_asked_and_keep_the_given_suffix(folder, tmp_path):
    blob = tmp_path / "blobs" / "0123abcd"
    blob.parent.mkdir()
    blob.write_bytes(b"a picture")
    (folder.root / "a.png").symlink_to(blob)
    (folder.root / "gone.png").symlink_to(tmp_path / "blobs" / "4567")
    (folder.root / "c.flac").symlink_to(folder.root / "d")  # stays inside: no permission needed
    rows = [{"file_name": name, "text": "x"} for name in ("a.png", "gone.png", "c.flac", "../blobs/0123abcd.png")]
    for i, target in enumerate((blob, tmp_path / "blobs" / "4567")):
        with pytest.raises(BadRecord, match=f"outside the folder: '.*' is a link to {target}: set follow_links=True"):
            folder(*rows)[i]
    assert folder(*rows)[2].parts[0] == audio(folder, "d")
    followed = folder(*rows, follow_links=True)
    assert followed[0].parts[0] == Medium("image", blob)
    with pytest.raises(BadRecord, match=f"{tmp_path / 'blobs' / '4567'}: missing file"):
        ImageFeatures().decode(followed[1].parts[0].source, str(followed[1].parts[0].source))
    with pytest.raises(BadRecord, match="outside the folder"):  # the name itself leads out, not a link
        followed[3]


def test_linked_metadata_is_read_where_asked(folder, tmp_path):
    folder({"text": "fine"})
    (folder.root / "metadata.jsonl").rename(tmp_path / "blob")
    (folder.root / "metadata.jsonl").symlink_to(tmp_path / "blob")
    with pytest.raises(UserError, match=f"metadata.jsonl is a link to {tmp_path / 'blob'}: set follow_links=True"):
        MediaFolder(str(folder.root)).open()
    assert MediaFolder(str(folder.root), follow_links=True).open()[0].answer == "fine"
    (tmp_path / "alias").symlink_to(folder.root)  # the folder that the user names may be a link
    assert MediaFolder(str(tmp_path / "alias"), follow_links=True).open()[0].answer == "fine"


@pytest.mark.parametrize(("written", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_accents_of_file_names_may_be_composed_or_not(folder, written, on_disk):
    names = {form: unicodedata.normalize(form, "Äpfel/größe é.png") for form in ("NFC", "NFD")}
    path = folder.root / names[on_disk]
    path.parent.mkdir()
    path.write_bytes(b"a picture")
    assert folder({"file_name": names[written], "text": "x"})[0].parts[0] == Medium("image", path)


def test_a_byte_order_mark_is_no_part_of_the_first_line(folder):
    folder()
    (folder.root / "metadata.jsonl").write_text('{"text": "größe"}\n{"text": "b"}\n', encoding="utf-8-sig")
    examples = MediaFolder(str(folder.root)).open()
    assert [example.answer for example in examples] == ["größe", "b"] and examples[0].place.endswith("line 1")


@pytest.mark.parametrize(
    ("content", "program"),
    [
        ('[{"text": "a"}]', "jq -c '.[]'"),
        ('\ufeff\n[\n  {\n "text": "a"}\n]', "jq -c '.[]'"),
        ('{\n "text": "a"\n}', "jq -c ."),
    ],
)
def test_json_that_is_not_one_object_per_line_names_the_remedy(folder, content, program):
    with pytest.raises(UserError, match="one JSON object per line") as caught:
        folder(content)
    assert program in str(caught.value) and not isinstance(caught.value, BadRecord)


def test_metadata_in_another_encoding_names_the_remedy(folder):
    folder()
    (folder.root / "metadata.jsonl").write_text('{"text": "größe"}\n', encoding="utf-16")
    with pytest.raises(UserError, match="metadata.jsonl: it is UTF-16: .*iconv"):
        len(MediaFolder(str(folder.root)).open())


def test_lines_that_show_nothing_are_skipped(folder):
    examples = folder({"text": "a"}, "\u3000\u00a0", "\u2028", {"text": "b"})
    assert [example.place.rpartition(", ")[2] for example in examples] == ["line 1", "line 4"]


def test_blank_lines_of_the_metadata_are_skipped(folder):
    row = {"text": "a"}
    examples = folder("", row, "  ", row, "")
    assert [example.place.rpartition(", ")[2] for example in examples] == ["line 2", "line 4"]


def test_invalid_utf8_names_file_and_line(folder):
    examples = folder({"text": "fine"})
    (folder.root / "metadata.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "gr\xf6\xdfe"}\n')
    with pytest.raises(BadRecord, match=r"metadata\.jsonl, line 2: invalid UTF-8"):
        MediaFolder(str(folder.root)).open()[1]
    assert len(examples) == 2


def test_missing_folder_and_metadata_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="no folder '.*gone'"):
        MediaFolder(str(tmp_path / "gone")).open()
    with pytest.raises(UserError, match=r"no metadata\.jsonl"):
        MediaFolder(str(tmp_path)).open()
