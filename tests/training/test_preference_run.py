"""A run that learns from pairs of answers, with its own initial parameters as the reference."""

import json
import math

import pytest
from tiny_experiment import experiment

from polygpt.data.loader import Task
from polygpt.data.sources.folder import MediaFolder
from polygpt.errors import SpecError
from polygpt.evaluation.spec import EvalTask
from polygpt.init.reference import Reference
from polygpt.objectives.dpo import DPO
from polygpt.objectives.preference_margin import PreferenceMargin
from polygpt.overrides import override
from polygpt.training.loggers import JsonLines
from polygpt.training.loop import train

SMALL = {"model.decoder.depth": "0", "model.decoder.dropout": "0", "optim.accumulate": "1", "train.log_every": "1"}
SMALL |= {"train.steps": "6", "train.evaluate_every": "3", "train.parallel": "single", "data.layout.pairs": "true"}


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"{i}: ", "chosen": "yes", "rejected": "no, " * (1 + i % 3)} for i in range(12)]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = MediaFolder(str(tmp_path / "pairs"))
    chosen = override(experiment(), SMALL)
    objectives = {"dpo": (DPO(beta=0.5), 1.0), "margin": (PreferenceMargin(), 0.0)}
    return chosen.replace(
        data=chosen.data.replace(tasks={"pairs": Task(source)}),
        evaluation=chosen.evaluation.replace(tasks={"pairs": EvalTask(source)}),
        objectives=objectives,
        references={"reference": Reference()},
    )


def test_the_margin_over_the_initial_parameters_rises_from_0(pairs, tmp_path):
    train(pairs, tmp_path / "run", lambda *where: [JsonLines(*where[:2])])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "loss/dpo" in line]
    assert first["loss/dpo"] == pytest.approx(math.log(2), rel=1e-6) and first["loss/margin"] == 0
    assert last["loss/dpo"] < first["loss/dpo"] and last["loss/margin"] > 0.01
    before, after = [line["evaluation"]["pairs"] for line in lines if "evaluation" in line]
    assert after["preference_margin"] > before["preference_margin"] and 0 <= after["preference_accuracy"] <= 1


def test_a_missing_reference_and_a_layout_without_pairs_are_named(pairs):
    with pytest.raises(SpecError, match=r"objectives\.dpo reads the model 'reference': add it to references"):
        pairs.replace(references={})
    with pytest.raises(SpecError, match=r"objectives\.dpo: .* needs pairs of answers: set data\.layout\.pairs to true"):
        pairs.replace(data=pairs.data.replace(layout=pairs.data.layout.replace(pairs=False)))
