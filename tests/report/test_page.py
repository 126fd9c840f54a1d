"""The page's markup: safe, self-contained, legible without scripts."""

import base64
import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest

import made_up_report
from polygpt.report.content import Content, Item, Sample, Word
from polygpt.report.page import render

VOID = {"meta", "link", "img", "br", "line", "path", "circle"}


class Outline(html.parser.HTMLParser):
    """Checks that tags are closed in order; gathers ids and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.addresses = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.addresses += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def outline(page: str) -> Outline:
    parsed = Outline()
    parsed.feed(page)
    assert parsed.open == []
    return parsed


def test_markup_is_closed_and_points_nowhere_outside():
    found = outline(render(made_up_report.content()))
    assert len(set(found.ids)) == len(found.ids)
    for address in found.addresses:
        assert address.startswith("data:") or address[0] == "#" and address[1:] in found.ids


def test_the_browser_is_told_to_fetch_nothing():
    page = render(made_up_report.content())
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    rules = {rule.split()[0]: set(rule.split()[1:]) for rule in html.unescape(policy).split(";")}
    assert rules.pop("default-src") == {"'none'"}
    assert rules == {
        "img-src": {"data:"},
        "media-src": {"data:"},
        "style-src": {"'unsafe-inline'"},
        "script-src": {"'unsafe-inline'"},
    }
    assert page.index("Content-Security-Policy") < min(page.index("<style"), page.index("<link"), page.index("<script"))


def test_texts_of_users_are_only_text():
    evil = "<script>alert('x')</script>\"'>"
    item = dataclasses.replace(made_up_report.picture(np.random.default_rng(0), 0, 1), modality=evil)
    sample = Sample((evil, item), (Word(evil, True),), evil, True, evil)
    page = render(
        Content(
            title=evil,
            facts=((evil, evil),),
            tasks={evil: {evil: 1.0}},
            gains={evil: {"gain": 1.0, "low": 0.5, "high": 2.0}},
            samples={evil: (sample,)},
            config={evil: evil},
            notes=(evil,),
        )
    )
    assert page.count("<script>") == 1 and "alert('x')" not in page
    outline(page)


def test_results_are_rows_of_tasks_and_named_columns():
    page = render(made_up_report.content())
    head = re.search(r"<table class='results'><thead>(.*?)</thead>", page).group(1)
    columns = re.findall(r"scope=.col.>(.*?)</th>", head)
    expected = [
        "task",
        "accuracy",
        "WER",
        "loss",
        "perplexity",
        "bits per byte",
        "token accuracy",
        "examples",
    ]
    assert columns == expected
    fusion = re.search(r'<th scope="row">fusion</th>(.*?)</tr>', page).group(1)
    assert re.findall(r"<td[^>]*>(.*?)</td>", fusion) == ["94.7%", "–", "0.410", "–", "–", "90.0%", "1,000"]


def test_attention_is_written_for_every_layer_and_word():
    rng = np.random.default_rng(0)
    weights = rng.random((2, 3, 4)).astype(np.float32) / 10
    item = Item("image", made_up_report.picture(rng, 0, 3).png, (8, 8), (2, 2), attention={"self-attention": weights})
    page = render(Content("x", samples={"t": (Sample((item,), (Word("a"), Word("b"), Word("c")), "", None, ""),)}))
    data = json.loads(html.unescape(re.search(r'data-attention="(.*?)"', page).group(1)))
    rows = np.concatenate([weights.mean(axis=0, keepdims=True), weights])  # the mean of the layers comes first
    written = np.frombuffer(base64.b64decode(data["map"]), np.uint8).reshape(3, 3, 4) / 255
    np.testing.assert_allclose(written, rows / rows.max(axis=-1, keepdims=True), atol=1 / 255)
    np.testing.assert_allclose(np.reshape(data["share"], (3, 3)), rows.sum(axis=-1), atol=1e-4)
    shades = [float(value) for value in re.findall(r"<i style='--a:([\d.]+)'>", page)]
    np.testing.assert_allclose(shades, rows[0, 0] / rows[0, 0].max(), atol=1e-3)


def test_a_layer_without_weights_is_left_out_and_the_others_keep_their_numbers():
    rng = np.random.default_rng(0)
    weights = rng.random((3, 1, 4)).astype(np.float32) / 10
    weights[1] = np.nan
    item = Item("image", made_up_report.picture(rng, 0, 1).png, (8, 8), (2, 2), attention={"self-attention": weights})
    page = render(Content("x", samples={"t": (Sample((item,), (Word("a"),), "", None, ""),)}))
    maps = re.findall(r'<option value="(\d)">([^<]*)</option>', page)
    assert maps == [("0", "all layers"), ("1", "layer 1"), ("3", "layer 3")]
    data = json.loads(html.unescape(re.search(r'data-attention="(.*?)"', page).group(1)))
    shares = [weights[[0, 2]].mean(axis=0).sum(), weights[0].sum(), 0, weights[2].sum()]
    np.testing.assert_allclose(np.ravel(data["share"]), shares, atol=1e-4)


def test_kinds_of_attention_are_shown_apart():
    rng = np.random.default_rng(0)
    cross, own = (rng.random((2, 1, 4)).astype(np.float32) / 10 for _ in range(2))
    own[1] = np.nan
    kinds = {"cross-attention": cross, "self-attention": own}
    item = Item("image", made_up_report.picture(rng, 0, 1).png, (8, 8), (2, 2), attention=kinds)
    page = render(Content("x", samples={"t": (Sample((item,), (Word("a"),), "", None, ""),)}))
    maps = dict(re.findall(r'<option value="(\d)">([^<]*)</option>', page))
    names = ["cross-attention, all layers", "cross-attention, layer 1", "cross-attention, layer 2"]
    assert list(maps.values()) == [*names, "self-attention, all layers", "self-attention, layer 1"]
    data = json.loads(html.unescape(re.search(r'data-attention="(.*?)"', page).group(1)))
    shares = [cross.mean(axis=0).sum(), *cross.sum(axis=(1, 2)), own[0].sum(), own[0].sum(), 0]
    np.testing.assert_allclose(np.ravel(data["share"]), shares, atol=1e-4)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Content) if field.name != "title"])
def test_any_part_may_be_missing(field):
    full = made_up_report.content()
    without = dataclasses.replace(full, **{field: type(getattr(full, field))()})
    page = render(without)
    outline(page)
    assert len(page) < len(render(full))
