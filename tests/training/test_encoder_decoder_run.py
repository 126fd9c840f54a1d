"""Runs of an encoder-decoder: denoising and captions in one configuration; training, evaluation, generation."""

import json
from pathlib import Path

import numpy as np
import pytest

import polygpt.api as pg
from polygpt.cli.main import main
from polygpt.errors import SpecError
from polygpt.generation.sampling import GREEDY
from polygpt.overrides import override
from polygpt.training.loggers import Silent
from polygpt.training.loop import train
from polygpt.training.run import open_run

pytestmark = pytest.mark.usefixtures("compiled_once")
TEXT = pg.TextFiles((str(Path(__file__).parents[2] / "LICENSE"),), unit="chunk", bytes=40)
CORRUPTION = pg.SpanCorruption(density=0.3, sentinels=4)
TASKS = {
    "corrupted": pg.Task(TEXT, transform=(CORRUPTION,)),
    "begun": pg.Task(TEXT, transform=(pg.PrefixLM(),)),
    "alone": pg.Task(TEXT),
    "digits": pg.Task(pg.Embedded("digits")),
}


def experiment() -> pg.Experiment:
    tower = pg.StackSpec(width=8, depth=0, attention=pg.MultiHead(heads=2))
    digits = pg.EvalTask(pg.Embedded("digits", "test"), limit=4, generate=True)
    return pg.Experiment(
        name="tiny",
        tokenizer=pg.SpecialTokens(pg.Bytes(), CORRUPTION.special),
        data=pg.DataSpec(TASKS, pg.LayoutSpec(seq_len=96, prompt_span="bidirectional"), batch_size=4),
        model=pg.EncoderDecoder(
            pg.DecoderSpec(width=16, depth=1, attention=pg.MultiHead(heads=2), dropout=0.1, block=pg.CrossSequential()),
            {"image": pg.ImageAdapter(pg.ImageFeatures(8, 8, channels=1), items=8, patch=4, tower=tower)},
        ),
        optim=pg.Optim(pg.WarmupCosine(3e-3, warmup=5), accumulate=2, ema=0.9),
        evaluation=pg.EvaluationSpec(
            {"digits": digits, "text": pg.EvalTask(pg.Transformed(TEXT, (CORRUPTION,)), limit=4)}, batch_size=4
        ),
        train=pg.TrainSpec(steps=4, log_every=2, checkpoint=pg.CheckpointSpec(every=2), parallel="single"),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(experiment(), folder, lambda *_: [Silent()])
    return folder


def test_a_run_is_evaluated_and_answers_from_its_sources(run):
    opened = open_run(run)
    found = pg.evaluate_run(opened)
    assert np.isfinite([found["tasks"][name]["loss"] for name in ("digits", "text")]).all()
    assert found["modality_gain"]["digits/image"]["gain"] != 0, "the picture in the source has a say"
    example = pg.Embedded("digits", "test").open()[0]
    assert opened.generate([list(example.prompt)], GREEDY.replace(max_tokens=3))[0].finish in ("eos", "length")


def test_its_parts_are_shown_and_its_pattern_can_be_changed(capsys, tmp_path):
    file = tmp_path / "own.py"
    file.write_text("from test_encoder_decoder_run import experiment\n")
    assert main(["model", "show", str(file), "--model.decoder.depth", "2", "--json"]) == 0
    parts = {part["name"]: part for part in json.loads(capsys.readouterr().out)["parts"]}
    assert parts["decoder"]["flops"] > parts["encoder"]["flops"] > 0 and parts["start"]["parameters"] == 16


def test_rows_without_marked_sources_are_refused():
    with pytest.raises(SpecError, match="data.layout.prompt_span is 'causal': EncoderDecoder finds the source"):
        override(experiment(), {"data.layout.prompt_span": "causal"})
