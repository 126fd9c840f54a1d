"""The smallest settings that take a share of the records: ranks, measures, and that what they say is so."""

import json
import math
import operator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.image import ImageAdapter
from polygpt.data.check import check, fitting
from polygpt.data.fit import LONGEST, columns, smallest
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task, train_batches
from polygpt.data.media.audio import LogMel
from polygpt.data.media.image import ImageFeatures
from polygpt.data.sources.folder import MediaFolder
from polygpt.models.multimodal import ModelSpec
from polygpt.overrides import override

SOUND = LogMel(seconds=0.5, rate=8000, mels=16)
ADAPTERS = {"image": ImageAdapter(ImageFeatures(8, 8), items=1, patch=4), "audio": AudioAdapter(SOUND, items=2)}


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=30),
    st.sampled_from([0.5, 0.9, 0.95, 1.0]),
)
def test_bounds_are_those_of_the_lowest_quantile_that_takes_the_share(needs, share):
    enough = math.ceil(round(share * len(needs), 6))
    for rank in range(enough, len(needs) + 1):
        bounds = []
        for column in zip(*needs, strict=True):
            some = sorted(value for value in column if value)
            bounds.append(some[math.ceil(Fraction(rank, len(needs)) * len(some)) - 1] if some else 0)
        taken = [record for record in needs if all(map(operator.le, record, bounds))]
        if len(taken) >= enough:
            break
    expected = [max(column) for column in zip(*taken, strict=True)]
    assert smallest(np.array(needs), share).tolist() == expected


def test_a_rare_modality_keeps_its_share():
    needs = np.array([[10 + i, 1 if i == 3 else 0] for i in range(100)])
    assert smallest(needs, 0.95).tolist() == [104, 1]


@pytest.fixture
def folder(tmp_path, small):
    """20 records: texts of 1 to 18 bytes, one of 100 bytes with three pictures, one with a recording of 1.3 s."""
    (tmp_path / "p.png").write_bytes(small.png(0))
    for name, seconds in {"short.wav": 0.3, "long.wav": 1.3, "endless.wav": LONGEST + 1}.items():
        soundfile.write(tmp_path / name, np.sin(np.arange(round(seconds * 8000)) / 5) / 3, 8000)
    rows = [{"text": "x" * n} for n in range(1, 18)]
    rows += [{"file_names": ["p.png"] * 3, "text": "y" * 100}, {"file_name": "long.wav", "text": "z"}]
    rows += [{"file_names": ["short.wav"] * 2, "text": "z"}]

    def write(*more):
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*rows, *more])))
        return MediaFolder(str(tmp_path))

    return write


def found(source, tokenizer, adapters=ADAPTERS, **layout):
    layout = LayoutSpec(**{"seq_len": 32, **layout})
    return check(DataSpec({"mine": Task(source)}, layout, batch_size=2), tokenizer, adapters)


def test_what_each_record_needs(folder, small):
    findings = found(folder(), small.tokenizer)["mine"]
    assert columns(ADAPTERS) == ["length", "image.items", "audio.items", "audio.seconds"]
    assert [fault.reason for fault in findings.faults] == ["too many media", "too long"]
    assert findings.media == {"image": 0, "audio": 2}
    plain, pictures, long, short = findings.needs[:17], *findings.needs[17:]
    np.testing.assert_array_equal(plain, [[n + 2, 0, 0, 0] for n in range(1, 18)])
    np.testing.assert_array_equal(pictures, [100 + 2 + 3 * 4, 3, 0, 0])
    # Frames of 160 samples, two to a position; the bound on seconds is a hop above the duration at most.
    np.testing.assert_allclose(long, [3 + math.ceil(1.3 * 8000 / 160 / 2), 0, 1, 1.3 + 0.02])
    np.testing.assert_allclose(short, [3 + 2 * math.ceil(0.3 * 8000 / 160 / 2), 0, 2, 0.3 + 0.02])


