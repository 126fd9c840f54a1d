"""Transformations in the pipeline: special tokens, loss weights, order of the stream, resumption, sources, errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_data import ADAPTERS, SmallSource, make_example
from test_loader import assert_equal, take

from polygpt import sequence
from polygpt.data.check import check
from polygpt.data.example import Example, Medium, Text
from polygpt.data.layout import LayoutSpec, lay_out, prompt_batch
from polygpt.data.loader import DataSpec, Task, train_batches
from polygpt.data.show import token_text
from polygpt.data.sources.text_files import TextFiles
from polygpt.data.sources.transformed import Transformed
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.data.tokenizers.special_tokens import SpecialTokens
from polygpt.data.transforms.base import Transform, transformed, units
from polygpt.data.transforms.deletion import Deletion
from polygpt.data.transforms.fill_in_the_middle import MIDDLE, PREFIX, SUFFIX, FillInTheMiddle
from polygpt.data.transforms.prefix_lm import PrefixLM
from polygpt.data.transforms.span_corruption import SpanCorruption
from polygpt.data.transforms.ul2 import UL2
from polygpt.errors import BadRecord, SpecError, UserError
from polygpt.models.multimodal import ModelSpec
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import Constant
from polygpt.spec import from_json, load_file, to_json
from polygpt.training.experiment import Experiment, TrainSpec

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FIM = FillInTheMiddle(0.5)
CORRUPT = SpanCorruption(0.3, 2.0, "character", sentinels=8)
TOKENIZER = SpecialTokens(Bytes(), (*FIM.special, *CORRUPT.special, "[R]", "[S]", "[X]"))
BUILT = TOKENIZER.build()
PLAIN = Bytes().build()


def stream(*transforms, **changes):
    tasks = {"some": Task(SmallSource(25), transform=transforms)}
    data = DataSpec(tasks, **({"layout": LayoutSpec(seq_len=96), "batch_size": 4} | changes))
    return train_batches(data, BUILT, ADAPTERS, seed=3)


# --- special tokens ---------------------------------------------------------------------------------------------------


def test_special_tokens_follow_the_ids_of_the_tokenizer():
    assert (BUILT.bos, BUILT.eos, BUILT.special_id(PREFIX)) == (256, 257, 258)
    assert list(BUILT.special.values()) == list(range(258, BUILT.vocabulary)) and BUILT.used == BUILT.vocabulary
    np.testing.assert_array_equal(BUILT.encode(PREFIX), PLAIN.encode(PREFIX))
    assert BUILT.decode([258, *BUILT.encode("aé"), 259]) == "aé" and not BUILT.token_bytes[256:].any()
    assert token_text(BUILT, 260) == MIDDLE and TOKENIZER.special[:3] == FIM.special
    assert from_json(to_json(TOKENIZER)) == TOKENIZER
    rounded = SpecialTokens(Bytes(), FIM.special, multiple=64).build()
    assert (rounded.vocabulary, rounded.used, rounded.special_id(MIDDLE)) == (320, 261, 260)
    within = SpecialTokens(SpecialTokens(Bytes(multiple=64), ("a",)), ("b",)).build()
    assert (within.vocabulary, within.used, within.special) == (320, 260, {"a": 258, "b": 259})


def test_a_special_token_that_the_tokenizer_lacks_is_named():
    row = Example((Text(PREFIX, 0.0, special=True), Text("a")), "a place")
    with pytest.raises(
        UserError, match=r"tokenizer has no special token '<\|fim_prefix\|>': add it with SpecialTokens"
    ):
        lay_out(row, LayoutSpec(8), PLAIN, {})
    for names in (("a", "a"), ("",)):
        with pytest.raises(SpecError, match="SpecialTokens.names is .*: it must be different, not empty, and new"):
            SpecialTokens(Bytes(), names)
    with pytest.raises(SpecError, match="SpecialTokens.names"):
        SpecialTokens(SpecialTokens(Bytes(), ("a",)), ("a",))


def test_an_experiment_says_which_special_tokens_its_tokenizer_lacks():
    tasks = {"some": Task(Transformed(SmallSource(25), (UL2(),)))}
    given = ("e", DataSpec(tasks, LayoutSpec(64), 2), Optim(Constant(1e-3)), TrainSpec(1), ModelSpec())
    with pytest.raises(SpecError, match=r"UL2 needs the special tokens '\[R\]' and 102 more, .* SpecialTokens\("):
        Experiment(*given)
    assert Experiment(*given, tokenizer=SpecialTokens(Bytes(), UL2().special))


# --- rows -------------------------------------------------------------------------------------------------------------


def test_weights_of_a_row_are_where_they_belong():
    given = Example((Text("1 2 ", 0.0), Text("abcdef")), "a place")
    fim = FillInTheMiddle(1.0, 0.0, middle=(2, 2))(given, np.random.default_rng(0))
    row = lay_out(fim, LayoutSpec(32), BUILT, {}, prompt_weight=0.5)
    said = [token_text(BUILT, int(target)) for target in row.target[:-1]]
    for text, weight in zip(said, row.weight[:-1], strict=True):
        expected = 0.0 if text in FIM.special else 0.5 if text in "1 2 " else 1.0
        assert weight == expected, text
    assert said[-1] == "<eos>" and sum(name in said for name in FIM.special) == 3
    corrupt = lay_out(CORRUPT(given, np.random.default_rng(0)), LayoutSpec(32), BUILT, {})
    said = [token_text(BUILT, int(target)) for target in corrupt.target[:-1]]
    first = np.flatnonzero(corrupt.weight)[0]
    assert said[first] == "<extra_id_0>" and corrupt.weight[first:-1].all() and not corrupt.weight[:first].any()


def test_what_is_read_is_seen_both_ways_and_what_is_predicted_is_not():
    layout = LayoutSpec(32, prompt_span="bidirectional")
    infill = FillInTheMiddle(1.0, context_weight=0.0, middle=(1, 2))
    for transform in (PrefixLM((0.5, 0.5), "character"), CORRUPT, infill):
        row = lay_out(transform(Example((Text("abcdefgh"),), ""), np.random.default_rng(1)), layout, BUILT, {})
        predicted = np.concatenate([[False], row.weight[:-1] > 0])
        assert predicted.any()
        np.testing.assert_array_equal(row.span > 0, ~predicted)


def test_a_prompt_for_an_infill_begins_like_the_row():
    example = FillInTheMiddle(1.0, 0.0, middle=(3, 3))(Example((Text("a house"),), ""), np.random.default_rng(0))
    row = lay_out(example, LayoutSpec(32), BUILT, {})
    batch = prompt_batch([example.parts[:-1]], LayoutSpec(32), BUILT, {})
    np.testing.assert_array_equal(batch.tokens_BT[0], row.tokens[: batch.shape[1]])


def test_words_keep_their_tokens_wherever_a_text_is_cut(tmp_path):
    from polygpt.data.tokenizers.bpe import train_bpe

    text = "the cat sat  on the mat,\n\nthe dog sat on the cat; who   sat?\n" * 30 + "größe  "
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = train_bpe([tmp_path / "text.txt"], 300, tmp_path / "bpe.json").build()
    some = units(text, "word")
    assert "".join(some) == text and "".join(units(" a b\n", "word")) == " a b\n"
    np.testing.assert_array_equal(np.concatenate([tokenizer.encode(one) for one in some]), tokenizer.encode(text))


# --- the stream -------------------------------------------------------------------------------------------------------

ALL = {"fim": (FIM,), "corrupt": (CORRUPT,), "two": (Deletion("all", 0.3), FillInTheMiddle(1.0))}


@pytest.mark.parametrize("transforms", ALL.values(), ids=ALL)
def test_batches_are_resumed_to_the_bit_and_satisfy_the_layout(transforms):
    iterator, states, expected = stream(*transforms), [], []
    for _ in range(6):
        states.append(json.loads(json.dumps(iterator.get_state())))
        expected.append(next(iterator))
        sequence.check(expected[-1], BUILT.vocabulary, {name: one.positions for name, one in ADAPTERS.items()})
    for start in (1, 4):
        again = stream(*transforms)
        again.set_state([states[start]])
        for batch in expected[start:]:
            assert_equal(next(again), batch)
    assert any((batch.tokens_BT >= 258).any() for batch in expected)


@pytest.mark.slow
def test_workers_change_no_byte():
    for transforms in ALL.values():
        plain, workers = stream(*transforms), stream(*transforms, workers=2)
        for a, b in zip(take(plain, 6), take(workers, 6), strict=True):
            assert_equal(a, b)
        workers.close()


def test_an_example_is_transformed_anew_in_each_epoch_and_never_across_examples():
    rows, alone = [], LayoutSpec(seq_len=96, packing=False)
    for batch in take(stream(FillInTheMiddle(1.0), layout=alone, batch_size=25), 2):
        pairs = zip(batch.tokens_BT, batch.weight_BT, strict=True)
        rows.append({tokens[weight > 0].tobytes() for tokens, weight in pairs})
        assert ((batch.tokens_BT == BUILT.special_id(MIDDLE)).sum(axis=1) == 1).all()
    assert len(rows[0] & rows[1]) < 10
    for batch in take(stream(FillInTheMiddle(1.0)), 3):
        for tokens, segment in zip(batch.tokens_BT, batch.segment_BT, strict=True):
            for number in range(1, segment.max() + 1):
                ids = tokens[segment == number].tolist()
                assert [ids.count(BUILT.special_id(name)) for name in (PREFIX, SUFFIX, MIDDLE)] == [1, 1, 1]
                assert (ids[0], ids[-1]) == (BUILT.bos, BUILT.eos)


def test_packed_rows_are_those_of_the_examples_alone():
    def rows(packing):
        found = []
        for batch in take(stream(FIM, layout=LayoutSpec(seq_len=96, packing=packing)), 8 if packing else 24):
            for b, segment in enumerate(batch.segment_BT):
                found += [
                    tuple(
                        np.asarray(getattr(batch, name)[b][segment == number]).tobytes()
                        for name in ("tokens_BT", "target_BT", "weight_BT", "position_BT", "modality_BT")
                    )
                    for number in range(1, segment.max() + 1)
                ]
        return found

    packed, alone = rows(True), rows(False)
    assert len(packed) > 40 and set(packed) <= set(alone)


def test_a_transformation_does_not_change_the_order_or_the_untransformed():
    plain = [batch.tokens_BT for batch in take(stream(), 3)]
    same = [batch.tokens_BT for batch in take(stream(FillInTheMiddle(0.0)), 3)]
    np.testing.assert_array_equal(plain, same)


def test_rows_that_become_too_long_and_examples_of_media_alone_are_bad_records(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 28)
    task = Task(TextFiles((str(tmp_path / "a.txt"),), unit="document"), transform=(FillInTheMiddle(1.0),))
    data = DataSpec({"long": task}, LayoutSpec(seq_len=32), batch_size=1)
    with pytest.raises(BadRecord, match="a.txt.*too long: 33 positions, a row of the layout has 32: raise seq_len"):
        next(train_batches(data, BUILT, {}, seed=0))
    found = check(data, BUILT, {})["long"]
    assert found.reasons == {"too long": 1} and found.needs[0][0] == 33
    assert next(train_batches(data.replace(layout=LayoutSpec(seq_len=33)), BUILT, {}, seed=0)).shape == (1, 33)
    for transform in (FIM, CORRUPT, PrefixLM(), UL2()):
        example = transform(Example((Medium("image", b""),), "a picture"), np.random.default_rng(0))
        with pytest.raises(BadRecord, match="a picture: empty text"):
            lay_out(example, LayoutSpec(32), BUILT, ADAPTERS)


class Faulty(Transform):
    """Fails, or returns nothing, as a mistake in a user's transformation does."""

    def __call__(self, example, rng):
        return {"parts": None}[rng.choice(["parts", "part"])]


