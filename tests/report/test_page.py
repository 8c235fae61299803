"""Pages without a browser: their structure, what they say, and that they load nothing."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from adaattn_core.errors import FileError
from adaattn_core.report.charts import Bar, Guide, Series, bar_chart, xy_chart
from adaattn_core.report.diff import diff_section, read_run
from adaattn_core.report.page import DATA_ID, Page, page_data
from adaattn_core.report.run_page import render_report
from adaattn_core.report.svg import RAMP, Axis, Mark, Scale, ink_on, ramp, short

VOID = {"meta", "input", "link", "br"}


def head(layer: str, number: int, **changes: Any) -> dict[str, Any]:
    certificate = {
        "guarantee": "sampled", "upper": 0.05 + 0.01 * number, "rows": 0.95, "confidence": 0.95,
        "estimate": 0.02, "terms": {}, "nonfinite": False,
    }  # fmt: skip
    row = {
        "batch": 0, "head": number, "layer": layer, "structure": "landmark", "qk": "f32",
        "parameters": {"kind": "landmark", "tau": 0.02}, "pv": "f32", "rank": 128, "share": 0.2,
        "reason": "cheapest", "certificate": certificate, "measured": 0.01,
        "measured_rows": 0.03,
    }  # fmt: skip
    return row | changes


def run(heads: list[dict[str, Any]]) -> dict[str, Any]:
    totals = {
        "share": 0.2, "seconds": 1.0, "dense_seconds": 2.0, "coverage": 1.0,
        "worst_measured": 0.01,
    }  # fmt: skip
    return {
        "heads": heads,
        "totals": totals,
        "settings": {"budget": "0.1"},
        "provenance": {"backend": "numpy"},
    }


@pytest.fixture
def body() -> dict[str, Any]:
    heads = [head(str(layer), number) for layer in range(3) for number in range(4)]
    heads[1] = head("0", 1, structure="dense", share=1.0, measured_rows=0.2)  # a false one
    return run(heads)


class Structure(HTMLParser):
    """Checks that elements nest, and collects marks, ids and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.marks: list[dict[str, str | None]] = []
        self.ids: Counter[str] = Counter()
        self.fetched: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = dict(attrs)
        assert len(facts) == len(attrs), f"an attribute twice: {attrs}"
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)
        if facts.get("class") == "mark":
            self.marks.append(facts)
        if facts.get("id"):
            self.ids[str(facts["id"])] += 1
        links = (facts.get("src"), facts.get("href") or "#")
        self.fetched += [x for x in links if x and not x.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        if self.open and not self.get_starttag_text().endswith("/>"):
            assert self.open.pop() == tag
        elif self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass


def test_the_page_is_whole_and_loads_nothing(body: dict[str, Any]) -> None:
    text = render_report("a run", body, budget=0.1, before=("earlier.json", body))
    found = Structure(text)
    assert found.fetched == []
    assert not re.search(r"https?://|url\(|@import|<iframe|<img|fetch\(", text)
    assert "default-src 'none'" in text
    assert [name for name, count in found.ids.items() if count > 1] == []


def test_pictures_come_before_tables(body: dict[str, Any]) -> None:
    text = render_report("a run", body)
    assert text.index("<svg") < text.index("<table")


def test_every_head_is_in_every_figure_and_in_the_table(body: dict[str, Any]) -> None:
    text = render_report("a run", body)
    keys = Counter(mark["data-key"] for mark in Structure(text).marks)
    assert set(keys) == {f"{h['layer']}/0/{h['head']}" for h in body["heads"]}
    assert set(keys.values()) == {3}  # map, certificates, shares
    assert len(re.findall(r'<tr data-key="', text)) == len(body["heads"])


def test_marks_say_what_they_show_to_readers_who_do_not_see(body: dict[str, Any]) -> None:
    marks = Structure(render_report("a run", body)).marks
    assert all(mark["role"] == "img" and mark["aria-label"] for mark in marks)
    false = [m for m in marks if "the certificate is false" in str(m["data-tip"])]
    assert {m["data-key"] for m in false} == {"0/0/1"}


def test_a_false_certificate_is_counted(body: dict[str, Any]) -> None:
    text = render_report("a run", body)
    assert "<b>11 of 12</b>certificates true" in text
    assert text.count('<span class="broken">no</span>') == 1


def test_infinite_and_missing_numbers_are_drawn(body: dict[str, Any]) -> None:
    for row in body["heads"]:
        row["certificate"]["upper"] = None
        row["measured_rows"] = row["measured"] = None
    text = render_report("a run", body, budget=0.1)
    Structure(text)
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    assert "at most inf" in text


def test_the_page_holds_its_numbers(body: dict[str, Any], tmp_path: Path) -> None:
    text = render_report("</script><b>", body)
    assert page_data(text)["heads"] == body["heads"]
    assert "</script><b>" not in text
    for name, content in (("run.html", text), ("run.json", json.dumps(body))):
        path = tmp_path / name
        path.write_text(content, "utf-8")
        assert read_run(path)["heads"] == body["heads"]


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", '{"heads": [{}]}', "<!DOCTYPE html><p>another page</p>", "\x00",
        json.dumps(run([head("0", 0, share="all of it")])),
        json.dumps(run([head("0", 0) | {"layer": ["0"]}])),
        json.dumps(run([head("0", 0, certificate={"upper": "small"})])),
        json.dumps(run([head("0", 0)]) | {"settings": ["budget"]}),
    ],
)  # fmt: skip
def test_what_is_no_run_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content, "utf-8")
    with pytest.raises(FileError) as caught:
        read_run(path)
    assert len(str(caught.value).splitlines()) == 3


