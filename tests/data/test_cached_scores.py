"""Scores of examples in files: written in shards, resumed, recognised as theirs, and packed like the rest of a row."""

import dataclasses
import io
import itertools
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_data import ADAPTERS, make_example

from given_examples import Given
from polygpt.data import scores
from polygpt.data.example import Example, Text
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.loader import DataSpec, Task, extra_shapes, train_batches
from polygpt.data.scores import Manifest, Scores, digest, layout_fields, scored
from polygpt.data.scores_writer import ScoresWriter
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.data.tokenizers.special_tokens import SpecialTokens
from polygpt.data.transforms.word_swap import WordSwap
from polygpt.errors import SpecError, UserError
from polygpt.sequence import check

TOKENIZER = Bytes().build()
LAYOUT = LayoutSpec(seq_len=96)
EXAMPLES = [make_example(seed) for seed in range(5)] + [Example((Text(f"text {i}"),), f"text {i}") for i in range(6)]
TOP = 3


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(scores, "SHARD", 4)


def manifest(**fields):
    layout = layout_fields(LAYOUT)
    made = Manifest(
        "runs/teacher, step 3", "f", TOKENIZER.fingerprint, TOKENIZER.vocabulary, False, TOP, layout, {"a": 11}
    )
    return dataclasses.replace(made, **fields)


def row_of(i, example=None):
    return lay_out(example or EXAMPLES[i], LAYOUT, TOKENIZER, ADAPTERS)


def records_of(i):
    """Records by which an example and a token are recognised."""
    records = np.zeros(scored(row_of(i)).sum(), manifest().record)
    records["log_p"] = -i - np.arange(len(records)) / 100
    records["ids"] = 10 * i + np.arange(TOP)
    records["top"] = -np.arange(TOP) - i
    return records


def write(writer, until=None):
    for task, number in writer.missing()[:until]:
        chosen = writer.manifest.examples(task, number)
        writer.write(task, number, [(digest(EXAMPLES[i], row_of(i)), records_of(i)) for i in chosen])


@pytest.fixture
def folder(tmp_path):
    writer = ScoresWriter(tmp_path / "scores", manifest())
    write(writer)
    writer.finish()
    return str(tmp_path / "scores")


def data(folder, examples=EXAMPLES, **fields):
    return DataSpec({"a": Task(Given(tuple(examples)))}, LAYOUT, batch_size=2, scores={"teacher": folder}, **fields)


def test_every_token_of_packed_rows_has_the_scores_of_its_example(folder):
    batches = train_batches(data(folder), TOKENIZER, ADAPTERS, seed=0)
    seen = set()
    for batch in itertools.islice(batches, 8):
        check(batch, TOKENIZER.vocabulary, {name: one.positions for name, one in ADAPTERS.items()})
        given, ids, log_p = (batch.extra[name] for name in ("teacher", "teacher.ids", "teacher.log_p"))
        assert ids.dtype == np.int32 and log_p.dtype == np.float32
        known = batch.weight_BT != 0
        np.testing.assert_array_equal(np.isnan(given), ~known)
        np.testing.assert_array_equal(np.isnan(log_p).all(-1), ~known)
        assert not ids[~known].any()
        for b, segment in {(b, batch.segment_BT[b, t]) for b, t in np.argwhere(known)}:
            here = (batch.segment_BT[b] == segment) & known[b]
            example = ids[b, here][0, 0] // 10
            seen.add(example)
            np.testing.assert_array_equal(given[b, here], records_of(example)["log_p"])
            np.testing.assert_array_equal(ids[b, here], records_of(example)["ids"])
            np.testing.assert_array_equal(log_p[b, here], records_of(example)["top"])
            np.testing.assert_array_equal(batch.target_BT[b, here], row_of(example).target[scored(row_of(example))])
    assert seen == set(range(11))
    shapes = {name: (array.shape[2:], str(array.dtype)) for name, array in batch.extra.items()}
    assert extra_shapes(data(folder)) == shapes, "what a plan compiles for"