def test_a_faulty_transformation_is_named_with_the_example():
    said = set()
    for seed in range(10):
        with pytest.raises(RuntimeError) as caught:
            transformed(make_example(seed), (Faulty(),), np.random.default_rng(seed))
        said.add(str(caught.value).partition(": ")[2])
        assert str(caught.value).startswith(f"example {seed}: ")
    failed, returned = sorted(said)
    assert failed.startswith("Faulty raised KeyError: ") and "raise BadRecord in it" in failed
    assert returned == "Faulty returned NoneType: it must return an Example"


# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_transformed_source_is_the_same_always():
    spec = Transformed(SmallSource(9), (FillInTheMiddle(1.0, context_weight=0.0, middle=(1, 3)),), seed=4)
    examples, again = spec.open(), spec.open()
    assert len(examples) == 9 and examples[-1] == again[8] and examples[2] == again[2]
    assert examples[2] != spec.replace(seed=5).open()[2]
    for i, example in enumerate(examples):
        assert 1 <= len(example.answer) <= 3 and example.answer in make_example(i).answer
        assert [part for part in example.parts if isinstance(part, Medium)] == [
            part for part in make_example(i).parts if isinstance(part, Medium)
        ]
    with pytest.raises(IndexError):
        examples[9]
    assert from_json(to_json(spec)) == spec and examples.files() == ()


