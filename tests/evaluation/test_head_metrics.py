"""Metrics of heads against scikit-learn, and through a whole evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from polygpt.data.example import Example, Text
from polygpt.data.labels import Label
from polygpt.data.layout import LayoutSpec
from polygpt.data.sources.base import Source
from polygpt.data.tokenizers.bytes import ByteTokenizer
from polygpt.errors import SpecError, UserError
from polygpt.evaluation import conditions
from polygpt.evaluation.evaluate import evaluate
from polygpt.evaluation.label_accuracy import LabelAccuracy
from polygpt.evaluation.label_error import LabelError
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.heads.linear import LinearHead
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.positions import NoPosition
from polygpt.objectives.base import scores_and_best
from polygpt.spec import from_json, to_json
from polygpt.training.held_out import select_metric

N, K = 40, 4
RNG = np.random.default_rng(0)


def test_accuracy_and_f1_of_classes_are_those_of_scikit_learn():
    outputs, label = RNG.normal(size=(N, K)), RNG.integers(0, K - 1, N)
    found, best = LabelAccuracy("kind")(outputs, np.float32(label)[:, None]), outputs.argmax(axis=1)
    assert found["kind_accuracy"] == metrics.accuracy_score(label, best)
    known = metrics.f1_score(label, best, labels=range(K - 1), average="macro")
    np.testing.assert_allclose(found["kind_f1"], known, rtol=1e-12)


def test_a_multi_label_counts_its_known_numbers():
    outputs, label = RNG.normal(size=(N, K)), np.float32(RNG.integers(0, 2, (N, K)))
    whole = LabelAccuracy("head", "seen")(outputs, label)
    np.testing.assert_allclose(whole["seen_accuracy"], ((outputs > 0) == label).mean(), rtol=1e-12)
    np.testing.assert_allclose(whole["seen_f1"], metrics.f1_score(label, outputs > 0, average="macro"), rtol=1e-12)
    label[:, 1:] = np.nan
    first = LabelAccuracy("head", "seen")(outputs, label)
    np.testing.assert_allclose(first["seen_accuracy"], ((outputs[:, 0] > 0) == label[:, 0]).mean(), rtol=1e-12)


def test_errors_of_numbers():
    outputs, label = RNG.normal(size=(N, 4)), RNG.normal(size=(N, 2))
    found = LabelError("size")(outputs, label)
    assert np.isclose(found["size_mae"], metrics.mean_absolute_error(label, outputs[:, :2]), rtol=1e-12)
    assert np.isclose(found["size_rmse"], metrics.root_mean_squared_error(label.ravel(), outputs[:, :2].ravel()))
    label[0, 1] = np.nan
    logs = LabelError("size", outputs="logarithms")(outputs, label)
    assert np.isclose(logs["size_mae"], np.nanmean(np.abs(np.exp(outputs[:, :2]) - label)), rtol=1e-12)


@pytest.mark.parametrize("metric", [LabelAccuracy("kind"), LabelError("kind")])
def test_a_head_metric_gives_exactly_what_it_declares(metric):
    outputs = RNG.normal(size=(N, 3 if isinstance(metric, LabelAccuracy) else 1))
    assert list(metric(outputs, np.float32(RNG.integers(0, 2, (N, 1))))) == [one.name for one in metric.measures]
    assert all(one.needs == "likelihood" and one.better for one in metric.measures)


# --- a whole evaluation -----------------------------------------------------------------------------------------------

TOKENIZER = ByteTokenizer()
LAYOUT = LayoutSpec(24, labels={"kind": Label(classes=3), "vowel": Label(classes=2)})


@dataclasses.dataclass(frozen=True)
class Words(Source):
    """Words with the number of their letters below 3, and of some letters whether they are vowels."""

    texts: bool = True

    def open(self):
        words = ["", "a", "bc", "ade", "oi", "u", "xyz"]
        return [self._example(i, word) for i, word in enumerate(words)]

    def _example(self, i, word):
        letters = [Text(c, float(self.texts), {"vowel": int(c in "aeiou")} if i % 2 else {}) for c in word or "-"]
        return Example(tuple(letters), f"word {i}", {"kind": None if i == 0 else len(word) % 3})


class Counts:
    """Knows the number of letters but for words that begin with "a"; takes every letter for a vowel."""

    spec = ModelSpec(DecoderSpec(position=NoPosition()), adapters={})

    def hidden(self, params, batch, key=None):
        return batch.position_BT, {}

    def head(self, params, name, hidden_BTD, batch):
        if name == "vowels":
            return jnp.stack([0 * hidden_BTD, hidden_BTD + 1], axis=-1)
        first_BT = jnp.roll(batch.tokens_BT, 1, axis=1)  # the token before, which of one letter is the word
        number_BT = jnp.where((first_BT == ord("a")) & (hidden_BTD == 2), 0, hidden_BTD - 1) % 3
        return jax.nn.one_hot(number_BT, 3)

    def token_scores(self, params, batch):
        return scores_and_best(jnp.zeros((*batch.shape, TOKENIZER.vocabulary)), batch.target_BT)

    def replicated(self, tree):
        return tree


def results(batch_size=4, packing=True, **task):
    heads = LabelAccuracy("kind"), LabelAccuracy("vowels", "vowel")
    spec = EvaluationSpec({"words": EvalTask(**{"source": Words(), "heads": heads} | task)}, batch_size)
    layout = LAYOUT.replace(packing=packing)
    return evaluate(Counts(), None, TOKENIZER, {}, layout, spec)["tasks"]["words"]


def test_heads_of_a_task_are_measured_at_labelled_positions():
    found = results()
    assert found["kind_accuracy"] == 5 / 6 and found["n"] == 7 and found["loss"] > 0
    vowels = [c in "aeiou" for word in ("a", "ade", "u") for c in word]
    assert found["vowel_accuracy"] == np.mean(vowels)
    for batch_size, packing in ((1, True), (2, False)):
        assert results(batch_size, packing) == pytest.approx(found, rel=1e-6)


def test_a_task_of_labels_alone_has_no_loss():
    found = results(source=Words(texts=False))
    assert found == {"n": 7, "kind_accuracy": 5 / 6, "kind_f1": found["kind_f1"]} | {
        name: found[name] for name in ("vowel_accuracy", "vowel_f1")
    }
    assert select_metric({"words": found}, "words/kind_accuracy") == 5 / 6
    with pytest.raises(UserError, match="no held-out task predicts text: choose '<task>/<measure>'"):
        select_metric({"words": found}, "loss")


def test_a_decoder_that_sees_its_targets_has_no_loss(monkeypatch):
    expected = {name: value for name, value in results().items() if name == "n" or name.startswith(("kind", "vowel"))}
    seeing = Counts.spec.replace(decoder=Counts.spec.decoder.replace(mask="bidirectional"))
    monkeypatch.setattr(Counts, "spec", seeing)
    monkeypatch.setattr(Counts, "token_scores", None)
    assert results() == expected


def test_a_label_that_no_example_has_is_an_error():
    layout = LAYOUT.replace(labels={**LAYOUT.labels, "rare": Label()})
    spec = EvaluationSpec({"words": EvalTask(Words(), heads=(LabelError("kind", "rare"),))})
    with pytest.raises(UserError, match="evaluation task 'words': no example has the label 'rare'"):
        evaluate(Counts(), None, TOKENIZER, {}, layout, spec)


def test_a_metric_of_a_head_needs_head_and_label_and_may_be_that_of_the_run():
    task = EvalTask(Words(), heads=(LabelAccuracy("kind"),))
    model = ModelSpec(DecoderSpec(width=8, depth=1), heads={"kind": LinearHead(3)})
    conditions.check("words", task, model, LAYOUT)
    with pytest.raises(
        SpecError, match="task 'words': LabelAccuracy reads the head 'kind', which is not in model.heads"
    ):
        conditions.check("words", task, model.replace(heads={}), LAYOUT)
    with pytest.raises(SpecError, match="reads the label 'kind', which is not in data.layout.labels: there are vowel"):
        conditions.check("words", task, model, LAYOUT.replace(labels={"vowel": Label()}))
    spec = EvaluationSpec({"words": task})
    assert spec.measure("words/kind_accuracy", answers=False).better == "higher"
    with pytest.raises(SpecError, match="must be one of kind_accuracy, kind_f1, loss, .* of words, unless"):
        spec.measure("words/kind_mae", answers=False)
    assert from_json(to_json(task.heads[0])) == task.heads[0]