def test_writing_resumes_and_ends_in_the_same_files(folder, tmp_path):
    writer = ScoresWriter(tmp_path / "again", manifest())
    write(writer, until=2)
    with pytest.raises(
        UserError, match="again: it is not complete: polygpt data score with the same arguments resumes"
    ):
        Scores("teacher", str(tmp_path / "again"))
    resumed = ScoresWriter(tmp_path / "again", manifest())
    assert resumed.missing() == [("a", 2)]
    write(resumed)
    resumed.finish()
    counts = resumed.counts()
    assert counts["examples"] == 11 and counts["tokens"] == sum(len(records_of(i)) for i in range(11))
    for path in (tmp_path / "scores").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"fingerprint": "g"},
            'has scores with another fingerprint ("f", now "g"): name another folder, or remove this',
        ),
        ({"top": 4}, "has scores with another top (3, now 4)"),
        ({"tasks": {"a": 12}}, 'another tasks ({"a": 11}, now {"a": 12})'),
    ],
)
def test_scores_of_something_else_are_not_overwritten(folder, fields, message):
    with pytest.raises(UserError) as raised:
        ScoresWriter(folder, manifest(**fields))
    assert message in str(raised.value)


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("text")
    with pytest.raises(UserError, match="mine exists and has no scores: name a new folder"):
        ScoresWriter(tmp_path / "mine", manifest())
    with pytest.raises(UserError, match=r"mine has no scores: it has no scores.json; polygpt data score writes them"):
        Scores("teacher", str(tmp_path / "mine"))
    for text in ("{", "[]", "{}", '{"format": 7}', '{"format": 1, "top": 3}'):
        (tmp_path / "mine/scores.json").write_text(text)
        with pytest.raises(UserError, match=r"scores.json is damaged, or of another version"):
            Scores("teacher", str(tmp_path / "mine"))


def drawn(data):
    return [next(batches) for batches in [train_batches(data, TOKENIZER, ADAPTERS, seed=0)] for _ in range(3)]


@pytest.mark.parametrize(
    "changed, message",
    [
        (Example((Text("text 3!"),), "text 3"), "example 8 of the task 'a' (text 3) is not the one that was scored"),
        (Example((Text("text 2", 0.0), Text("x")), "prompt"), "example 8 of the task 'a' (prompt) is not the one"),
    ],
)
def test_an_example_that_has_changed_is_named(folder, changed, message):
    with pytest.raises(UserError) as raised:
        drawn(data(folder, [*EXAMPLES[:8], changed, *EXAMPLES[9:]]))
    assert message in str(raised.value) and "data.scores.teacher" in str(raised.value)


def test_other_media_are_another_example():
    parts = EXAMPLES[3].parts
    other = [
        dataclasses.replace(part, source=part.source + b" ") if hasattr(part, "source") else part for part in parts
    ]
    assert other != list(parts) and digest(EXAMPLES[3], row_of(3)) != digest(Example(tuple(other), ""), row_of(3))


def test_damaged_files_are_named(folder, tmp_path):
    index, records = (min((tmp_path / "scores").glob(f"*0.{kind}")) for kind in ("index.npy", "npy"))
    good, short = {path: path.read_bytes() for path in (index, records)}, io.BytesIO()
    np.save(short, np.load(index)[:2])
    cut = good[records][:-8]
    for path, bad in (
        (records, cut),
        (records, b""),
        (records, cut + bytes(8)),
        (index, b"x"),
        (index, short.getvalue()),
    ):
        for other, content in good.items():
            other.write_bytes(bad if other == path else content)
        with pytest.raises(
            UserError, match=f"{index.name} and {records.name} are damaged: remove them and run polygpt"
        ):
            drawn(data(folder))


def test_data_that_differ_are_refused_before_training(folder):
    more = [*EXAMPLES, EXAMPLES[0]]
    with pytest.raises(UserError, match="the task 'a' has 11 examples there and 12 here: write the scores again"):
        drawn(data(folder, more))
    with pytest.raises(UserError, match="scored with layout.fusion 'interleaved', here 'prefix'"):
        drawn(data(folder).replace(layout=LAYOUT.replace(fusion="prefix")))
    other = SpecialTokens(Bytes(), ("<x>",)).build()
    with pytest.raises(UserError, match=r"the scores are of another tokenizer \(258 ids, here 259\)"):
        train_batches(data(folder), other, ADAPTERS, seed=0)


