"""A folder with metadata.jsonl as a source: rows, placeholders, what is refused and how."""

import json

import pytest

from polygpt.data.example import Medium, Text
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
    examples = folder({"file_name": "a.PNG", "text": "a cat", "license": 3}, {"file_name": "sub/b.wav", "text": "meow"})
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
    parts = folder({"file_names": names, "text": text})[0].parts
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
        ({"file_name": "a.png", "text": "<image>"}, "empty text"),
        ('{"text": "\\ud800"}', "invalid UTF-8"),
        ({"file_name": "../a.png", "text": "x"}, "outside the folder"),
        ({"file_name": "/etc/a.png", "text": "x"}, "outside the folder"),
        ({"file_name": "link/a.png", "text": "x"}, "outside the folder"),
        ({"file_name": "a.exe", "text": "x"}, "unknown file type"),
        ({"file_name": "a.png", "text": "<image><image>x"}, "placeholders"),
        ({"file_names": ["a.png", "b.png"], "text": "<image>x"}, "placeholders"),
    ],
)
def test_bad_rows_name_file_and_line(folder, row, reason):
    (folder.root / "link").symlink_to("/")
    examples = folder({"text": "fine"}, row, {"text": "fine again"})
    with pytest.raises(BadRecord, match=r"metadata\.jsonl, line 2: ") as caught:
        examples[1]
    assert caught.value.reason == reason and "\n" not in str(caught.value)
    assert examples[2].answer == "fine again"


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
