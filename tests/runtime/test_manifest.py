"""The manifest: whatever is not as it was written is found, and named."""

import json
import shutil

import pytest

from polygpt.runtime.manifest import NAME, Damaged, Incomplete, Record, read, records, seal, survey, verify

RECORD = Record(40, 1.5, True)


@pytest.fixture
def place(tmp_path):
    place = tmp_path / "40"
    for name, content in {"params/d/a": b"123456789", "params/_METADATA": b"{}", "optimizer/d/b": bytes(5000)}.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    seal(place, RECORD, processes=3)
    return place


def fault(place, **options):
    with pytest.raises(Damaged) as raised:
        verify(place, **options)
    return str(raised.value)


def test_it_lists_every_file_with_its_size_and_crc_32(place):
    found = read(place)
    assert (found.record, found.processes) == (RECORD, 3)
    assert found.files["params/d/a"] == (9, 0xCBF43926)  # the check value of CRC-32 (ISO 3309)
    assert found.files["params/_METADATA"][0] == 2 and found.files["optimizer/d/b"][0] == 5000
    assert set(found.files) == {"params/d/a", "params/_METADATA", "optimizer/d/b"}
    verify(place)


@pytest.mark.parametrize("name", ["params/d/a", "optimizer/d/b"])
def test_a_flipped_bit_a_cut_an_end_too_many_and_a_deletion_are_named(place, name):
    path, content = place / name, (place / name).read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fault(place) == f"{name} is not as it was written"
    path.write_bytes(content[:-1])
    assert fault(place) == f"{name} has {len(content) - 1:,} bytes of {len(content):,}"
    path.write_bytes(content + b" ")
    assert fault(place) == f"{name} has {len(content) + 1:,} bytes of {len(content):,}"
    path.unlink()
    assert fault(place) == f"{name} is missing"
    path.mkdir()
    assert name in fault(place)


def test_each_bit_of_the_manifest_itself_counts(place):
    path = place / NAME
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 7):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(Damaged, match=f"^{NAME} is not as it was written"):
            read(place)
    path.write_bytes(content[:100])
    assert fault(place) == f"{NAME} is not as it was written"
    path.unlink()
    path.mkdir()
    assert fault(place) == f"{NAME} cannot be read: Is a directory"


def test_without_a_manifest_it_is_half_written(place):
    (place / NAME).unlink()
    with pytest.raises(Incomplete, match="incomplete, without manifest.json"):
        read(place)


def test_a_manifest_of_another_step_is_none_of_this(place):
    place.rename(place.with_name("41"))
    assert "is not as it was written" in fault(place.with_name("41"))


def test_of_parts_that_are_not_read_the_sizes_alone_are_compared(place):
    (place / "optimizer/d/b").write_bytes(bytes(4999) + b"x")
    verify(place, items=("params",))
    assert "optimizer/d/b" in fault(place)
    (place / "optimizer/d/b").write_bytes(b"")
    assert fault(place, items=("params",)) == "optimizer/d/b has 0 bytes of 5,000"


def test_shares_together_see_every_file(place):
    shutil.rmtree(place / "params")
    found = []
    for i in range(3):
        try:
            verify(place, share=(i, 3))
        except Damaged as damage:
            found.append(str(damage))
    assert sorted(found) == ["params/_METADATA is missing", "params/d/a is missing"]


def test_many_faults_are_counted(tmp_path):
    place = tmp_path / "1"
    place.mkdir()
    for i in range(6):
        (place / f"file{i}").write_bytes(b"x")
    seal(place, Record(1, None, False), 1)
    for path in place.glob("file*"):
        path.unlink()
    assert fault(place) == "file0 is missing, file1 is missing, file2 is missing and 3 more"


def test_a_folder_is_surveyed_in_the_order_of_steps(place):
    for step in (5, 100):
        shutil.copytree(place, place.with_name(str(step)), ignore=lambda *_: [NAME])
    seal(place.with_name("5"), Record(5, None, False), 1)
    (place.parent / "unusable-7").mkdir()
    found = dict(survey(place.parent))
    assert list(found) == [5, 40, 100]
    assert isinstance(found[100], Incomplete)
    assert records(place.parent) == [Record(5, None, False), RECORD]
    assert json.loads((place / NAME).read_text())["metric"] == 1.5
