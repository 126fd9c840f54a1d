"""The loader: batches, sharding, exact resumption, bad records."""

import dataclasses
import json
import logging
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from polygpt import sequence
from polygpt.data.augment import Noise, RandomShift, SpecAugment
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import LOOKAHEAD, DataSpec, Task, example_batches, train_batches
from polygpt.data.packing import POSITION_ARRAYS
from polygpt.data.sources.text_files import TextFiles
from polygpt.errors import BadRecord, SpecError, UserError
from polygpt.spec import from_json, to_json

AUGMENT = (RandomShift(0.25), Noise(), SpecAugment(frequency_width=3, time_width=5))


def make_data(small, **changes):
    """Two tasks, one of them with bad records, packed and augmented."""
    tasks = {
        "clean": Task(small.source(23), weight=2.0, augment=AUGMENT),
        "dirty": Task(small.source(17, bad=4), augment=AUGMENT),
    }
    fields = {"tasks": tasks, "layout": LayoutSpec(seq_len=64), "batch_size": 4, "cache": 1, "on_bad_record": "skip"}
    return DataSpec(**(fields | changes))


def batches_of(small, data, **more):
    return train_batches(data, small.tokenizer, small.adapters, **({"seed": 7} | more))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(a, b):
    for name in POSITION_ARRAYS.values():
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert list(a.media) == list(b.media)
    for name in a.media:
        np.testing.assert_array_equal(a.media[name].features, b.media[name].features)
        np.testing.assert_array_equal(a.media[name].length_BN, b.media[name].length_BN)


def answers(batches, small):
    """The answers in the batches, as "answer 12" without what follows the number."""
    found = []
    for batch in batches:
        for tokens, segment, weight in zip(batch.target_BT, batch.segment_BT, batch.weight_BT, strict=True):
            for number in range(1, segment.max() + 1):
                text = small.tokenizer.decode(tokens[(segment == number) & (weight > 0)])
                found.append(text.rstrip("é"))
    return found


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_batches_satisfy_the_layout(small, packing):
    data = make_data(small, layout=LayoutSpec(seq_len=64, packing=packing, media_span="bidirectional"))
    batches = take(batches_of(small, data), 20)
    for batch in batches:
        assert batch.shape == (4, 64)
        sequence.check(batch, small.tokenizer.vocabulary, small.positions)
        assert (batch.segment_BT.max(axis=1) >= 1).all()
    assert (max(batch.segment_BT.max() for batch in batches) > 1) == packing


@pytest.mark.parametrize("packing", [True, False])
def test_packing_drops_and_repeats_nothing(small, packing):
    layout = LayoutSpec(seq_len=64, packing=packing)
    data = make_data(small, tasks={"clean": Task(small.source(40))}, layout=layout)
    iterator = batches_of(small, data)
    seen = answers(take(iterator, 60), small)
    drawn = iterator.get_state()["next"] - len(iterator.get_state()["waiting"])
    assert len(seen) == drawn
    counts = Counter(seen)
    epochs, rest = divmod(iterator.get_state()["next"], 40)
    assert epochs >= 3
    waiting = LOOKAHEAD if packing else 0
    assert all(epochs - waiting <= counts[f"answer {i}"] <= epochs + 1 for i in range(40))
    assert sum(counts.values()) >= epochs * 40 + rest - waiting
    if not packing:  # in the order of the stream
        assert sorted(seen[:40]) == sorted(f"answer {i}" for i in range(40))
        assert seen[40:80] != seen[:40] and sorted(seen[40:80]) == sorted(seen[:40])


def test_packing_fills_rows(small):
    data = make_data(small, layout=LayoutSpec(seq_len=256), tasks={"clean": Task(small.source(40))}, batch_size=2)
    data = dataclasses.replace(data)
    adapters = {name: dataclasses.replace(a, items=16) for name, a in small.adapters.items()}
    filled = [
        (batch.segment_BT > 0).mean() for batch in take(train_batches(data, small.tokenizer, adapters, seed=0), 20)
    ]
    assert np.mean(filled) > 0.93


