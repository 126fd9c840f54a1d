"""Pairs of answers: how they lie in rows, which are refused, and the folder that gives them."""

import dataclasses
import json

import numpy as np
import pytest

from given_examples import Given
from polygpt.data.augment import Augment
from polygpt.data.check import check
from polygpt.data.example import Example, Medium, Text
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.loader import DataSpec, Task, train_batches
from polygpt.data.packing import POSITION_ARRAYS, Packer
from polygpt.data.sources.folder import MediaFolder
from polygpt.errors import BadRecord
from polygpt.sequence import FIRST
from polygpt.sequence import check as check_batch

LAYOUT = LayoutSpec(seq_len=40, pairs=True)


def pair(small, *prompt, chosen="yes", rejected="never"):
    parts = Text("is it?", 0.0), Medium("image", small.png(3)), *prompt, Text(chosen)
    return Example(parts, "the record", rejected=rejected)


def laid_out(small, example, layout=LAYOUT, **options):
    return lay_out(example, layout, small.tokenizer, small.adapters, **options)


@pytest.mark.parametrize("fusion", ["interleaved", "prefix"])
def test_the_answers_are_two_segments_that_share_the_media_of_their_prompt(small, fusion):
    layout = LAYOUT.replace(fusion=fusion, prompt_span="bidirectional")
    example = pair(small, Text(" say", 0.0))
    row = laid_out(small, example, layout)
    alone = [laid_out(small, one, layout.replace(pairs=False)) for one in (example, example.with_rejected)]
    assert len(row.media["image"]) == 1
    for name in set(POSITION_ARRAYS) - {"segment", "weight"}:
        both = np.concatenate([getattr(one, name) for one in alone])
        np.testing.assert_array_equal(getattr(row, name), both, err_msg=name)
    lengths = [len(one) for one in alone]
    np.testing.assert_array_equal(row.segment, np.repeat([1, 2], lengths))
    np.testing.assert_array_equal(row.weight, np.concatenate([alone[0].weight, np.zeros(lengths[1])]))
    signs = np.concatenate([alone[0].weight > 0, -1 * (alone[1].weight > 0)])
    np.testing.assert_array_equal(np.sign(row.extra["preference"]), signs)
    assert [np.sum(signs == sign) for sign in (1, -1)] == [len("yes") + 1, len("never") + 1]
    (first,) = np.flatnonzero(row.extra["preference"] == FIRST)
    assert first == np.flatnonzero(signs == 1)[0], "where the pair is counted"


def test_a_weight_on_prompts_marks_no_answer(small):
    plain, weighted = (laid_out(small, pair(small), prompt_weight=weight) for weight in (0.0, 0.5))
    np.testing.assert_array_equal(weighted.extra["preference"], plain.extra["preference"])
    assert np.sum(weighted.weight == 0.5) == len("is it?") and not np.any(weighted.weight[weighted.segment == 2])


@dataclasses.dataclass(frozen=True)
class Noisy(Augment):
    """Adds noise."""

    modality = "image"
    stage = "features"

    def __call__(self, array, rng):
        return array + rng.normal(size=array.shape).astype(np.float32)


def test_a_medium_is_augmented_once_for_both_answers(small):
    given = {"rng": np.random.default_rng(0), "augment": (Noisy(),)}
    row = laid_out(small, pair(small), **given)
    alone = laid_out(small, pair(small), LAYOUT.replace(pairs=False), **given | {"rng": np.random.default_rng(0)})
    np.testing.assert_array_equal(row.media["image"][0][0], alone.media["image"][0][0])


