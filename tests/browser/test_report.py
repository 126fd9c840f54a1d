"""The report in a real browser: nothing fetched, nothing complained about, everything drawn and playable."""

import dataclasses

import chromium
import pytest

import made_up_report
from polygpt.report.page import render

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.find() is None, reason="no Chromium: apt-get install chromium, or set CHROMIUM"),
]


@pytest.fixture(scope="module")
def browser():
    page = chromium.Page(chromium.find())
    yield page
    page.close()


@pytest.fixture
def report(browser, tmp_path):
    def open_(content):
        path = tmp_path / "report.html"
        path.write_text(render(content), encoding="utf-8")
        browser.requests.clear()
        browser.complaints.clear()
        browser.open(path.as_uri())
        return browser

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
    durations = page.run(
        "Promise.all([...document.querySelectorAll('audio')].map(a => new Promise((done, fail) => {"
        " if (a.readyState > 0) return done(a.duration);"
        " a.onloadedmetadata = () => done(a.duration); a.onerror = () => fail(a.error); a.load(); })))"
    )
    assert len(durations) == 6 and all(0.4 < seconds < 1.1 for seconds in durations)


def test_every_section_is_there_and_linked(report):
    page = report(made_up_report.content())
    ids = page.run("[...document.querySelectorAll('section')].map(s => s.id)")
    assert ids == ["results", "gain", "curves", "samples", "details"]
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
        full, tasks={}, modalities={}, gains={}, charts=(), samples={}, environment=None, config=None
    )
    page = report(bare)
    assert page.complaints == []
    assert page.run("document.querySelectorAll('section').length") == 0
    assert "under way" in page.run("document.querySelector('.notes').textContent")