def test_few_indexes_are_in_memory(folder, monkeypatch):
    monkeypatch.setattr(scores, "OPEN", 2)
    found = Scores("teacher", folder)
    for i in (0, 5, 9, 1, 10):
        found.arrays("a", i, EXAMPLES[i], row_of(i))
    assert list(found._indexes) == [("a", 2), ("a", 0)]
    again = pickle.loads(pickle.dumps(found)).arrays("a", 5, EXAMPLES[5], row_of(5))
    np.testing.assert_array_equal(again["teacher.ids"][scored(row_of(5))], records_of(5)["ids"])


def test_an_example_that_waits_to_be_packed_may_have_changed_when_a_run_resumes(folder):
    before = train_batches(data(folder), TOKENIZER, ADAPTERS, seed=0)
    next(before)
    assert before._waiting
    changed = [dataclasses.replace(one, parts=(Text("other ", 0.0), *one.parts)) for one in EXAMPLES]
    after = train_batches(data(folder, changed), TOKENIZER, ADAPTERS, seed=0)
    with pytest.raises(UserError, match="is not the one that was scored"):
        after.set_state([before.get_state()])


def test_a_damaged_index_is_told_when_scores_are_complete(folder):
    path = next(Path(folder).glob("*.index.npy"))
    for content in (path.read_bytes()[:-1], b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path.name} is damaged: remove it and run polygpt data score again"):
            ScoresWriter(folder, manifest()).counts()


def test_a_resumed_run_reads_the_scores_of_the_same_model(folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "same")
    before = train_batches(data(str(folder)), TOKENIZER, ADAPTERS, seed=0)
    next(before)
    state = before.get_state()
    after = train_batches(data(str(folder)), TOKENIZER, ADAPTERS, seed=0)
    after.set_state([state])
    np.testing.assert_array_equal(next(after).extra["teacher"], next(before).extra["teacher"])
    writer = ScoresWriter(tmp_path / "other", manifest(fingerprint="g", model="runs/other, step 9"))
    write(writer)
    writer.finish()
    before.under(data(str(tmp_path / "other")), ADAPTERS).set_state([state])  # as the next phase of a run may
    shutil.rmtree(folder)
    (tmp_path / "other").rename(folder)
    other = train_batches(data(str(folder)), TOKENIZER, ADAPTERS, seed=0)
    with pytest.raises(
        UserError, match=r"has the scores of another model \(runs/other, step 9\) than at the checkpoint"
    ):
        other.set_state([state])


def test_examples_that_change_in_every_epoch_have_no_scores(folder):
    tasks = {"a": Task(Given(()), transform=(WordSwap(),))}
    with pytest.raises(
        SpecError, match=r"tasks\['a'\] has WordSwap, which changes its examples in every epoch, but scores"
    ):
        data(folder).replace(tasks=tasks)
    with pytest.raises(SpecError, match="scores is {'preference': 'x'}: it must be named differently from all labels"):
        data(folder).replace(scores={"preference": "x"})


def test_a_record_that_was_unusable_is_one_in_training(tmp_path):
    writer = ScoresWriter(tmp_path / "scores", manifest())
    for task, number in writer.missing():
        chosen = writer.manifest.examples(task, number)
        found = [None if i == 2 else (digest(EXAMPLES[i], row_of(i)), records_of(i)) for i in chosen]
        writer.write(task, number, found)
    writer.finish()
    assert writer.counts()["skipped"] == 1
    given = data(str(tmp_path / "scores"), on_bad_record="skip")
    batches = train_batches(given, TOKENIZER, ADAPTERS, seed=0)
    for _ in range(6):
        next(batches)
    assert set(batches.skipped) == {"not scored"}


def test_fingerprints_tell_tokenizers_apart():
    tokenizers = [Bytes(), Bytes(multiple=64), SpecialTokens(Bytes(), ("a",)), SpecialTokens(Bytes(), ("b",))]
    assert len({one.build().fingerprint for one in tokenizers}) == 4
    assert Bytes().build().fingerprint == TOKENIZER.fingerprint