def test_text_of_files_cannot_become_markup(body: dict[str, Any]) -> None:
    hostile = '"><script>alert(1)</script>\x1b[2J'
    body["heads"] = [head(hostile, 0, structure=hostile, reason=hostile, qk=hostile)]
    body["settings"] = {hostile: hostile}
    text = render_report(hostile, body, before=(hostile, copy.deepcopy(body)))
    Structure(text)
    assert "<script>alert" not in text
    assert "\x1b" not in text


# --- two runs ---------------------------------------------------------------------------------
def test_the_difference_names_what_changed(body: dict[str, Any]) -> None:
    after = copy.deepcopy(body)
    after["heads"][5] |= {"structure": "dense", "share": 1.0}
    after["heads"][6]["parameters"] = {"kind": "landmark", "tau": 0.1}
    after["heads"][7]["certificate"]["upper"] = 0.5
    after["settings"]["budget"] = "0.2"
    section = diff_section(body, after, "earlier.json")
    assert "2 of 12 heads are computed in another way now; 1 certificates are larger" in (
        section.lead
    )
    assert section.body.count("<b>yes</b>") == 2
    assert '<td class="text">budget</td><td class="text">0.1</td>' in section.body
    for figure in section.figures:
        assert figure.svg.count('data-key="1/0/1"') == 1


def test_equal_runs_do_not_differ(body: dict[str, Any]) -> None:
    section = diff_section(body, copy.deepcopy(body), "the same")
    assert "0 of 12 heads" in section.lead
    assert "Both were asked the same." in section.body


def test_one_layer_is_compared_whatever_it_is_called() -> None:
    before, after = run([head("old", 0), head("old", 1)]), run([head("new", 0)])
    lead = diff_section(before, after, "x").lead
    assert "0 of 1 heads" in lead
    assert "1 heads are only in the former run" in lead


# --- drawing ----------------------------------------------------------------------------------
@pytest.mark.parametrize("log", [False, True])
def test_scales_are_monotone_and_hold_their_ends(log: bool) -> None:
    scale = Scale(0.01, 100.0, 10.0, 200.0, log)
    places = [scale(x) for x in (0.001, 0.01, 0.1, 1, 50, 100, 1e9, math.inf)]
    assert places == sorted(places)
    assert places[0] == places[1] == 10.0
    assert places[-1] == places[-3] == 200.0
    assert scale(math.nan) == scale(None) == 10.0


@pytest.mark.parametrize(
    "ends", [(0.0, 1.0), (0.03, 0.2), (1.0, 2.0), (1e-9, 1e9), (5.0, 5.0), (0.0, 0.0)]
)
@pytest.mark.parametrize("log", [False, True])
def test_every_axis_has_ticks_inside(ends: tuple[float, float], log: bool) -> None:
    scale = Axis("x", log=log).scaled(ends, 0.0, 100.0)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 25
    assert all(scale.low <= t <= scale.high * (1 + 1e-9) for t in ticks)


def test_the_ramp_darkens_and_its_ink_is_legible() -> None:
    def light(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    colours = [ramp(n / 20) for n in range(21)]
    shades = [light(c) for c in colours]
    assert shades == sorted(shades, reverse=True)
    assert colours[0] == RAMP[0]
    assert colours[-1] == RAMP[-1]
    for colour, shade in zip(colours, shades, strict=True):
        ink = light(ink_on(colour).replace("#000", "#000000").replace("#fff", "#ffffff"))
        assert (max(shade, ink) + 0.05) / (min(shade, ink) + 0.05) >= 4.5  # WCAG 2.2, 1.4.3


def test_empty_figures_are_drawn_too() -> None:
    axes = Axis("x", log=True), Axis("y")
    assert "<svg" in xy_chart("nothing", [], *axes, guides=[Guide("here", 1.0)])
    assert "<svg" in xy_chart("one", [Series("a", [Mark(1.0, 0.0, "a")])], *axes)
    assert "<svg" in bar_chart("bars", [Bar("a", 0.0, "a")], "x")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (math.nan, "-"), (math.inf, "inf"), (0.0, "0"), (0.01234, "0.0123"),
        (1e-5, "1.00e-05"), (1234.5, "1,234"), (1e7, "1.00e+07"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert short(value) == text


def test_a_page_of_nothing_is_a_page() -> None:
    assert f'id="{DATA_ID}"' in Page("empty").render()