def test_pairs_are_packed_with_preferred_answers_in_odd_segments(small):
    packer = Packer(1, 80, small.adapters, packing=True)
    rows = [laid_out(small, pair(small, chosen=chosen)) for chosen in ("a", "bc")]
    assert all(packer.add(row) for row in rows)
    batch = packer.batch()
    check_batch(batch, small.tokenizer.vocabulary, small.positions)
    marks = batch.extra["preference"][0]
    assert marks.dtype == np.int32 and not marks[len(rows[0]) + len(rows[1]) :].any()
    for segment, (sign, count) in enumerate([(1, 2), (-1, 6), (1, 3), (-1, 6)], start=1):
        here = marks[(batch.segment_BT[0] == segment) & (marks != 0)]
        np.testing.assert_array_equal(here, [FIRST if sign > 0 else sign, *[sign] * (count - 1)])


def test_examples_that_are_no_pairs_stand_beside_pairs_where_their_task_says_so(small):
    plain = pair(small, rejected=None)
    row = laid_out(small, plain, paired=False)
    expected = laid_out(small, plain, LAYOUT.replace(pairs=False))
    for name in POSITION_ARRAYS:
        np.testing.assert_array_equal(getattr(row, name), getattr(expected, name), err_msg=name)
    assert not row.extra["preference"].any() and laid_out(small, pair(small), paired=False).segment.max() == 2
    tasks = {"pairs": Task(Given((pair(small),))), "single": Task(Given((plain,)), paired=False)}
    data = DataSpec(tasks, LAYOUT.replace(seq_len=96), batch_size=2)
    batch = next(train_batches(data, small.tokenizer, small.adapters, seed=0))
    marked = [(batch.extra["preference"][0][batch.segment_BT[0] == segment] == FIRST).sum() for segment in (1, 2, 3, 4)]
    assert sorted(marked) == [0, 0, 0, 1] or sorted(marked) == [0, 0, 1, 1]
    found = check(data, small.tokenizer, small.adapters)
    assert {name: (one.paired, len(one.lengths)) for name, one in found.items()} == {"pairs": (1, 1), "single": (0, 1)}
    with pytest.raises(BadRecord, match="no rejected answer.*or set `paired` of its task to false"):
        data = data.replace(tasks={"single": Task(Given((plain,)))})
        next(train_batches(data, small.tokenizer, small.adapters, seed=0))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rejected": None}, "the record: no rejected answer: a pair has two"),
        ({"rejected": " "}, "the record: no rejected answer"),
        ({"chosen": " "}, "the record: no preferred answer"),
        ({"rejected": "yes"}, "the record: equal answers: the preferred and the rejected one are both 'yes'"),
        ({"rejected": "no" * 20}, r"too long: \d+ positions, a row of the layout has 40"),
    ],
)
def test_what_is_no_pair_is_refused(changes, words, small):
    with pytest.raises(BadRecord, match=words):
        laid_out(small, pair(small, **changes))


ROW = {"prompt": "Is it? ", "chosen": "yes", "rejected": "no"}


@pytest.fixture
def folder(tmp_path):
    def write(row, **fields):
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        return MediaFolder(str(tmp_path), **fields).open()[0]

    return write


def test_a_folder_gives_pairs(folder):
    example = folder(ROW | {"file_name": "a.png"}, text_placeholders=True)
    medium, *texts = example.parts
    assert medium.modality == "image" and texts == [Text("Is it? ", 0.0), Text("yes", 1.0)]
    assert example.rejected == "no" and example.with_rejected.parts == (medium, Text("Is it? ", 0.0), Text("no", 1.0))


@pytest.mark.parametrize(
    "row, words",
    [
        ({"chosen": "yes"}, "line 1: no rejected answer"),
        ({"rejected": "no"}, "line 1: no preferred answer"),
        (ROW | {"rejected": "yes"}, "line 1: equal answers"),
        (ROW | {"text": "yes"}, "line 1: malformed metadata: both text and chosen"),
        (ROW | {"rejected": 3}, "line 1: malformed metadata: rejected is 3: it must be a string"),
    ],
)
def test_a_folder_refuses_what_is_no_pair(row, words, folder):
    with pytest.raises(BadRecord, match=words):
        folder(row)