def test_the_experiment_asks_for_the_same_gaps_with_and_without_what_follows():
    module = load_file(EXPERIMENTS / "fill_in_the_middle.py")
    held_out = module.experiment().evaluation.tasks
    infill, swapped, prefix_only = (held_out[name].source.open() for name in ("infill", "swapped", "prefix_only"))
    followed = 0
    for i in range(0, len(infill), 50):
        whole, other, cut = infill[i], swapped[i], prefix_only[i]
        assert whole.answer == other.answer == cut.answer and 1 <= len(whole.answer) <= 3
        assert [part.text for part in whole.prompt if part.special] == [PREFIX, SUFFIX, MIDDLE]
        at = whole.prompt.index(Text(MIDDLE, 0.0, special=True)) + 1
        assert cut.prompt == whole.prompt[at:] and other.prompt[-len(cut.prompt) :] == cut.prompt
        assert [len(part.text) for part in other.prompt] == [len(part.text) for part in whole.prompt]
        followed += other.prompt != whole.prompt
        assert len("".join(part.text for part in cut.prompt)) >= module.PROMPT
    assert followed > len(infill) / 50 * 0.8, "the suffix is that of another piece"
    figures = module.WithoutEnd()(["abcd", "xy", "abx", "q"], ["ab", "x", "ab", "r"])
    assert figures == {"opening": 0.75, "fixed_length": 0.5}