def test_grain_is_imported_before_a_thread_reads(tmp_path):
    (tmp_path / "a.txt").write_text("a text " * 99)
    code = """
import sys
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task, train_batches
from polygpt.data.sources.text_files import TextFiles
from polygpt.data.tokenizers.bytes import Bytes
data = DataSpec({"text": Task(TextFiles(["a.txt"]))}, LayoutSpec(seq_len=1024), batch_size=1)
assert "grain" not in sys.modules
train_batches(data, Bytes().build(), {}, seed=0)
assert "grain" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_the_stream_repeats_itself_and_the_seed_changes_it(small):
    data = make_data(small)
    first, again = take(batches_of(small, data), 8), take(batches_of(small, data), 8)
    for a, b in zip(first, again, strict=True):
        assert_equal(a, b)
    assert answers(take(batches_of(small, data, seed=8), 8), small) != answers(first, small)


def test_an_augmentation_of_a_modality_that_the_model_lacks_is_refused(small):
    data = DataSpec({"clean": Task(small.source(5), augment=AUGMENT)}, LayoutSpec(seq_len=64), batch_size=2)
    with pytest.raises(
        UserError, match="task 'clean': Noise needs an adapter for audio: the model's adapters are image"
    ):
        train_batches(data, small.tokenizer, {"image": small.adapters["image"]}, seed=0)


def test_augmentation_differs_between_epochs_and_cache_and_position_do_not_matter(small):
    tasks = {"clean": Task(small.source(5), augment=AUGMENT)}
    data = make_data(small, tasks=tasks, layout=LayoutSpec(seq_len=64, packing=False), batch_size=5)
    cached, plain = batches_of(small, data), batches_of(small, data.replace(cache=0))
    epochs = take(cached, 3)
    for a, b in zip(epochs, take(plain, 3), strict=True):
        assert_equal(a, b)
    sounds = [epoch.media["audio"].features[epoch.media["audio"].length_BN > 0] for epoch in epochs]
    assert all(len(sound) == len(sounds[0]) > 0 for sound in sounds)
    assert not any((sounds[1] == clip).all(axis=(1, 2)).any() for clip in sounds[0])


def test_feeders_have_disjoint_rows_of_the_batch(small):
    tasks = {"clean": Task(small.source(40))}
    data = make_data(small, tasks=tasks, layout=LayoutSpec(seq_len=64, packing=False))
    parts = [batches_of(small, data, data_shard=p, data_shards=2) for p in range(2)]
    epoch = [answers(take(part, 10), small) for part in parts]  # 2 rows a data shard, 40 examples
    assert not set(epoch[0]) & set(epoch[1])
    assert sorted(epoch[0] + epoch[1]) == sorted(answers(take(batches_of(small, data), 10), small))
    with pytest.raises(UserError, match="data.batch_size is 4: it must be a multiple of the 3 data shards"):
        batches_of(small, data, data_shard=0, data_shards=3)


# --- resumption -------------------------------------------------------------------------------------------------------


def resumes_exactly(small, data, count, every):
    iterator = batches_of(small, data)
    states, expected = [], []
    for _ in range(count):
        states.append(json.dumps(iterator.get_state()))
        expected.append(next(iterator))
    skipped = iterator.skipped
    iterator.close()
    assert skipped["made up"] > 0 and skipped["too long"] > 0
    assert any(json.loads(state)["waiting"] for state in states)
    assert max(map(len, states)) < 300
    restored = batches_of(small, data)
    for start in range(0, count, every):
        restored.set_state([json.loads(states[start])])
        assert json.dumps(restored.get_state()) == states[start]
        for batch in expected[start:]:
            assert_equal(next(restored), batch)
        assert restored.skipped == skipped
    restored.close()
    return expected


def test_every_batch_can_be_resumed_from_to_the_bit(small):
    resumes_exactly(small, make_data(small), count=20, every=1)


@pytest.mark.slow
def test_workers_change_nothing_and_resume_to_the_bit(small):
    expected = take(batches_of(small, make_data(small)), 20)
    for a, b in zip(resumes_exactly(small, make_data(small, workers=1), count=20, every=13), expected, strict=True):
        assert_equal(a, b)


def test_a_new_iterator_is_restored_like_a_used_one(small):
    data = make_data(small)
    iterator = batches_of(small, data)
    take(iterator, 5)
    state = iterator.get_state()
    expected = take(iterator, 3)
    fresh = batches_of(small, data)
    fresh.set_state([state])
    for a, b in zip(take(fresh, 3), expected, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"clean": 24, "dirty": 17}, "task 'clean' had 23 examples and now has 24"),
        ({"clean": 23}, "task 'dirty' had 17 examples and now has 0"),
        ({"clean": 23, "dirty": 17, "new": 5}, "task 'new' had 0 examples and now has 5"),
    ],
)
def test_data_that_changed_is_refused(small, change, words):
    state = json.loads(json.dumps(batches_of(small, make_data(small)).get_state()))
    tasks = {name: Task(small.source(count)) for name, count in change.items()}
    with pytest.raises(
        UserError, match=f"^{words}: the data changed since the checkpoint; .*use another workdir"
    ) as caught:
        batches_of(small, make_data(small, tasks=tasks)).set_state([state])
    assert "\n" not in str(caught.value)


def waits_for_a_file_that_is_gone(small, folder, on_bad_record):
    """A restored iterator's state, one of whose examples waited to be packed and has lost its file."""
    (folder / "lines.txt").write_text("".join(f"{'x' * (20 + 7 * (i % 6))}\n" for i in range(30)))
    source = TextFiles((str(folder / "lines.txt"),), unit="line")
    data = make_data(small, tasks={"lines": Task(source)}, on_bad_record=on_bad_record)
    iterator = batches_of(small, data)
    next(iterator)
    state = iterator.get_state()
    assert state["waiting"]
    fresh = batches_of(small, data)
    (folder / "lines.txt").unlink()
    return fresh, state


