"""What the `launch` verbs refuse before anything is started, submitted or printed."""

from pathlib import Path

import pytest

TINY = str(Path(__file__).parents[1] / "training" / "tiny_experiment.py")


@pytest.mark.parametrize(
    ("words", "processes"),
    [
        (["local", "-n", "2"], 2),
        (["slurm", "--nodes", "2", "--tasks", "3"], 6),
        (["gke", "--on", "v5e:4x4", "--slices", "2"], 8),
        (["skypilot", "--on", "v5e:4x4"], 4),
        (["skypilot", "--on", "H100:8", "--nodes", "3"], 3),
    ],
)
def test_an_experiment_for_one_device_is_refused_in_the_words_of_training(polygpt, words, processes):
    code, out, said = polygpt("launch", *words, "--", "train", TINY, "--train.parallel", "single")
    assert (code, out) == (2, "")
    assert said == f"polygpt: train.parallel is 'single', but there are {processes} processes: choose 'sharded'\n"


@pytest.mark.parametrize("more", [[], ["--train.parallel", "auto"], ["--train.parallel=sharded"]])
def test_one_for_many_is_taken(polygpt, more):
    code, out, _ = polygpt("launch", "gke", "--on", "v5e:4x4", "--", "train", TINY, *more)
    assert code == 0 and "kind: JobSet" in out
    alone = ["--train.parallel", "single"]
    assert polygpt("launch", "gke", "--on", "v5e:2x2", "--", "train", TINY, *alone)[0] == 0  # one host, one process
