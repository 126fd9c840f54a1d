"""Labels: where they stand in rows and batches, what is refused, and which sources give them."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from polygpt import sequence
from polygpt.data.check import check
from polygpt.data.example import Example, Medium, Text
from polygpt.data.labels import Label
from polygpt.data.layout import LayoutSpec, lay_out, prompt_batch
from polygpt.data.loader import DataSpec, Task, train_batches
from polygpt.data.packing import Packer, collate, pack
from polygpt.data.show import table
from polygpt.data.sources.embedded import NUMBERS, Embedded
from polygpt.data.sources.folder import MediaFolder
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.errors import BadRecord, SpecError, UserError
from polygpt.generation.padding import pad

LABELS = {"kind": Label(classes=3), "tag": Label(classes=5), "size": Label((2,))}
LAYOUT = LayoutSpec(seq_len=32, labels=LABELS)
NAN = math.nan


def row_of(small, *parts, layout=LAYOUT, **labels):
    return lay_out(Example(parts, "the record", labels), layout, small.tokenizer, small.adapters)


def test_labels_of_an_example_are_at_its_last_position_and_those_of_a_text_at_its_tokens(small):
    parts = Text("ab", 0.0, {"tag": 4}), Medium("image", small.png(1)), Text("c", 1.0, {"tag": 0})
    row = row_of(small, *parts, kind=2, size=[0.5, None])
    np.testing.assert_array_equal(row.extra["tag"], [NAN, 4, 4, *[NAN] * 4, 0, NAN])
    np.testing.assert_array_equal(row.extra["kind"], [*[NAN] * 8, 2])
    np.testing.assert_array_equal(row.extra["size"], [*[[NAN, NAN]] * 8, [0.5, NAN]])
    assert {array.dtype for array in row.extra.values()} == {np.dtype(np.float32)}
    plain = lay_out(Example(parts[1:2] + (Text("c"),), "r"), LAYOUT.replace(labels={}), small.tokenizer, small.adapters)
    assert plain.extra == {}


def test_texts_keep_their_labels_where_media_come_first(small):
    parts = Text("ab", 0.0, {"tag": 1}), Medium("image", small.png(1)), Text("c", 1.0)
    row = row_of(small, *parts, layout=LAYOUT.replace(fusion="prefix"))
    np.testing.assert_array_equal(row.extra["tag"], [*[NAN] * 5, 1, 1, NAN, NAN])


def test_an_example_needs_a_text_to_predict_or_a_label(small):
    picture = Medium("image", small.png(1))
    row = row_of(small, picture, kind=1)
    assert not row.weight.any() and row.extra["kind"][-1] == 1
    assert row_of(small, Text("ab", 0.0, {"tag": 1})).extra["tag"][1] == 1
    with pytest.raises(BadRecord, match="empty text"):
        row_of(small, picture)


@pytest.mark.parametrize("value", [3, -1, 0.5, [1], "1", "one", math.inf, {"a": 1}])
def test_a_label_that_is_none_of_its_classes_is_refused(small, value):
    message = (
        r"the record: malformed label: 'kind' is .*: it must be a whole number from 0 to 2, or null: .*layout.labels"
    )
    with pytest.raises(BadRecord, match=message):
        row_of(small, Text("a"), kind=value)


@pytest.mark.parametrize("value", [1.0, [1.0], [1.0, 2.0, 3.0], [1.0, math.inf], [1.0, "x"], [1.0, [2.0]], [1e39, 0.0]])
def test_a_label_of_another_shape_or_without_a_finite_value_is_refused(small, value):
    with pytest.raises(BadRecord, match=r"'size' is .*: it must be of shape \[2\], each a finite number or null"):
        row_of(small, Text("a"), size=value)


def test_a_label_below_its_minimum_is_refused(small):
    layout = LAYOUT.replace(labels={"count": Label((2,), minimum=0)})
    with pytest.raises(BadRecord, match=r"'count' is \[3, -1\]: .* each a finite number of at least 0 or null: mend"):
        row_of(small, Text("a"), layout=layout, count=[3, -1])
    count = row_of(small, Text("a"), layout=layout, count=[0, None]).extra["count"][-1]
    np.testing.assert_array_equal(count, [0, np.nan])


def test_a_label_that_is_not_declared_is_refused(small):
    with pytest.raises(BadRecord, match="'kinds' is not in data.layout.labels: did you mean kind.*; declare it"):
        row_of(small, Text("a"), kinds=1)
    with pytest.raises(BadRecord, match="undeclared label: 'tag' is not in data.layout.labels: there are none"):
        row_of(small, Text("a", 1.0, {"tag": 1}), layout=LAYOUT.replace(labels={}))


def test_packed_and_padded_rows_keep_their_labels(small):
    rows = [row_of(small, Text("ab", 1.0, {"tag": 1}), kind=0), row_of(small, Text("c"), size=[1, 2])]
    packed = pack(rows, small.adapters)
    packer = Packer(3, 32, small.adapters, packing=True)
    assert all(map(packer.add, rows))
    batch = packer.batch()
    sequence.check(batch, small.tokenizer.vocabulary, small.positions)
    for name, label in LABELS.items():
        joined = np.concatenate([row.extra[name] for row in rows])
        np.testing.assert_array_equal(packed.extra[name], joined)
        np.testing.assert_array_equal(batch.extra[name][0, : len(joined)], joined)
        assert batch.extra[name].shape == (3, 32, *label.shape) and batch.extra[name].dtype == np.float32
        assert np.isnan(batch.extra[name][0, len(joined) :]).all() and np.isnan(batch.extra[name][1:]).all()


def test_whole_numbers_are_padded_with_zeros(small):
    row = row_of(small, Text("ab"), layout=LAYOUT.replace(labels={}))
    row = dataclasses.replace(row, extra={"depth": np.arange(1, 5, dtype=np.int32)})
    batch = collate([None, row], 6, small.adapters)
    np.testing.assert_array_equal(batch.extra["depth"], [[0] * 6, [1, 2, 3, 4, 0, 0]])
    sequence.check(batch, small.tokenizer.vocabulary, small.positions)


def test_a_prompt_has_the_labels_of_its_texts_and_generation_takes_those_that_masks_read(small):
    batch = prompt_batch([[Text("ab", 0.0, {"tag": 1})]], LAYOUT, small.tokenizer, small.adapters)
    np.testing.assert_array_equal(batch.extra["tag"], [[np.nan, 1, 1]])
    assert pad(batch, 2, 8).extra == {}
    tag_BT = pad(batch, 2, 8, ["tag", "none"]).extra["tag"]
    assert tag_BT.shape == (2, 8) and np.argwhere(~np.isnan(tag_BT)).tolist() == [[0, 1], [0, 2]]


def test_a_batch_with_a_label_on_padding_or_of_another_size_is_refused(small):
    batch = collate([row_of(small, Text("ab"), kind=1), None], 8, small.adapters)
    given = small.tokenizer.vocabulary, small.positions
    wrong = batch.replace(extra=batch.extra | {"kind": np.nan_to_num(batch.extra["kind"])})
    with pytest.raises(UserError, match="row 0, position 4: a label 'kind' on padding"):
        sequence.check(wrong, *given)
    with pytest.raises(UserError, match=r"extra\['kind'\] has shape \(2, 7\), but must begin with \(2, 8\)"):
        sequence.check(batch.replace(extra={"kind": batch.extra["kind"][:, :7]}), *given)


def test_labels_take_the_way_of_all_arrays(small):
    batch = collate([row_of(small, Text("ab"), kind=1)], 8, small.adapters)
    assert len(jax.tree.leaves(batch)) == 9 + 2 * len(small.adapters) + len(LABELS)


def test_requirements_of_labels_are_named(tmp_path):
    with pytest.raises(SpecError, match="labels is .*: it must be fields other than file_name, file_names, text"):
        MediaFolder(str(tmp_path), labels={"text": ()})
    with pytest.raises(SpecError, match="labels is True: it must be false: pictures have none"):
        Embedded("pictures", labels=True)


# --- sources ----------------------------------------------------------------------------------------------------------


def folder(path, *rows, **labels):
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return MediaFolder(str(path), labels=labels).open()


def test_fields_of_a_folder_are_labels(tmp_path):
    rows = [
        {"text": "purr", "kind": "cat", "age": 3.5, "seen": ["dog", "cat"]},
        {"prompt": "bark", "kind": None, "seen": []},
        {"text": "moo", "kind": "cow"},
        {"prompt": "nothing"},
        {"text": "", "age": 1},
    ]
    examples = folder(tmp_path, *rows, kind=("cat", "dog"), age=(), seen=("cat", "dog", "owl"))
    assert examples[0].labels == {"kind": 0, "age": 3.5, "seen": [1, 1, 0]}
    assert examples[1].labels == {"kind": None, "seen": [0, 0, 0]} and examples[1].parts == (Text("bark", 0.0),)
    with pytest.raises(BadRecord, match=r"line 3: malformed label: kind is 'cow': .*; list all classes in .*`labels`"):
        examples[2]
    with pytest.raises(BadRecord, match="line 4: empty text: the row has no field 'text'"):
        examples[3]
    with pytest.raises(BadRecord, match="line 5: empty text"):
        examples[4]


@pytest.mark.parametrize("task", ["digits", "speech", "sums", "fusion"])
def test_a_label_of_the_embedded_data_takes_the_place_of_the_answer(task):
    texts, labels = Embedded(task, "test", examples=20).open(), Embedded(task, "test", examples=20, labels=True).open()
    assert len(texts) == len(labels)
    for i in range(0, len(texts), len(texts) // 10):
        assert labels[i].parts == texts[i].parts[:-1] and not labels[i].answer
        assert NUMBERS[labels[i].labels["number"]] == texts[i].answer


def test_the_label_of_an_embedded_text_is_its_corpus():
    examples = Embedded("text", "test", labels=True).open()
    found = {(example.labels["corpus"], "bible/" in example.place) for example in examples}
    assert found == {(0, True), (1, False)} and all(example.answer for example in examples)


# --- what commands show -----------------------------------------------------------------------------------------------


def test_check_counts_labels_and_show_prints_them(small):
    data = DataSpec(
        {"text": Task(Embedded("text", "test", characters=20, labels=True))},
        LayoutSpec(seq_len=48, labels={"corpus": Label(classes=2), "rare": Label((2,))}),
        batch_size=2,
    )
    found = check(data, Bytes().build(), {})["text"]
    assert found.labelled == {"corpus": found.records, "rare": 0} and not found.faults
    assert found.summary()["labelled"] == found.labelled
    batch = next(train_batches(data, Bytes().build(), {}, seed=0))
    batch.extra["rare"][0, 0] = [1.5, NAN]
    shown = table(batch, 0, Bytes().build())
    corpus, rare = ([str(cell) for cell in shown.columns[i].cells] for i in (-2, -1))
    ends = np.flatnonzero(np.isfinite(batch.extra["corpus"][0]))
    assert [t for t, cell in enumerate(corpus) if cell] == list(ends) and set(corpus) <= {"", "0", "1"}
    assert rare[0] == "1.5, –" and not any(rare[1:])
