"""What pictures show, and that the same content gives the same bytes."""

import dataclasses
import hashlib
import math
import re
import subprocess
import sys
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from scipy import stats

from polygpt.ablation import pictures, results
from polygpt.ablation.charts import Chart, Panel, Series, charts, is_numeric, spans_a_decade
from polygpt.ablation.study import load_ablation

RATES = "over={'rate': grid('optim.schedule.peak_lr', 1e-1, 1e-2, 1e-3)},\ndiverged=9.0,"
BOTH = RATES.replace("1e-3)}", "1e-3), 'rows': grid('data.batch_size', 2, 4)}")
READS = "reads={'length': {32: 'text/loss', 64: 'text/perplexity'}},"


def shown(folder) -> dict[str, Chart]:
    found = results.frame(load_ablation(folder / "experiment.py"), results.read(folder / "results.jsonl"))
    return {chart.name: chart for chart in charts(found)}


def rated(variant, at, seed):
    return None if at["rate"] == 0.1 and seed == 0 else 2.0 + 0.1 * seed + at["rate"] + at.get("rows", 0)


def test_variants_are_points_with_intervals_beside_the_papers(made):
    found = shown(made())
    assert set(found) == {"variants", "training_loss", "held_out"}
    ours, theirs = found["variants"].panels
    assert [series.name for series in ours.series] == ["base", "wide", "deep_2"]
    wide = ours.series[1]
    assert wide.y[0] == pytest.approx(np.mean(wide.seeds)) and len(wide.seeds) == 4
    half = stats.t.ppf(0.975, 3) * stats.sem(wide.seeds)
    assert wide.high[0] - wide.y[0] == pytest.approx(half)
    assert [series.y[0] for series in theirs.series][:2] == [1.99, 1.944] and math.isnan(theirs.series[2].y[0])
    assert theirs.title == "paper: Table 1" and theirs.y_label == "log-perplexity"


def test_curves_over_steps_have_bands_over_seeds(made):
    (panel,) = shown(made())["training_loss"].panels
    line = panel.series[0]
    assert line.x == (1.0, 2.0, 3.0, 4.0) and panel.x_label == "steps"
    curve = [4.5 + seed / 50 for seed in range(4)]
    assert line.y[0] == pytest.approx(np.mean(curve))
    assert line.high[0] - line.y[0] == pytest.approx(stats.t.ppf(0.975, 3) * stats.sem(curve))
    (held_out,) = shown(made(name="again"))["held_out"].panels
    assert held_out.series[0].x == (2.0, 3.0, 4.0)


def test_curves_run_over_tokens_where_these_are_held_equal(made):
    (panel,) = shown(made("budget=Budget('tokens'),"))["training_loss"].panels
    assert panel.x_label == "tokens" and panel.series[0].x == (96.0, 192.0, 288.0, 384.0)


def test_a_numeric_factor_has_a_curve_and_divergence_is_marked(made):
    found = shown(made(RATES, rated))
    assert set(found) == {"over_rate", "training_loss", "held_out"}
    (panel,) = found["over_rate"].panels
    assert panel.log_x and [series.name for series in panel.series] == ["base", "wide", "deep_2"]
    line = panel.series[0]
    assert line.x == (0.001, 0.01, 0.1) and line.diverged == (0.1,)
    assert line.y[:2] == pytest.approx((2.151, 2.16)) and math.isnan(line.y[2])
    assert "runs diverged there" in found["over_rate"].caption


def test_two_factors_have_a_panel_a_variant_and_a_line_a_value(made):
    found = shown(made(BOTH, rated))
    assert {"over_rate", "over_rows"} <= set(found)
    assert [panel.title for panel in found["over_rate"].panels] == ["base", "wide", "deep_2"]
    assert [series.name for series in found["over_rate"].panels[0].series] == ["rows 2", "rows 4"]
    four = found["over_rate"].panels[0].series[1]
    assert four.y[:2] == pytest.approx((6.151, 6.16))
    assert found["over_rows"].panels[0].series[0].name == "rate 0.1"
    (panel,) = found["training_loss"].panels
    assert not any(series.diverged for series in panel.series), "each variant where it did best"


