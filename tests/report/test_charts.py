"""Curves and intervals as SVG."""

import json
import math
import re
from html import unescape

import numpy as np
import pytest

from polygpt.report import charts
from polygpt.report.content import Chart, Line


def drawn(html: str) -> dict:
    return json.loads(unescape(re.search(r'data-chart="(.*?)"', html).group(1)))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1500, "1500"), (14210, "14.2k"), (2.5e6, "2.5M"), (2e-4, "2e-4"), (-1.5e-5, "-1.5e-5")],
)
def test_figures_are_short(value, text):
    assert charts.figure(value) == text
    assert charts.figure(math.nan) == "–"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.019), (-3, 17), (1e5, 1.3e6), (0, 3010)])
def test_ticks_are_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 3 <= len(found) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert np.allclose(np.diff(found), found[1] - found[0])


def test_ticks_of_steps_are_whole():
    assert charts.ticks(2, 8, least=1.0) == [2, 4, 6, 8]
    assert charts.ticks(1, 2, least=1.0) == [1, 2]


def test_smoothing_is_centred_and_leaves_gaps():
    line = np.arange(50.0)
    np.testing.assert_allclose(charts.smooth(line, 5)[2:-2], line[2:-2])
    line[20] = np.nan
    smoothed = charts.smooth(line, 5)
    assert np.isnan(smoothed[20]) and np.isfinite(np.delete(smoothed, 20)).all()
    assert smoothed[21] == pytest.approx((19 + 21 + 22 + 23) / 4)


def test_long_curves_are_thinned_by_averaging():
    x, y = charts.thin(range(10_000), [0.0, 2.0] * 5_000)
    assert len(x) == charts.POINTS
    np.testing.assert_allclose(y, 1.0, atol=0.1)
    assert x[0] < 25 and x[-1] > 9_974


def test_a_chart_puts_points_where_they_belong():
    html = charts.chart(Chart("Loss", (Line("loss", (0, 100), (4.0, 2.0)),), "nats"))
    (x0, y0), (x1, y1) = re.findall(r"([\d.]+) ([\d.]+)", re.search(r'class="line s0" d="(.*?)"', html).group(1))
    assert float(x0) == charts.LEFT and float(x1) == charts.WIDTH - charts.RIGHT
    assert charts.TOP < float(y0) < float(y1) < charts.HEIGHT - charts.BOTTOM, "higher values lie higher"
    assert drawn(html)["lines"] == [{"name": "loss", "x": [0.0, 100.0], "y": [4.0, 2.0]}]


def test_unmeasured_values_are_gaps_and_an_unmeasured_curve_is_left_out():
    html = charts.chart(Chart("Loss", (Line("loss", (1, 2, 3, 4, 5), (1.0, 2.0, math.nan, 1.0, 2.0)),)))
    path = re.search(r'class="line s0" d="(.*?)"', html).group(1)
    assert path.count("M") == 2 and "nan" not in html
    assert drawn(html)["lines"][0]["y"][2] is None
    assert charts.chart(Chart("Loss", (Line("loss", (1, 2), (math.nan, math.nan)),))) == ""


def test_one_point_is_a_dot_and_a_constant_has_room():
    assert 'class="dot s0"' in charts.chart(Chart("Accuracy", (Line("a", (10,), (0.5,)),)))
    low, high = drawn(charts.chart(Chart("Rate", (Line("a", (1, 2), (3.0, 3.0)),))))["y"]
    assert low < 3 < high


def test_names_are_escaped():
    html = charts.chart(Chart("<script>", (Line("<b>", (1,), (1,)), Line("x", (1,), (1,)))))
    assert "<script>" not in html and "<b>" not in html


def test_intervals_mark_those_that_exclude_zero():
    rows = charts.intervals(
        {"a/image": {"gain": 1.0, "low": 0.5, "high": 1.5}, "a/audio": {"gain": 0.1, "low": -0.1, "high": 0.3}}
    )
    assert re.findall(r'<tr class="(\w+)">', rows) == ["sure", "unsure"]
    x = [float(value) for value in re.findall(r'class="(?:zero|mid)" x1="([\d.]+)"', rows)]
    assert x[0] == x[2] and x[1] > x[3] > x[0], "one axis for all rows"


def test_a_divided_bar_is_as_long_as_its_parts_together():
    html = charts.shares({"productive": 6.0, "input_wait": 0.0, "lost": 2.0})
    bars = [tuple(map(float, found)) for found in re.findall(r'x="([\d.]+)" y="0" width="([\d.]+)"', html)]
    assert bars == [(0, 750), (750, 0), (750, 250)]
    assert 'aria-label="productive 75.0%, lost 25.0%"' in html