def test_a_waiting_example_whose_file_is_gone_is_skipped(small, tmp_path):
    iterator, state = waits_for_a_file_that_is_gone(small, tmp_path, "skip")
    iterator.set_state([state])
    assert iterator.skipped == {"missing file": len(state["waiting"])}
    assert iterator.get_state()["waiting"] == []


def test_a_waiting_example_whose_file_is_gone_is_raised(small, tmp_path):
    iterator, state = waits_for_a_file_that_is_gone(small, tmp_path, "raise")
    with pytest.raises(BadRecord, match="lines.txt, line [0-9]+: missing file"):
        iterator.set_state([state])


# --- bad records ------------------------------------------------------------------------------------------------------


def test_bad_records_are_raised_by_default(small):
    iterator = batches_of(small, make_data(small, on_bad_record="raise"))
    with pytest.raises(BadRecord, match="^example [0-9]+: (made up|too long).*data check.*on_bad_record=skip"):
        take(iterator, 20)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_record_is_named_at_which_a_source_fails(small, workers):
    iterator = batches_of(small, make_data(small, tasks={"faulty": Task(small.faulty_source())}, workers=workers))
    with pytest.raises(RuntimeError, match=r"FaultyExamples\[[0-9]\] raised KeyError: 'answer'"):
        next(iterator)
    iterator.close()


def test_skipped_records_are_counted_and_logged_by_reason(small, caplog):
    tasks = {"dirty": Task(small.source(20, bad=4))}
    iterator = batches_of(
        small, make_data(small, tasks=tasks, layout=LayoutSpec(seq_len=64, packing=False), batch_size=15)
    )
    with caplog.at_level(logging.WARNING, logger="polygpt.data.loader"):
        batch = next(iterator)  # 15 good ones of 20
        assert sum(iterator.skipped.values()) <= 5
        seen = answers([batch], small)
        take(iterator, 9)
    assert sorted(seen) == sorted(f"answer {i}" for i in range(20) if i % 4)
    assert iterator.skipped["made up"] >= 27 and iterator.skipped["too long"] >= 18
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 10  # five of each reason
    assert any(message.startswith("skipped example 0: made up") for message in messages)


def test_a_source_of_bad_records_alone_ends_with_an_error(small):
    iterator = batches_of(small, make_data(small, tasks={"bad": Task(small.source(6, bad=1))}))
    with pytest.raises(UserError, match=r"^6 unusable records in a row \((made up|too long) 3, "):
        next(iterator)


