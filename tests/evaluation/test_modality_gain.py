"""Media are exchanged as the modality gain needs it."""

import pytest

from polygpt.data.example import Example, Medium, Text
from polygpt.evaluation.modality_gain import count, modalities, shuffle


def example(i, images=1, audio=0):
    media = [Medium("image", f"i{i}.{n}".encode()) for n in range(images)]
    media += [Medium("audio", f"a{i}.{n}".encode()) for n in range(audio)]
    return Example((Text("look", 0.0), *media, Text(f"answer {i}")), f"record {i}")


def sources(example, modality):
    return [part.source for part in example.parts if isinstance(part, Medium) and part.modality == modality]


@pytest.mark.parametrize("n", [2, 3, 17])
@pytest.mark.parametrize("seed", range(5))
def test_no_example_keeps_its_own_medium_and_each_is_used_once(n, seed):
    examples = [example(i) for i in range(n)]
    indices, shuffled = shuffle(examples, "image", seed)
    assert indices == list(range(n))
    assert all(sources(a, "image") != sources(b, "image") for a, b in zip(examples, shuffled, strict=True))
    assert sorted(sources(e, "image") for e in shuffled) == sorted(sources(e, "image") for e in examples)


def test_texts_and_the_other_modality_stay_in_place():
    examples = [example(i, audio=1) for i in range(5)]
    _, shuffled = shuffle(examples, "audio", 0)
    for before, after in zip(examples, shuffled, strict=True):
        assert [p for p in before.parts if p not in after.parts] == [before.parts[2]]
        assert sources(before, "image") == sources(after, "image")
        assert before.answer == after.answer and before.prompt[:2] == after.prompt[:2]


def test_only_examples_with_equally_many_media_exchange_them():
    examples = [example(0), example(1, images=2), example(2), example(3, images=2), example(4, images=0, audio=1)]
    indices, shuffled = shuffle(examples, "image", 0)
    assert indices == [0, 1, 2, 3]
    assert [count(e, "image") for e in shuffled] == [1, 2, 1, 2]
    assert sources(shuffled[1], "image") == [b"i3.0", b"i3.1"]


def test_an_example_without_a_partner_takes_no_part():
    assert shuffle([example(0)], "image", 0) == ([], [])
    assert shuffle([example(0), example(1), example(2, images=3)], "image", 0)[0] == [0, 1]


def test_the_place_names_both_records():
    _, shuffled = shuffle([example(0), example(1)], "image", 0)
    assert shuffled[0].place == "record 0 with the image of record 1"


def test_modalities_in_the_order_of_first_sight():
    assert modalities([example(0, images=0), example(1, audio=1), example(2)]) == ["image", "audio"]