@pytest.mark.parametrize("share", [0.9, 1.0])
def test_the_settings_take_what_they_say(folder, small, share):
    source = folder({"file_name": "endless.wav", "text": "z"}, {"file_name": "gone.png", "text": "z"})
    wanted, left_out = fitting(found(source, small.tokenizer), ADAPTERS, share, {"mine": "data.layout.seq_len"})
    assert left_out == {"mine"}  # no setting takes the two last
    changed = dict(ADAPTERS)
    for field, value in wanted.items():
        if field.startswith("model.adapters."):
            name, field = field.removeprefix("model.adapters.").split(".", 1)
            changed[name] = override(changed[name], {field: str(value)})
    after = found(source, small.tokenizer, changed, seq_len=wanted.get("data.layout.seq_len", 32))["mine"]
    assert len(after.lengths) == 20 * share
    if share == 1:
        assert wanted == {
            **{"data.layout.seq_len": 120, "model.adapters.image.items": 3},
            "model.adapters.audio.features.seconds": 1.32,
        }
        assert fitting(found(folder(), small.tokenizer), ADAPTERS, 1.0, {"mine": "data.layout.seq_len"}) == (
            wanted,
            set(),
        )


def test_rows_are_shortened_where_they_hold_one_example_each(folder, small):
    lengths = {"mine": "evaluation.tasks.mine.seq_len"}
    for packing, wanted in ((True, {}), (False, {"evaluation.tasks.mine.seq_len": 120})):
        findings = found(folder(), small.tokenizer, seq_len=500, packing=packing)
        settings, _ = fitting(findings, ADAPTERS, 1.0, lengths)
        assert {name: value for name, value in settings.items() if name.endswith("seq_len")} == wanted


def test_each_task_keeps_its_share(folder, small):
    data = DataSpec({"large": Task(small.source(400)), "mine": Task(folder())}, LayoutSpec(seq_len=32), batch_size=2)
    both = check(data, small.tokenizer, {**ADAPTERS, "image": small.adapters["image"]})
    settings, left_out = fitting(both, ADAPTERS, 1.0, dict.fromkeys(both, "data.layout.seq_len"))
    assert settings["data.layout.seq_len"] == 120 and left_out == set()


def test_records_that_no_setting_takes(small, tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\n')
    findings = found(MediaFolder(str(tmp_path)), small.tokenizer)
    assert fitting(findings, ADAPTERS, 1.0, {"mine": "data.layout.seq_len"}) == ({}, {"mine"})


@pytest.mark.parametrize(
    "rows, items, most",
    [
        ([{"file_name": "p.png", "text": "a grey heron"}], {"image": 7, "audio": 1}, 126),
        ([{"file_names": ["p.png"] * 2, "text": "a grey heron"}], {"image": 12, "audio": 1}, 5 * 22),
        ([{"file_name": "short.wav", "text": "busy"}], {"audio": 9}, 126),
        ([{"text": "a grey heron"}], {"audio": 1}, 126),
    ],
    ids=["pictures", "pairs", "recordings", "text"],
)
def test_packed_rows_take_as_many_items_as_fill_them_and_unused_towers_one(folder, small, rows, items, most):
    """Records of 18 positions with a picture of 4, of 22 with two, of 14 with 8 of a recording or with text alone."""
    source = folder()
    path = Path(source.path, "metadata.jsonl")
    path.write_text("\n".join(map(json.dumps, rows * 3)))
    data = DataSpec({"own": Task(source)}, LayoutSpec(seq_len=128), 2)
    settings, _ = fitting(check(data, small.tokenizer, ADAPTERS), ADAPTERS, 1.0, {"own": "data.layout.seq_len"})
    expected = {f"model.adapters.{name}.items": count for name, count in items.items()}
    assert {name: value for name, value in settings.items() if name.endswith("items")} == expected
    chosen = override(
        ModelSpec(adapters=ADAPTERS), {name.removeprefix("model."): str(n) for name, n in settings.items()}
    )
    batch = next(train_batches(data, small.tokenizer, chosen.adapters, seed=0))
    assert np.count_nonzero(batch.segment_BT) == 2 * most
