"""The quickstart trains with every attention variant, named on the command line and nothing else."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from polygpt.cli.main import main
from polygpt.lab import catalogue

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.py"
SMALL = ["--train.steps", "2", "--train.log_every", "1", "--train.evaluate_every", "null", "--data.batch_size", "2"]
SMALL += ["--model.decoder.depth", "1", "--model.adapters.image.tower.depth", "0", "--no-report", "--json"]
SMALL += ["--model.adapters.audio.tower.depth", "0"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", [catalogue.entry(cls).spec for cls in catalogue.variants()])
def test_the_quickstart_trains_with(spec, tmp_path):
    words = ["train", str(QUICKSTART), "--model.decoder.attention", spec, *SMALL, "--workdir", str(tmp_path / "run")]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0
    assert json.loads(out.getvalue())["step"] == 2
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["decoder"]["attention"]["class"] == spec
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(0 < loss < 7 for loss in losses), "near ln 258 = 5.55 at the start"
