"""The report in a real browser: nothing fetched, nothing complained about, everything drawn and playable."""

import dataclasses
import json
import shutil

import chromium
import pytest

import made_up_report
from polygpt.report.finish import write_report
from polygpt.report.page import render
from polygpt.training.loggers import JsonLines
from polygpt.training.run import open_run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.find() is None, reason="no Chromium: apt-get install chromium, or set CHROMIUM"),
]

DURATIONS = (
    "Promise.all([...document.querySelectorAll('audio')].map(a => new Promise((done, fail) => {"
    " if (a.readyState > 0) return done(a.duration);"
    " a.onloadedmetadata = () => done(a.duration); a.onerror = () => fail(a.error); a.load(); })))"
)
"""The lengths of all recordings, once the browser has read them."""


@pytest.fixture(scope="module")
def browser():
    page = chromium.Page(chromium.find())
    yield page
    page.close()


def look(browser, path):
    browser.requests.clear()
    browser.complaints.clear()
    browser.open(path.as_uri())
    return browser


@pytest.fixture
def report(browser, tmp_path):
    def open_(content):
        path = tmp_path / "report.html"
        path.write_text(render(content), encoding="utf-8")
        return look(browser, path)

    return open_


def test_nothing_is_fetched_and_nothing_complains(report):
    page = report(made_up_report.content())
    page.run("new Promise(done => setTimeout(done, 200))")
    outside = [url for url in page.requests if not url.startswith(("file:", "data:"))]
    assert len(page.requests) >= 1 and outside == []
    assert page.complaints == []


def test_the_page_itself_refuses_the_network(report):
    page = report(made_up_report.content())
    refused = "fetch('http://127.0.0.1:9/').then(() => 'fetched', () => 'refused')"
    assert page.run(refused) == "refused"
    assert any("Content Security Policy" in text for text in page.complaints)


def test_pictures_are_drawn_and_recordings_play(report):
    page = report(made_up_report.content())
    assert page.run("[...document.images].length") >= 14
    assert page.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    durations = page.run(DURATIONS)
    assert len(durations) == 6 and all(0.4 < seconds < 1.1 for seconds in durations)


def test_every_section_is_there_and_linked(report):
    page = report(made_up_report.content())
    ids = page.run("[...document.querySelectorAll('section')].map(s => s.id)")
    assert ids == ["results", "gain", "curves", "time", "samples", "details"]
    assert page.run("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))") == ids
    assert page.run("document.querySelectorAll('.chart svg path.line').length") == 7
    assert page.run("document.querySelectorAll('details[open]').length") == 0, "details begin folded"
    assert page.run("document.querySelectorAll('.mark.right').length") == 5


def test_a_word_shows_its_own_attention(report):
    page = report(made_up_report.content())
    card = "document.querySelector('.sample:has(button.word:nth-of-type(4))')"
    shades = f"[...{card}.querySelectorAll('.map i')].map(i => i.style.getPropertyValue('--a')).join()"
    share = f"{card}.querySelector('figcaption output').textContent"
    first = page.run(shades), page.run(share)
    page.run(f"{card}.querySelectorAll('button.word')[2].click()")
    second = page.run(shades), page.run(share)
    assert page.run(f"{card}.querySelectorAll('button.word')[2].getAttribute('aria-pressed')") == "true"
    layer = (
        f"{card}.querySelector('select').value = '1'; {card}.querySelector('select').dispatchEvent(new Event('change'))"
    )
    page.run(layer)
    third = page.run(shades), page.run(share)
    assert len({first, second, third}) == 3
    assert all("% of attention" in share for _, share in (first, second, third))


def test_a_curve_tells_its_values_under_the_pointer(report):
    page = report(made_up_report.content())
    told = page.run(
        "(() => { const chart = document.querySelectorAll('.chart')[1]; const svg = chart.querySelector('svg');"
        " const box = svg.getBoundingClientRect();"
        " svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - box.width * 14 / 520}));"
        " return chart.querySelector('output').textContent; })()"
    )
    assert told.startswith("step 3000: text 0.86") and "fusion" in told


def test_dark_and_light(report):
    page = report(made_up_report.content())
    colour = "getComputedStyle(document.body).backgroundColor"
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    dark = page.run(colour)
    page.run("document.getElementById('theme').click()")
    light = page.run(colour)
    page.call("Emulation.setEmulatedMedia", features=[])
    assert dark == "rgb(19, 21, 26)" and light == "rgb(247, 246, 243)"


@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_sticks_out_sideways(report, width):
    page = report(made_up_report.content())
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    assert page.run("document.documentElement.scrollWidth") <= width
    page.call("Emulation.clearDeviceMetricsOverride")


def test_a_run_with_nothing_to_show_still_has_a_page(report):
    full = made_up_report.content()
    bare = dataclasses.replace(
        full, tasks={}, modalities={}, gains={}, charts=(), time={}, samples={}, environment=None, config=None
    )
    page = report(bare)
    assert page.complaints == []
    assert page.run("document.querySelectorAll('section').length") == 0
    assert "under way" in page.run("document.querySelector('.notes').textContent")


def test_the_report_of_a_real_run(browser, trained, tmp_path):
    """Its results, curves, pictures and recordings; without its evaluation.json, the figures of training."""
    page = look(browser, trained.run / "report.html")
    assert page.complaints == [] and all(url.startswith(("file:", "data:")) for url in page.requests)
    assert page.run("[...document.querySelectorAll('table.results th[scope=row]')].map(h => h.textContent)")[0] == "own"
    assert page.run("[...document.querySelectorAll('.chart figcaption')].map(c => c.textContent)")[0].startswith(
        "Train"
    )
    assert page.run("document.querySelectorAll('.chart svg path.line').length") >= 3
    assert page.run("document.querySelectorAll('#samples article').length") == 6
    assert page.run("document.images.length") >= 6
    assert page.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    durations = page.run(DURATIONS)
    assert len(durations) >= 2 and all(0.3 < seconds < 0.6 for seconds in durations)

    run = shutil.copytree(trained.run, tmp_path / "run")
    results = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").unlink()
    logger = JsonLines(run, 3)
    for step in (1, 2, 3):
        logger.evaluation(step, {name: results[name] for name in ("tasks", "modalities", "modality_gain")})
    logger.close()
    page = look(browser, write_report(open_run(run)))
    titles = page.run("[...document.querySelectorAll('.chart figcaption')].map(c => c.textContent)")
    assert any(title.startswith("Held-out loss") for title in titles)
    assert page.run("document.querySelectorAll('table.results').length") >= 1 and page.complaints == []
