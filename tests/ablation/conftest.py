"""Ablations with results that no training made."""

import pytest

from own_ablation import CLAIMS, write_ablation, write_results


def loss(variant, at, seed):
    """A wider model is 0.1 better, a deeper one as good; seeds differ by more."""
    wobble = {("base", 0): 0.002, ("wide", 1): -0.003, ("deep_2", 2): 0.001}.get((variant, seed), 0.0)
    return {"base": 2.0, "wide": 1.9, "deep_2": 2.0}[variant] + 0.07 * seed + wobble


@pytest.fixture
def made(tmp_path):
    """Writes an ablation with its results; gives the folder."""

    def make(more: str = CLAIMS, loss=loss, name: str = "own", seeds: int | None = None):
        file = write_ablation(tmp_path / "experiments" / "ablations" / name, more)
        write_results(file, loss, seeds)
        return file.parent

    return make
