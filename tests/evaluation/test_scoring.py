"""Cached log-probabilities of training data are those that training would compute with the model."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from small_data import png

from batches import LIGHT, lively, tiny
from given_examples import Given
from polygpt.blocks.cross import CrossSequential
from polygpt.data import scores
from polygpt.data.example import Example, Medium, Text
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.loader import DataSpec, Task, train_batches
from polygpt.data.packing import collate
from polygpt.data.tokenizers.bytes import Bytes, ByteTokenizer
from polygpt.data.tokenizers.special_tokens import SpecialTokens
from polygpt.data.transforms.word_swap import WordSwap
from polygpt.errors import BadRecord, SpecError, UserError
from polygpt.evaluation.scoring import Scorer, write_scores
from polygpt.models.decoder import DecoderSpec
from polygpt.models.encoder_decoder import EncoderDecoder
from polygpt.models.functional import bind
from polygpt.objectives.distillation import Distillation
from polygpt.objectives.dpo import DPO
from polygpt.objectives.forward import Forward
from polygpt.objectives.span_distillation import SpanDistillation
from polygpt.objectives.top_k_distillation import TopKDistillation

TOKENIZER = Bytes().build()
V = TOKENIZER.vocabulary
TEXTS = [Example((Text("q" * (i % 4), 0.0), Text("answer " * (1 + i % 3), 0.5)), f"text {i}") for i in range(11)]
PAIRS = [Example((Text(f"{i}: ", 0.0), Text("yes")), f"pair {i}", rejected="no, " * (1 + i % 3)) for i in range(5)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(scores, "SHARD", 4)


@pytest.fixture(scope="module")
def models():
    """(student, its parameters, teacher, its parameters)"""
    student, teacher = (bind(tiny(adapters={}, depth=1, width=width), V) for width in (8, 16))
    return student, lively(student, scale=0.3), teacher, lively(teacher, seed=1, scale=0.3)


def data(examples=TEXTS, **layout):
    return DataSpec({"a": Task(Given(tuple(examples)))}, LayoutSpec(seq_len=48, **layout), batch_size=4)


def loss(objective, models, batch, online):
    student, own, teacher, theirs = models
    others = {name: (teacher, theirs) for name in objective.others} if online else {}

    def mean(params):
        return objective.total(Forward(student, params, batch, None, others), batch) / objective.weight(batch)

    return jax.device_get(jax.jit(jax.value_and_grad(mean))(own))


def written(folder, models, given, **options):
    scorer = Scorer(*models[2:], TOKENIZER, "the teacher")
    counts = write_scores(scorer, given, TOKENIZER, {}, str(folder), **options)
    return given.replace(scores={"teacher": str(folder)}), counts


def same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_all_tokens_give_the_loss_that_the_teacher_gives_in_memory(models, tmp_path):
    given, counts = written(tmp_path / "scores", models, data(), top=V, batch_size=3)
    batch = next(train_batches(given, TOKENIZER, {}, seed=0))
    assert batch.segment_BT.max() > 1 and counts["examples"] == 11 and counts["skipped"] == 0
    assert counts["tokens"] == sum((lay_out(one, given.layout, TOKENIZER, {}).weight != 0).sum() for one in TEXTS)
    same(loss(TopKDistillation(), models, batch, False), loss(Distillation(), models, batch, True))
    assert (np.diff(batch.extra["teacher.log_p"][batch.weight_BT != 0], axis=-1) <= 0).all()


def test_pairs_get_the_margins_of_the_reference_in_memory(models, tmp_path):
    given, _ = written(tmp_path / "scores", models, data(PAIRS, pairs=True), batch_size=2)
    batch = next(train_batches(given, TOKENIZER, {}, seed=0))
    assert set(batch.extra) == {"preference", "teacher"} and batch.segment_BT.max() > 2
    np.testing.assert_array_equal(np.isnan(batch.extra["teacher"]), batch.extra["preference"] == 0)
    same(loss(DPO(scores="teacher"), models, batch, False), loss(DPO(), models, batch, True))


def test_writing_resumes_after_an_interruption(models, tmp_path):
    whole, _ = written(tmp_path / "whole", models, data(), top=2)

    def interrupt(what, done, total):
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "parts", models, data(), top=2, progress=interrupt)
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.npy")}
    assert len(there) == 2, "a shard of two files"
    written(tmp_path / "parts", models, data(), top=2)
    files = list((tmp_path / "parts").iterdir())
    assert len(files) == 7 and all(
        path.stat().st_mtime_ns == there.get(path.name, path.stat().st_mtime_ns) for path in files
    )
    for path in files:
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    assert len(list((tmp_path / "whole").iterdir())) == 7 and whole.scores


def test_a_teacher_with_other_adapters_sees_its_own_pictures(tmp_path):
    finer = LIGHT["image"].replace(patch=2)
    teacher = bind(tiny(adapters={"image": finer}, depth=1), V)
    params = lively(teacher, scale=0.3)
    examples = [Example((Medium("image", png(i)), Text("?", 0.0), Text("it is " * (i + 1))), f"{i}") for i in range(3)]
    given, own = data(examples), {"image": LIGHT["image"]}
    scorer = Scorer(teacher, params, TOKENIZER, "the teacher", seq_len=64)
    write_scores(scorer, given, TOKENIZER, own, str(tmp_path / "scores"))
    given = given.replace(scores={"teacher": str(tmp_path / "scores")})
    batch = next(train_batches(given, TOKENIZER, own, seed=0))
    rows = [lay_out(one, LayoutSpec(seq_len=64), TOKENIZER, {"image": finer}) for one in examples]
    alone = collate(rows, 64, {"image": finer})
    tokens, _ = jax.jit(teacher.token_scores)(params, alone)
    log_p_BT = np.asarray(tokens.target - tokens.log_z)
    found = {}
    for b, segment in {(b, batch.segment_BT[b, t]) for b, t in np.argwhere(batch.weight_BT != 0)}:
        values = batch.extra["teacher"][b, (batch.segment_BT[b] == segment) & (batch.weight_BT[b] != 0)]
        found[len(values)] = values
    for i in range(3):
        expected = log_p_BT[i, alone.weight_BT[i] != 0]
        np.testing.assert_allclose(found[len(expected)], expected, rtol=1e-5, atol=1e-5)


def test_a_teacher_with_another_tokenizer_scores_spans_of_bytes(models, tmp_path):
    student, own, teacher, theirs = models
    other = SpecialTokens(Bytes(), ("<x>",)).build()
    student = bind(student.spec, other.vocabulary)
    folder = str(tmp_path / "scores")
    scorer = Scorer(teacher, theirs, TOKENIZER, "runs/teacher, step 3")
    with pytest.raises(
        UserError, match="step 3 has another tokenizer, .* set --top to 0, and distil spans of bytes with S"
    ):
        write_scores(scorer, data(), other, {}, folder, top=4)
    assert not Path(folder).exists()
    write_scores(scorer, data(), other, {}, folder)
    given = data().replace(scores={"teacher": folder})
    batch = next(train_batches(given, other, {}, seed=0))
    same_ids, _ = written(tmp_path / "same", models, data())
    twin = next(train_batches(same_ids, TOKENIZER, {}, seed=0))
    np.testing.assert_allclose(batch.extra["teacher"], twin.extra["teacher"], rtol=1e-5, atol=1e-5)
    value, gradient = loss(SpanDistillation(), (student, lively(student, scale=0.3), None, None), batch, False)
    assert value > 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_what_cannot_be_scored_is_refused_and_nothing_written(models, tmp_path):
    folder = tmp_path / "scores"
    bad = [*TEXTS, Example((Text("x" * 99),), "text 11")]
    with pytest.raises(BadRecord, match="text 11: too long"):
        written(tmp_path / "bad", models, data(bad))
    skipping = data(bad).replace(on_bad_record="skip")
    assert written(tmp_path / "skipping", models, skipping)[1]["skipped"] == 1
    with pytest.raises(UserError, match="--top is 300: it must be from 0 to the number of ids, 258"):
        written(folder, models, data(), top=300)
    changing = {"a": Task(Given(tuple(TEXTS)), transform=(WordSwap(),))}
    with pytest.raises(SpecError, match="WordSwap, which changes its examples in every epoch"):
        written(folder, models, data().replace(tasks=changing))
    assert not folder.exists()


def test_a_model_that_sees_its_targets_or_finds_no_source_is_refused(models, tmp_path):
    _, _, teacher, theirs = models
    encoder = teacher.spec.replace(decoder=teacher.spec.decoder.replace(mask="bidirectional"))
    for spec, words in (
        (encoder, "runs/teacher cannot score these data: it predicts the next token, which .* 'bidirectional' shows"),
        (EncoderDecoder(DecoderSpec(16, 1, block=CrossSequential())), "prompt_span is 'causal': EncoderDecoder finds"),
    ):
        with pytest.raises(UserError, match=words):
            scorer = Scorer(bind(spec, V), theirs, TOKENIZER, "runs/teacher")
            write_scores(scorer, data(), TOKENIZER, {}, str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()


class Normalising(ByteTokenizer):
    """Drops the letter q."""

    def encode(self, text):
        return super().encode(text.replace("q", ""))


def test_texts_that_two_tokenizers_read_differently_are_skipped(models, tmp_path):
    _, _, teacher, theirs = models
    folder, skipping = str(tmp_path / "scores"), data().replace(on_bad_record="skip")
    scorer = Scorer(teacher, theirs, TOKENIZER, "runs/teacher")
    given = Normalising().with_special(["<x>"]), {}, folder
    with pytest.raises(BadRecord, match="text 1: not aligned"):
        write_scores(scorer, data(), *given)
    found = write_scores(scorer, skipping, *given)
    assert found["skipped"] == sum("q" in example.parts[0].text for example in TEXTS)
