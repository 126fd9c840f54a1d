"""Infills by a run: its prompts, the same text from Python and from the command line, and a model that learned none."""

import json
from pathlib import Path

import jax
import pytest

from polygpt.cli import generate as verb
from polygpt.cli.main import main
from polygpt.data.example import Text
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.sources.embedded import Embedded
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.data.tokenizers.special_tokens import SpecialTokens
from polygpt.data.transforms.fill_in_the_middle import MIDDLE, PREFIX, SUFFIX, FillInTheMiddle
from polygpt.data.transforms.ul2 import UL2, Denoiser
from polygpt.errors import UserError
from polygpt.generation.sampling import Sampling
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import Constant
from polygpt.training.experiment import Experiment, TrainSpec
from polygpt.training.run import Run

SAMPLING = Sampling(temperature=1.0, max_tokens=8)


def opened(*transforms) -> Run:
    """A run with random parameters."""
    special = tuple(dict.fromkeys(name for one in transforms for name in one.special))
    experiment = Experiment(
        "infill",
        DataSpec({"text": Task(Embedded("text"), transform=transforms)}, LayoutSpec(64), 2),
        Optim(Constant(1e-3)),
        TrainSpec(1),
        ModelSpec(DecoderSpec(width=16, depth=1)),
        SpecialTokens(Bytes(), special),
    )
    tokenizer = experiment.tokenizer.build()
    model = bind(experiment.model, tokenizer.vocabulary)
    return Run(experiment, model, tokenizer, model.init(jax.random.key(0)), 7, Path("runs/infill"))


def test_a_run_writes_into_gaps_as_the_command_does(monkeypatch, capsys):
    run = opened(FillInTheMiddle(0.5))
    before, after = [Text("In the "), Text("beginning")], [Text(" the heaven")]
    prompt = run.infill_prompt(before, after)
    special = [part.text for part in prompt if part.special]
    assert special == [PREFIX, SUFFIX, MIDDLE] and [part.text for part in prompt[1:3]] == ["In the ", "beginning"]
    (written,) = run.infill([(before, after)], SAMPLING)
    assert written == run.generate([prompt], SAMPLING)[0] and len(written.tokens) <= 8
    monkeypatch.setattr(verb, "open_named", lambda arguments: run)
    words = ["generate", "runs/infill", "--text", "In the ", "--text", "beginning", "--suffix", " the heaven"]
    words += ["--temperature", "1", "--max_tokens", "8"]
    assert main([*words, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["text"], done["suffix"], len(done["prompt"])) == (written.text, " the heaven", 2)
    assert main(words) == 0 and capsys.readouterr().out == verb.printable(written.text) + "\n"
    assert main(["generate", "runs/infill", "--suffix", "only", *words[-4:]]) == 0
    assert main(["generate", "runs/infill", "--suffix", "only", "--interactive"]) == 2
    assert "--interactive and --suffix cannot be combined" in capsys.readouterr().err


def test_the_order_is_one_that_was_trained_also_within_a_mixture():
    run = opened(UL2((Denoiser("[M]", FillInTheMiddle(1.0, spm=1.0)),)))
    assert [part.text for part in run.infill_prompt([Text("a")], [Text("c")])] == [PREFIX, SUFFIX, "c", MIDDLE, "a"]


@pytest.mark.parametrize("transforms", [(), (FillInTheMiddle(0.0),)])
def test_a_model_that_was_not_trained_to_fill_in_says_so(transforms):
    with pytest.raises(UserError, match="^runs/infill: the model was not trained to fill in the middle: train it with"):
        opened(*transforms).infill([([Text("a")], [Text("c")])])
