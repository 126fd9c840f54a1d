"""The loss of a step: shared passes, views, other models, and comparisons over the whole batch."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from bigram import VOCABULARY, Apart, Bigram, random_batch

from polygpt.errors import SpecError
from polygpt.objectives.base import Objective
from polygpt.objectives.forward import Forward
from polygpt.objectives.loss import Loss
from polygpt.objectives.masked_lm import MaskedLM, MaskTokens
from polygpt.objectives.next_token import NextToken
from polygpt.objectives.view import View
from polygpt.sequence import Batch

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Counting(Bigram):
    """Counts its forward passes."""

    passes: list = dataclasses.field(default_factory=list)

    def hidden(self, params, batch, key=None):
        self.passes.append(batch)
        return super().hidden(params, batch, key)


@dataclasses.dataclass(frozen=True)
class Reversed(View):
    """Rows read backwards."""

    def __call__(self, batch, keys_B):
        return batch.replace(tokens_BT=batch.tokens_BT[:, ::-1])


@dataclasses.dataclass(frozen=True)
class Backwards(NextToken):
    """Cross entropy over rows read backwards."""

    @property
    def view(self):
        return Reversed()


@dataclasses.dataclass(frozen=True)
class FromTeacher(Objective):
    """Distance to another model's hidden vectors, and to this one's under other dropout."""

    name: str = "teacher"

    @property
    def others(self):
        return (self.name,)

    def total(self, outputs, batch):
        other = outputs.other(self.name).hidden_BTD
        distance = jnp.square(outputs.hidden_BTD - other) + jnp.square(
            outputs.hidden_BTD - outputs.repeat(1).hidden_BTD
        )
        return jnp.sum(batch.weight_BT * jnp.sum(distance, axis=-1))


def gradient(objectives, accumulate=1, model=None, others=None, key=None, batch=None, references=None):
    """(means, gradient) of one step over random rows."""
    model = model or Bigram()
    params = model.init(jax.random.key(1))
    loss = Loss(model, objectives, jax.tree.map(lambda _: True, params), accumulate, references=references or {})

    @jax.jit
    def compiled(params, others, batch, key):
        seen = loss.seen(batch, KEY)
        return loss.gradient(params, others, seen, loss.weights(seen), key)

    return compiled(params, others or {}, batch or random_batch(), key)


def close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), a, b)


def test_objectives_that_read_the_same_view_share_a_pass():
    model = Counting()
    objectives = {"a": (NextToken(), 1.0), "b": (NextToken(0.1), 1.0), "c": (Backwards(), 1.0), "d": (Backwards(), 0.5)}
    means, _ = gradient(objectives, model=model)
    assert len(model.passes) == 2
    assert means["c"] == means["d"] != means["a"]


def test_a_comparison_of_the_whole_batch_does_not_depend_on_microbatches():
    objectives = {"apart": (Apart(), 0.7), "next": (NextToken(), 1.0), "mlm": (MaskedLM(MaskTokens(3, 9)), 0.5)}
    whole = gradient(objectives)
    for parts in (2, 4):
        close(whole, gradient(objectives, parts))
    x_BD = np.asarray(Bigram().hidden(Bigram().init(jax.random.key(1)), random_batch())[0].mean(axis=1), np.float64)
    np.testing.assert_allclose(whole[0]["apart"], np.mean(np.log(np.exp(2 * x_BD @ x_BD.T).sum(axis=1))), rtol=1e-6)


def test_other_models_have_no_gradient_and_their_own_parameters():
    model = Bigram(dropout=0.5)
    teacher = model.init(jax.random.key(2))
    objectives = {"teacher": (FromTeacher(), 1.0)}
    means, found = gradient(objectives, model=model, others={"teacher": teacher}, key=KEY)
    same, _ = gradient(objectives, model=model, others={"teacher": model.init(jax.random.key(1))}, key=KEY)
    again, _ = gradient(objectives, model=model, others={"teacher": teacher})
    assert means["teacher"] != same["teacher"] > 0  # dropout makes this model's passes differ from its own
    params, batch = model.init(jax.random.key(1)), random_batch()
    ours, theirs = (model.hidden(p, batch)[0] for p in (params, teacher))
    expected = np.sum(batch.weight_BT * np.square(ours - theirs).sum(axis=-1)) / batch.weight_BT.sum()
    np.testing.assert_allclose(again["teacher"], expected, rtol=1e-6)
    assert float(jnp.abs(found["hidden"]["kernel"]).sum()) > 0

    def of_teacher(teacher):
        outputs = Forward(model, params, batch, None, {"teacher": (model, teacher)})
        return FromTeacher().total(outputs, batch)

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.grad(of_teacher)(teacher)))


def test_a_model_that_is_missing_is_named():
    with pytest.raises(SpecError, match=r"reads the model 'teacher': add it to references, which has none"):
        gradient({"teacher": (FromTeacher(), 1.0)})
    with pytest.raises(SpecError, match="set optim.ema"):
        gradient({"teacher": (FromTeacher("average"), 1.0)})


# --- views ------------------------------------------------------------------------------------------------------------


def masked(view, batch, key=KEY, first_row=0) -> Batch:
    return Loss(None, {"mlm": (MaskedLM(view), 1.0)}, None).seen(batch, key, first_row)[0]


def long_batch(rows=64, length=128):
    return random_batch(rows, length, weight=1.0)


def test_masked_tokens_are_chosen_and_replaced_at_bert_s_rates():
    batch, view = long_batch(), MaskTokens(mask_token=VOCABULARY, vocabulary=VOCABULARY)
    found = masked(view, batch)
    chosen, kept = found.weight_BT > 0, found.tokens_BT == batch.tokens_BT
    count = chosen.sum()
    assert not chosen[:, 0].any() and kept[~chosen].all()
    assert np.array_equal(found.target_BT, batch.tokens_BT)
    # Within four standard deviations of a binomial.
    for share, of, expected in (
        (count, batch.tokens_BT[:, 1:].size, 0.15),
        ((found.tokens_BT == VOCABULARY).sum(), count, 0.8),
        ((chosen & kept).sum(), count, 0.1 + 0.1 / VOCABULARY),  # a random token may be the same one
    ):
        assert abs(share / of - expected) < 4 * (expected * (1 - expected) / of) ** 0.5


def test_whole_words_are_masked():
    batch = long_batch()
    chosen = masked(MaskTokens(VOCABULARY, VOCABULARY, rate=0.3, word_ends=(0, 1)), batch).weight_BT > 0
    ends = np.isin(batch.tokens_BT, (0, 1))
    inside = ~ends[:, 1:-1]  # a token that does not end a word is in the word of the next one
    assert np.array_equal(chosen[:, 1:-1][inside], chosen[:, 2:][inside])
    assert (chosen[:, 1:-1] != chosen[:, 2:])[~inside].any()
    assert abs(chosen.mean() - 0.3) < 0.05


def test_a_view_depends_on_the_row_of_the_global_batch_alone():
    batch, view = long_batch(8, 32), MaskTokens(VOCABULARY, VOCABULARY)
    whole = masked(view, batch)
    part = masked(view, jax.tree.map(lambda x: x[4:], batch), first_row=4)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[4:], whole), part)
    assert not np.array_equal(whole.weight_BT, masked(view, batch, jax.random.key(1)).weight_BT)


def test_tokens_to_keep_are_never_masked():
    batch = long_batch()
    found = masked(MaskTokens(VOCABULARY, VOCABULARY, rate=1.0, keep=(3, 4)), batch)
    np.testing.assert_array_equal(np.asarray(found.weight_BT)[:, 1:] > 0, ~np.isin(batch.tokens_BT[:, 1:], (3, 4)))


def test_prompts_are_never_masked():
    weight = np.zeros((8, 32), np.float32)
    weight[:, 19:30] = 1  # tokens 20 to 30
    batch = random_batch(8, 32, weight=weight)
    found = masked(MaskTokens(VOCABULARY, VOCABULARY, rate=1.0), batch)
    np.testing.assert_array_equal(np.flatnonzero(found.weight_BT[0]), np.arange(20, 31))
