"""Retrieval between modalities: ranks by hand, and what is compared of a batch."""

import numpy as np
import pytest

from batches import build, example, lively, tiny
from polygpt.data.layout import LayoutSpec
from polygpt.errors import SpecError
from polygpt.evaluation.head_metric import measured
from polygpt.evaluation.retrieval import Retrieval
from polygpt.heads.projection import ProjectionHead
from polygpt.models.functional import bind
from polygpt.objectives.forward import Forward
from polygpt.objectives.info_nce import InfoNCE

HEADS = ("pair", "pair")


def test_ranks_are_counted_in_both_directions():
    right = np.eye(4)
    left = np.array([[1, 0, 0, 0], [0.9, 0.8, 0, 0], [0, 0.5, 0.5, 0.5], [0, 0.3, 0, 1]])
    none = np.full(4, np.nan)
    found = Retrieval(HEADS, at=(1, 2, 3))(left, right, none)
    # To the right: 0 and 3 come first, 1 is second; 2 is tied with two others, which count against it.
    assert [found[f"retrieval_r{k}"] for k in (1, 2, 3)] == [0.5, 0.75, 1.0]
    # Back, by columns: all are the largest of theirs.
    assert [found[f"retrieval_back_r{k}"] for k in (1, 2, 3)] == [1.0, 1.0, 1.0]


def test_examples_of_the_same_label_are_partners():
    rng = np.random.default_rng(0)
    left, right, label = rng.normal(size=(30, 8)), rng.normal(size=(30, 8)), np.arange(30) % 3
    found = Retrieval(HEADS, name="kind", label="kind")(left, right, label.astype(float))
    best = (left @ right.T).argmax(axis=1)
    assert found["kind_r1"] == (label[best] == label).mean()
    assert found["kind_back_r1"] == (label[(left @ right.T).argmax(axis=0)] == label).mean()
    exact = Retrieval(HEADS)(left, right, label.astype(float))
    assert exact["retrieval_r1"] == (best == np.arange(30)).mean()


def test_what_is_compared_is_what_the_objective_embeds():
    model = bind(tiny().replace(heads={"pair": ProjectionHead(6, pool="mean")}), 31)
    params = lively(model)
    a, b, c = (
        example(3, ("image", 4), 4, seed=1),
        example(("audio", 3), 6, seed=3),
        example(2, ("image", 4), ("audio", 2), 3, seed=4),
    )
    label_BT = np.full((2, 20), np.nan, np.float32)
    label_BT[0, 10], label_BT[1, 10] = 5, 6  # at the ends of the first examples
    batch = build([[a, b], [c]], 20).replace(extra={"kind": label_BT})
    rows = []

    class Kept(Retrieval):
        def __call__(self, *found):
            rows.append(found)
            return super().__call__(*found)

    figures = measured(model, params, [batch, batch], [Kept(HEADS, label="kind")])
    left, right, label = rows[0]
    assert figures == Retrieval(HEADS, label="kind")(*rows[0]) and label.tolist() == [5, 6, 5, 6]
    objective = InfoNCE(HEADS)
    seen = objective.view(batch, None)
    embedded = objective.embed(Forward(model, params, seen), seen)
    valid = np.asarray(embedded["valid"]) > 0
    np.testing.assert_allclose(left[:2], np.asarray(embedded["left"])[valid], rtol=0, atol=1e-6)
    np.testing.assert_allclose(right[:2], np.asarray(embedded["right"])[valid], rtol=0, atol=1e-6)


def test_what_does_not_fit_is_told():
    spec, layout = tiny().replace(heads={"pair": ProjectionHead(6)}), LayoutSpec(8)
    for metric, words in (
        (Retrieval(("none", "pair")), "reads the head 'none'"),
        (Retrieval(HEADS, between=(0, 3)), "the model reads 0 text, 1 image, 2 audio: change between"),
        (Retrieval(HEADS, label="kind"), "reads the label 'kind', which is not in data.layout.labels"),
    ):
        with pytest.raises(SpecError, match=words):
            metric.check_with(spec, layout)