def test_an_empty_source_is_named(small):
    with pytest.raises(UserError, match="task 'nothing': its source SmallSource has no examples"):
        batches_of(small, make_data(small, tasks={"nothing": Task(small.source(0))}))


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_evaluation_has_every_example_once_in_order(small):
    examples = small.source(7).open()
    layout = LayoutSpec(seq_len=64)
    batches = list(example_batches(examples, layout, small.tokenizer, small.adapters, batch_size=3))
    assert [len(some) for _, some in batches] == [3, 3, 1]
    assert [example for _, some in batches for example in some] == list(examples)
    for batch, some in batches:
        sequence.check(batch, small.tokenizer.vocabulary, small.positions)
        assert batch.shape == (3, 64)
        assert (batch.segment_BT.max(axis=1) == [1] * len(some) + [0] * (3 - len(some))).all()
        assert answers([batch], small) == [example.answer.rstrip("é") for example in some]


def test_specs_round_trip_and_check_their_fields(small):
    data = make_data(small)
    assert dataclasses.asdict(from_json(to_json(data.layout))) == dataclasses.asdict(data.layout)
    for fields in ({"batch_size": 0}, {"workers": -1}, {"cache": -1}, {"tasks": {}}):
        with pytest.raises(SpecError, match=f"DataSpec.{next(iter(fields))} is"):
            make_data(small, **fields)
    with pytest.raises(SpecError, match="Task.weight is 0"):
        Task(small.source(3), weight=0)


# --- loss on prompts --------------------------------------------------------------------------------------------------


def test_prompts_of_a_task_count_in_training_as_it_says(small):
    """Each position that is followed by a text counts: those of prompts with the task's weight, answers with theirs."""
    layout = LayoutSpec(seq_len=64, packing=False)
    plain = make_data(small, tasks={"clean": Task(small.source(23))}, layout=layout)
    weighted = plain.replace(tasks={"clean": Task(small.source(23), prompt_weight=0.25)})
    for before, after in zip(take(batches_of(small, plain), 5), take(batches_of(small, weighted), 5), strict=True):
        follows = (before.modality_BT[:, 1:] == sequence.TEXT) & (before.segment_BT[:, 1:] > 0)
        expected = np.where(follows, np.where(before.weight_BT[:, :-1] > 0, before.weight_BT[:, :-1], 0.25), 0)
        np.testing.assert_array_equal(after.weight_BT[:, :-1], expected)
        assert (after.weight_BT == 0.25).any()
        assert_equal(after.replace(weight_BT=before.weight_BT), before)


def test_a_prompt_that_sees_itself_is_not_to_be_predicted(small):
    tasks = {"clean": Task(small.source(23), prompt_weight=1.0)}
    with pytest.raises(SpecError, match=r"tasks\['clean'\].prompt_weight is 1.0: it must be 0 if layout.prompt_span"):
        make_data(small, tasks=tasks, layout=LayoutSpec(64, prompt_span="bidirectional"))
    with pytest.raises(SpecError, match="Task.prompt_weight is -1.0"):
        Task(small.source(23), prompt_weight=-1)


@pytest.mark.parametrize("weight", [2.0, 0.25], ids=["the same mixture", "another mixture"])
def test_each_task_goes_on_where_it_was_under_other_settings(small, weight):
    def data(weight, **changes):
        tasks = {"clean": Task(small.source(23), weight=weight), "other": Task(small.source(17))}
        return make_data(small, tasks=tasks, log_examples=True, **changes)

    before, after = data(2.0), data(weight, layout=LayoutSpec(seq_len=96), batch_size=2)

    def seen(batches, count):
        found = []
        for _ in range(count):
            next(batches)
            found += batches.last_examples
        return found

    batches = batches_of(small, before)
    first = seen(batches, 4)
    state = json.loads(json.dumps(batches.get_state()))
    assert state["waiting"]
    following = batches.under(after, small.adapters)
    following.set_state([state])
    later = seen(following, 12)
    assert next(following).shape == (2, 96)
    still_waiting = len(following.get_state()["waiting"])
    for task in ("clean", "other"):
        positions = sorted(position for name, position, _ in first + later if name == task)
        whole = set(range(max(positions) + 1)) - set(positions)
        assert len(positions) == len(set(positions)) and len(whole) <= still_waiting
    share = sum(name == "clean" for name, _, _ in later) / len(later)
    assert share == pytest.approx(weight / (1 + weight), abs=0.15)
    again = batches_of(small, after)
    again.set_state([state])
    assert seen(again, 12) == later
