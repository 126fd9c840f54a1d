"""Objectives that find nothing to score are told before a run begins."""

import dataclasses
import re

import jax.numpy as jnp
import pytest
from tiny_experiment import experiment

from polygpt.data.labels import Label
from polygpt.errors import UserError
from polygpt.heads.linear import LinearHead
from polygpt.heads.projection import ProjectionHead
from polygpt.objectives.base import BatchObjective
from polygpt.objectives.classification import LabelClassification
from polygpt.objectives.info_nce import InfoNCE
from polygpt.objectives.masked_lm import MaskedLM, MaskTokens
from polygpt.objectives.next_token import NextToken
from polygpt.training import scored
from polygpt.training.loggers import Silent
from polygpt.training.loop import train

PLAIN = {"next": (NextToken(), 1.0)}


def with_heads(**objectives):
    chosen = experiment()
    heads = {"pair": ProjectionHead(4, pool="mean"), "kind": LinearHead(2)}
    layout = chosen.data.layout.replace(labels={"kind": Label(classes=2)})
    return chosen.replace(
        model=chosen.model.replace(heads=heads),
        data=chosen.data.replace(layout=layout),
        objectives=PLAIN | {name: (objective, 0.1) for name, objective in objectives.items()},
    )


def test_a_label_that_no_example_has_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(scored, "BATCHES", 2)
    words = "objectives.kind finds nothing to score in the first 8 rows of data.tasks: LabelClassification needs a head"
    with pytest.raises(UserError, match=re.escape(words)):
        train(with_heads(kind=LabelClassification("kind")), tmp_path / "run", lambda *_: [Silent()])
    assert not (tmp_path / "run").exists()


def test_a_contrast_without_one_of_its_modalities_is_told(monkeypatch):
    monkeypatch.setattr(scored, "BATCHES", 2)
    chosen = with_heads()
    pair = InfoNCE(("pair", "pair"), between=(1, 0))
    monkeypatch.setattr(InfoNCE, "check_with", lambda *_: None)  # the tiny model reads text alone
    words = r"objectives\.pair finds nothing .*InfoNCE needs examples that have both modality 1 and text \(between\)"
    with pytest.raises(UserError, match=words):
        scored.require_scored(chosen.replace(objectives=PLAIN | {"pair": (pair, 0.1)}))


def test_an_objective_that_a_later_phase_begins_is_checked_too(monkeypatch):
    monkeypatch.setattr(scored, "BATCHES", 1)
    chosen = with_heads(kind=LabelClassification("kind"))
    waiting = chosen.replace(objectives={"next": chosen.objectives["next"], "kind": (LabelClassification("kind"), 0.0)})
    scored.require_scored(waiting, waiting)
    with pytest.raises(UserError, match=r"^train\.phases\.1: objectives\.kind finds nothing to score"):
        scored.require_scored(waiting, waiting, chosen)


@dataclasses.dataclass(frozen=True)
class FirstTwo(BatchObjective):
    """Compares two rows."""

    def weight(self, batch):
        return jnp.float32(2)

    def left_out(self, batch):
        return jnp.float32(batch.shape[0] - 2)


def test_examples_that_an_objective_leaves_out_are_counted(caplog):
    scored.require_scored(with_heads(two=FirstTwo()))
    assert "objectives.two leaves out 2 of 4 examples in the first 4 rows: raise its limit" in caplog.text
    assert len(caplog.records) == 1


def test_no_data_is_read_for_objectives_of_tokens_and_for_those_that_only_monitor(monkeypatch):
    read = []
    monkeypatch.setattr(scored, "train_batches", lambda *_, **__: read.append(1))
    scored.require_scored(with_heads(masked=MaskedLM(MaskTokens(0, 9))))
    monitored = with_heads(kind=LabelClassification("kind"))
    scored.require_scored(monitored.replace(objectives=PLAIN | {"kind": (LabelClassification("kind"), 0.0)}))
    assert read == []
