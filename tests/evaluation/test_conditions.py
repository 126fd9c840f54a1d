"""Held-out tasks under other conditions than those of training: longer rows, a changed model, the last tokens alone."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from batches import lively
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.sinks import SinksAndWindow
from polygpt.attention.sliding import SlidingWindow
from polygpt.data.example import Example, Text
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.packing import collate
from polygpt.data.sources.base import Source
from polygpt.data.tokenizers.bytes import ByteTokenizer
from polygpt.errors import BadRecord, SpecError, UserError
from polygpt.evaluation import conditions
from polygpt.evaluation.evaluate import evaluate
from polygpt.evaluation.likelihood import token_scores
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.generation.sampling import GREEDY
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.positions import Learned, Rope
from polygpt.nn.rotary import YaRN
from polygpt.spec import from_json, to_json

TOKENIZER = ByteTokenizer()
LAYOUT = LayoutSpec(seq_len=16)
SPEC = ModelSpec(DecoderSpec(width=16, depth=2, attention=MultiHead(heads=2), position=Rope()))
NEAR = {"decoder.attention": SlidingWindow(heads=2, window=4)}
FAR = {"decoder.position": Rope(scaling=YaRN(factor=2.0, original_length=16))}


@dataclasses.dataclass(frozen=True)
class Words(Source):
    """Texts in memory."""

    texts: Any

    def open(self):
        return [Example((Text(text),), f"text {i}") for i, text in enumerate(self.texts)]


@dataclasses.dataclass(frozen=True)
class Sums(Source):
    """Questions with answers."""

    def open(self):
        return [Example((Text(f"{i}+{i}=", 0.0), Text(str(2 * i))), f"sum {i}") for i in range(4)]


RNG = np.random.default_rng(0)
SHORT, LONG = (Words(tuple("".join(RNG.choice(list("abcde "), n)) for n in sizes)) for sizes in [(9, 14, 3), (40, 46)])


@pytest.fixture(scope="module")
def model():
    return bind(SPEC, TOKENIZER.vocabulary)


@pytest.fixture(scope="module")
def params(model):
    """Large enough that it matters who sees whom."""
    return lively(model, scale=1.0)


def measured(model, params, tasks, layout=LAYOUT, **options):
    spec = EvaluationSpec(tasks, batch_size=2, sampling=GREEDY.replace(max_tokens=4), **options)
    return evaluate(model, params, TOKENIZER, model.spec.adapters, layout, spec)


def by_hand(model, params, source, length, last=None):
    """Nats a token, by the functional core, an example at a time."""
    nats, apply = [], jax.jit(model.apply)
    for example in source.open():
        batch = collate([lay_out(example, LayoutSpec(length), TOKENIZER, {})], length, {})
        logits = log_softmax(np.asarray(apply(params, batch).logits_BTV[0], np.float64), axis=-1)
        own = [-float(logits[t, batch.target_BT[0, t]]) for t in range(length) if batch.weight_BT[0, t] > 0]
        nats += own if last is None else own[-last:]
    return np.mean(nats)


def test_longer_rows_give_the_loss_of_the_functional_core(model, params):
    found = measured(model, params, {"short": EvalTask(SHORT), "long": EvalTask(LONG, seq_len=48)})
    assert found["tasks"]["short"]["loss"] == pytest.approx(by_hand(model, params, SHORT, 16), rel=1e-5)
    assert found["tasks"]["long"]["loss"] == pytest.approx(by_hand(model, params, LONG, 48), rel=1e-5)
    assert found["modalities"]["text"]["n"] == 3, "what is not as it was trained is not pooled with what is"
    with pytest.raises(BadRecord, match="text 0: too long: 42 positions, a row of the layout has 16"):
        measured(model, params, {"long": EvalTask(LONG)})


@pytest.mark.parametrize("changes", [NEAR, FAR, {**FAR, "decoder.attention": SinksAndWindow(heads=2, window=3)}])
def test_a_changed_model_is_that_model_with_the_same_parameters(model, params, changes):
    own = EvalTask(LONG, seq_len=48)
    found = measured(model, params, {"own": own, "other": own.replace(model=changes)})
    fields = {name.removeprefix("decoder."): value for name, value in changes.items()}
    other = bind(SPEC.replace(decoder=SPEC.decoder.replace(**fields)), TOKENIZER.vocabulary)
    own, changed = (found["tasks"][name]["loss"] for name in ("own", "other"))
    assert changed == pytest.approx(by_hand(other, params, LONG, 48), rel=1e-5)
    assert abs(changed - own) > 1e-3


def test_the_last_tokens_of_each_example(model, params):
    tasks = {"ends": EvalTask(SHORT, last=5), "all": EvalTask(SHORT, last=100), "usual": EvalTask(SHORT)}
    found = measured(model, params, tasks, layout=LayoutSpec(48))["tasks"]  # packed: all three share a row
    assert found["ends"]["loss"] == pytest.approx(by_hand(model, params, SHORT, 16, last=5), rel=1e-5)
    assert found["all"] == found["usual"] and found["ends"]["n"] == 3
    assert found["ends"]["token_accuracy"] * (5 + 5 + 4) == pytest.approx(round(found["ends"]["token_accuracy"] * 14))


def test_each_of_them_is_compiled_once_for_all_batches_and_calls(model, params):
    tasks = {
        "short": EvalTask(SHORT),
        "near": EvalTask(SHORT, model=NEAR),
        "near again": EvalTask(SHORT, model=dict(NEAR), last=3),
        "long": EvalTask(LONG, seq_len=48, model=NEAR),
    }
    token_scores.clear_cache()
    first = measured(model, params, tasks)
    assert token_scores._cache_size() == 3
    assert measured(model, params, tasks) == first
    measured(model, jax.tree.map(lambda x: 2 * x, params), tasks)
    assert token_scores._cache_size() == 3


def test_answers_are_written_by_the_changed_model(model, params):
    answered = EvalTask(Sums(), generate=True)
    with_window = answered.replace(model=NEAR)
    other = bind(SPEC.replace(decoder=SPEC.decoder.replace(attention=NEAR["decoder.attention"])), TOKENIZER.vocabulary)
    found = measured(model, params, {"sums": with_window})["tasks"]["sums"]
    assert found == measured(other, params, {"sums": answered})["tasks"]["sums"] and "accuracy" in found


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"decoder.attention": MultiHead(heads=2, kv_heads=1)},
            r"evaluation task 'odd', model: the parameter decoder/\S+ is \[2, 16, 16\] in the trained model and "
            r"\[2, 16, 8\] in the changed one",
        ),
        ({"decoder.position": Learned(64)}, r"decoder/\S+ is missing in the trained model and \[64, 16\]"),
        ({"decoder.attentio": MultiHead()}, "'odd', model: decoder.attentio: DecoderSpec has no field 'attentio': did"),
        ({"decoder.depth": "3"}, "'odd', model: decoder.depth is '3': it must be int"),
    ],
)
def test_other_parameters_are_refused(model, params, changes, fault):
    with pytest.raises(UserError, match=fault) as raised:
        measured(model, params, {"odd": EvalTask(SHORT, model=changes)})
    assert "\n" not in str(raised.value)


def test_positions_that_a_model_does_not_know_are_refused():
    spec = SPEC.replace(decoder=SPEC.decoder.replace(position=Learned(20)))
    conditions.check("fits", EvalTask(LONG, seq_len=20), spec, LAYOUT)
    with pytest.raises(SpecError, match="'far' has seq_len 48, but its decoder.position supports 20"):
        conditions.check("far", EvalTask(LONG, seq_len=48), spec, LAYOUT)
    with pytest.raises(SpecError, match="'less' has seq_len 16, but its decoder.position supports 8"):
        conditions.check("less", EvalTask(SHORT, model={"decoder.position": Learned(8)}), spec, LAYOUT)


def test_conditions_travel_as_json_and_their_bounds_are_checked():
    task = EvalTask(SHORT, seq_len=48, model={**NEAR, **FAR, "dtype": "bfloat16"}, last=4)
    assert from_json(to_json(task)) == task and not task.as_trained and EvalTask(SHORT, limit=1).as_trained
    for field in ("seq_len", "last"):
        with pytest.raises(SpecError, match=f"EvalTask.{field} is 0"):
            EvalTask(SHORT, **{field: 0})
