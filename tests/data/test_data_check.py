"""Walking a dataset: every fault is found, none is raised, the rest is counted."""

import json

import numpy as np
import pytest

from polygpt.data.check import check
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.loader import DataSpec, Task
from polygpt.data.sources.folder import MediaFolder
from polygpt.errors import BadRecord, UserError


def test_faults_and_lengths_of_every_task(small):
    layout = LayoutSpec(seq_len=64)
    tasks = {"clean": Task(small.source(9)), "dirty": Task(small.source(20, bad=4))}
    calls = []
    found = check(
        DataSpec(tasks, layout, batch_size=2), small.tokenizer, small.adapters, lambda *call: calls.append(call)
    )
    assert calls == [("clean", i + 1, 9) for i in range(9)] + [("dirty", i + 1, 20) for i in range(20)]
    assert found["clean"].faults == () and found["clean"].records == 9
    assert [fault.place for fault in found["dirty"].faults] == [f"example {i}" for i in (0, 4, 8, 12, 16)]
    assert found["dirty"].reasons == {"made up": 3, "too long": 2}
    rows = [lay_out(example, layout, small.tokenizer, small.adapters) for example in small.source(9).open()]
    np.testing.assert_array_equal(found["clean"].lengths, [len(row) for row in rows])
    np.testing.assert_array_equal(found["clean"].predicted, [(row.weight > 0).sum() for row in rows])
    assert found["clean"].media == {name: sum(len(row.media[name]) for row in rows) for name in small.adapters}
    summary = json.loads(json.dumps(found["dirty"].summary()))
    assert summary["records"] == 20 and summary["bad"] == {"made up": 3, "too long": 2}
    assert summary["positions"]["max"] == found["dirty"].lengths.max()


def test_prompts_count_as_predicted_where_they_have_a_weight(small):
    layout = LayoutSpec(seq_len=64)
    predicted = {}
    for weight in (0.0, 0.5):
        data = DataSpec({"mine": Task(small.source(9), prompt_weight=weight)}, layout, batch_size=2)
        predicted[weight] = check(data, small.tokenizer, small.adapters)["mine"].predicted
        rows = [
            lay_out(example, layout, small.tokenizer, small.adapters, prompt_weight=weight)
            for example in small.source(9).open()
        ]
        np.testing.assert_array_equal(predicted[weight], [(row.weight > 0).sum() for row in rows])
    assert predicted[0.5].sum() > predicted[0.0].sum()


def test_every_fault_of_a_folder_is_listed_with_its_line(small, tmp_path):
    (tmp_path / "good.png").write_bytes(small.png(0))
    (tmp_path / "torn.png").write_bytes(small.png(0)[:60])
    (tmp_path / "torn.flac").write_bytes(small.flac(0)[:200])
    rows = [
        {"file_name": "good.png", "text": "fine"},
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "torn.png", "text": "x"},
        {"file_name": "torn.flac", "text": "x"},
        {"file_name": "good.png", "text": ""},
        {"text": "x" * 100},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    data = DataSpec({"mine": Task(MediaFolder(str(tmp_path)))}, LayoutSpec(seq_len=64), batch_size=2)
    found = check(data, small.tokenizer, small.adapters)["mine"]
    reasons = ["missing file", "corrupt image", "corrupt audio", "empty text", "too long", "malformed JSON"]
    assert [fault.reason for fault in found.faults] == reasons
    for line, fault in enumerate(found.faults, start=2):
        assert isinstance(fault, BadRecord) and str(fault).startswith(f"{tmp_path}/metadata.jsonl, line {line}: ")
    assert len(found.lengths) == 1


def test_a_task_of_bad_records_alone_has_no_lengths(small):
    found = check(
        DataSpec({"bad": Task(small.source(3, bad=1))}, LayoutSpec(seq_len=64), 2), small.tokenizer, small.adapters
    )
    assert len(found["bad"].faults) == 3 and found["bad"].summary()["positions"] == {}


def test_the_record_is_named_at_which_a_source_fails(small):
    data = DataSpec({"faulty": Task(small.faulty_source())}, LayoutSpec(seq_len=64), 2)
    with pytest.raises(RuntimeError, match=r"FaultyExamples\[0\] raised KeyError: 'answer'.*BadRecord"):
        check(data, small.tokenizer, small.adapters)


def test_an_empty_source_is_named(small):
    with pytest.raises(UserError, match="task 'nothing'"):
        check(DataSpec({"nothing": Task(small.source(0))}, LayoutSpec(seq_len=64), 2), small.tokenizer, small.adapters)