def test_a_factor_that_is_read_at_has_a_curve(made):
    (panel,) = shown(made(READS))["over_length"].panels
    low, high = panel.series[0].y
    assert panel.series[0].x == (32.0, 64.0) and high - low == pytest.approx(0.1) and not panel.log_x


def test_when_axes_are_logarithmic():
    assert spans_a_decade((0.01, 0.1)) and not spans_a_decade((64, 512)) and not spans_a_decade((0, 100))
    assert is_numeric((1, 2.0)) and not is_numeric(("a", "b")) and not is_numeric((1,))


SCRIPT = """
import hashlib, sys
from pathlib import Path
from polygpt.ablation import pictures, results
from polygpt.ablation.charts import charts
from polygpt.ablation.study import load_ablation
folder = Path(sys.argv[1])
frame = results.frame(load_ablation(folder / "experiment.py"), results.read(folder / "results.jsonl"))
print(*(hashlib.sha256(pictures.draw(chart)[1]).hexdigest() for chart in charts(frame)[:1]))
"""


def test_another_process_draws_the_same_bytes(made):
    folder = made()
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": None, "axes.grid": False}):
        here = hashlib.sha256(pictures.draw(shown(folder)["variants"])[1]).hexdigest()
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == here


def test_a_picture_knows_what_it_shows_and_no_date(made):
    chart = shown(made())["variants"]
    suffix, content = pictures.draw(chart)
    assert suffix == ".svg" and pictures.fingerprint_of(content) == pictures.fingerprint(chart)
    assert b"<dc:date>" not in content and len(content) < 60_000
    panel = chart.panels[0]
    moved = dataclasses.replace(panel.series[0], y=(panel.series[0].y[0] + 1e-3,))
    other = dataclasses.replace(chart, panels=(dataclasses.replace(panel, series=(moved, *panel.series[1:])),))
    assert pictures.fingerprint(other) != pictures.fingerprint(chart)
    assert pictures.fingerprint_of(b"<svg>by somebody else</svg>") is None


def test_a_large_picture_is_a_png():
    x = tuple(map(float, range(700)))
    waves = [tuple(np.sin(np.arange(700) * (i + 1) / 30)) for i in range(8)]
    series = tuple(Series(f"v{i}", x, y, tuple(np.array(y) - 1), tuple(np.array(y) + 1)) for i, y in enumerate(waves))
    chart = Chart("large", "Large.", "curves", (Panel("", series, "steps", "loss"),), "lower")
    suffix, content = pictures.draw(chart)
    assert suffix == ".png" and content[:4] == b"\x89PNG"
    assert pictures.fingerprint_of(content) == pictures.fingerprint(chart)
    assert content == pictures.draw(chart)[1]


def contrast(first: str, second: str) -> float:
    """How far apart two colours are to eyes without the pigment for medium wavelengths.

    Viénot, Brettel and Mollon 1999, "Digital video colourmaps for checking the legibility of displays by dichromats".
    """
    deuteranope = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
    return float(np.linalg.norm(deuteranope @ (np.array(to_rgb(first)) - np.array(to_rgb(second)))))


def test_the_palette_can_be_told_apart_by_the_colour_blind():
    assert min(contrast(*pair) for pair in combinations(pictures.COLOURS, 2)) > 0.15
    assert contrast("#d62728", "#2ca02c") < contrast("#d55e00", "#009e73"), "red and green would be worse"


def test_more_variants_than_colours_differ_by_dash():
    series = tuple(Series(f"v{i}", (0.0, 1.0), (1.0 * i, 2.0), (0.0, 1.0), (2.0, 3.0)) for i in range(9))
    chart = Chart("many", "Many.", "curves", (Panel("", series, "steps", "loss"),), "lower")
    svg = pictures.draw(chart)[1].decode()
    assert "stroke-dasharray" in svg and all(re.search(rf">v{i}<", svg) for i in range(9))
