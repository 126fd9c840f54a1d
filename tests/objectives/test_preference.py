"""Preference objectives against the formulas of their papers and of TRL in float64, on packed rows."""

import io
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from given import close, given, log_softmax, total, value_and_gradient
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from bigram import random_batch

from batches import ADAPTERS, lively, tiny
from polygpt.data.example import Example, Medium, Text
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.packing import collate, pack
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.errors import SpecError
from polygpt.models.functional import bind
from polygpt.objectives.dpo import DPO
from polygpt.objectives.ipo import IPO
from polygpt.objectives.loss import Loss
from polygpt.objectives.preference_margin import PreferenceAccuracy, PreferenceMargin
from polygpt.objectives.simpo import SimPO

B, T, V = 3, 24, 13
POLICY, REFERENCE = given(B, T, V), given(B, T, V, seed=1)
ANSWERS = [
    [((0, 3, 6), (6, 8, 12)), ((12, 14, 19), (19, 20, 23))],
    [((0, 5, 9), (9, 14, 16))],
    [],
]
"""By row, pairs of preferred and rejected answers: where the segment, its answer and the next segment begin."""


@pytest.fixture
def batch():
    segment_BT, signs_BT = np.zeros((2, B, T), np.int32)
    for b, pairs in enumerate(ANSWERS):
        for number, (start, answer, stop) in enumerate((one for pair in pairs for one in pair), start=1):
            segment_BT[b, start:stop] = number
            signs_BT[b, answer - 1 : stop - 1] = 1 if number % 2 else -1
            signs_BT[b, answer - 1] = 2 if number % 2 else -1
    batch = random_batch(B, T, weight=1.0)
    return batch.replace(segment_BT=segment_BT, extra={"preference": signs_BT})


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def answers(params, target_BT):
    """(sum of the log-probabilities, number of tokens) of both answers of every pair, float64 [pairs, 2]."""
    log_p_BTV = log_softmax(params)

    def answer(b, start, stop):
        places = range(start - 1, stop - 1)
        return sum(log_p_BTV[b, t, target_BT[b, t]] for t in places), len(places)

    found = [[answer(b, a, z) for _, a, z in pair] for b, pairs in enumerate(ANSWERS) for pair in pairs]
    return np.moveaxis(np.array(found), -1, 0)


def dpo(own, other, lengths, beta=0.3, smooth=0.1):
    """TRL's "sigmoid" with label_smoothing; equation 7 of the paper without it. The loss, and its derivatives with
    respect to the log-probabilities of both answers."""
    reward = beta * ((own - other)[:, 0] - (own - other)[:, 1])
    loss = -log_sigmoid(reward) * (1 - smooth) - log_sigmoid(-reward) * smooth
    slope = beta * (-(1 - smooth) / (1 + np.exp(reward)) + smooth / (1 + np.exp(-reward)))
    return loss, np.stack([slope, -slope], axis=1)


def ipo(own, other, lengths, beta=0.3, per_token=False):
    """Equation 17; TRL's "ipo", which takes means over tokens."""
    lengths = lengths if per_token else 1
    ratio = (own - other) / lengths
    gap = ratio[:, 0] - ratio[:, 1] - 1 / (2 * beta)
    return gap**2, 2 * gap[:, None] * np.array([1, -1]) / lengths


def simpo(own, other, lengths, beta=2.0, gamma=0.5):
    """Equation 6; TRL's CPO with loss_type "simpo" and simpo_gamma = gamma / beta."""
    means = own / lengths
    logits = means[:, 0] - means[:, 1] - gamma / beta
    slope = -beta / (1 + np.exp(beta * logits))
    return -log_sigmoid(beta * logits), slope[:, None] * np.array([1, -1]) / lengths


CASES = {
    "dpo": (DPO(beta=0.3), lambda *given: dpo(*given, smooth=0.0)),
    "cdpo": (DPO(beta=0.3, label_smoothing=0.1), dpo),
    "ipo": (IPO(beta=0.3), ipo),
    "ipo of trl": (IPO(beta=0.3, per_token=True), lambda *given: ipo(*given, per_token=True)),
    "simpo": (SimPO(gamma=0.5), simpo),
}


@pytest.mark.parametrize("block", [None, 10])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_formula(name, block, batch):
    objective, formula = CASES[name]
    others = {"reference": REFERENCE} if objective.reference else {}
    value, gradient = value_and_gradient(objective, POLICY, batch, others, block)
    (own, lengths), (other, _) = (answers(params, batch.target_BT) for params in (POLICY, REFERENCE))
    loss, slopes = formula(own, other, lengths)
    np.testing.assert_allclose(value, loss.sum(), rtol=1e-5)
    assert objective.weight(batch) == len(loss) == 3
    of_logits_BTV = np.zeros((B, T, V))
    places = [(b, one) for b, pairs in enumerate(ANSWERS) for pair in pairs for one in pair]
    for (b, (_, start, stop)), slope in zip(places, slopes.ravel(), strict=True):
        for t in range(start - 1, stop - 1):
            of_logits_BTV[b, t] = slope * (np.eye(V)[batch.target_BT[b, t]] - np.exp(log_softmax(POLICY)[b, t]))
    close(gradient["hidden"], of_logits_BTV @ np.float64(POLICY["head"]).T, 1e-5)


def test_margins_and_how_often_they_are_right(batch):
    (own, _), (other, _) = (answers(params, batch.target_BT) for params in (POLICY, REFERENCE))
    for reference, others in (("reference", {"reference": REFERENCE}), (None, {})):
        margin = np.diff(other - own if reference else -own)[:, 0]
        for objective, expected in ((PreferenceMargin, margin), (PreferenceAccuracy, margin > 0)):
            np.testing.assert_allclose(total(objective(reference), POLICY, batch, others), expected.sum(), rtol=1e-5)


def test_what_no_answer_holds_has_no_effect(batch):
    unused_BT1 = (batch.extra["preference"] == 0)[..., None]
    clean = value_and_gradient(DPO(), POLICY, batch, {"reference": REFERENCE}, 10)
    dirty = [one | {"hidden": np.where(unused_BT1, np.nan, one["hidden"])} for one in (POLICY, REFERENCE)]
    found = value_and_gradient(DPO(), dirty[0], batch, {"reference": dirty[1]}, 10)
    jax.tree.map(np.testing.assert_array_equal, found, clean)


def test_rows_without_pairs_are_told_what_to_set(batch):
    with pytest.raises(SpecError, match=r"needs pairs of answers: set data\.layout\.pairs to true"):
        total(DPO(), POLICY, batch.replace(extra={}), {"reference": REFERENCE})


# --- through a model, with media in the prompts -----------------------------------------------------------------------


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_packed_pairs_equal_pairs_alone_and_beside_single_answers_and_microbatches_equal_the_batch():
    texts = [("a", "yes", "no"), ("b?", "in", "out of it"), ("c", "5", "55"), ("d", "one", "two")]
    examples = [
        Example((Medium("image", picture(i)), Text(prompt, 0.0), Text(chosen)), "", rejected=rejected)
        for i, (prompt, chosen, rejected) in enumerate(texts)
    ]
    adapters, tokenizer, length = {"image": ADAPTERS["image"]}, Bytes().build(), 64
    layout = LayoutSpec(length, pairs=True)
    rows = [lay_out(one, layout, tokenizer, adapters) for one in examples]
    single = lay_out(Example((Text("e", 0.0), Text("six")), ""), layout, tokenizer, adapters, paired=False)
    alone = collate(rows, length, adapters)
    packed = collate([pack(rows[:2], adapters), None, None, pack(rows[2:], adapters)], length, adapters)
    mixed = [single, rows[0], single, rows[1]], [rows[3]], [single], [rows[2], single]
    mixed = collate([pack(some, adapters) for some in mixed], length, adapters)
    model = bind(tiny(adapters=adapters, depth=1), tokenizer.vocabulary)
    params, others = lively(model), {"reference": lively(model, seed=1)}
    objectives = {"dpo": (DPO(), 1.0), "simpo": (SimPO(), 0.5), "margin": (PreferenceMargin(), 0.0)}
    objectives |= {"right": (PreferenceAccuracy(), 0.0)}

    def gradient(batch, accumulate, block):
        loss = Loss(model, objectives, jax.tree.map(lambda _: True, params), accumulate, block)
        seen = loss.seen(batch, jax.random.key(0))
        return jax.jit(lambda params: loss.gradient(params, others, seen, loss.weights(seen), None))(params)

    expected = gradient(alone, 1, None)
    close(gradient(packed, 2, 100), expected, 1e-5)
    close(gradient(mixed, 1, None), expected, 1e-5)
    assert expected[0]["right"] in (0.0, 0.25, 0.5, 0.75, 1.0) and expected[0]["margin"] != 0
