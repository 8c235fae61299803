"""The page in Chromium: what the mouse and the keyboard do. Skipped where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaattn_core.report.run_page import render_report


def head(layer: int, number: int) -> dict[str, Any]:
    share = 0.1 + 0.05 * ((3 * layer + number) % 7)
    return {
        "batch": 0, "head": number, "layer": str(layer), "qk": "f32", "pv": "f32", "rank": 64,
        "structure": ("landmark", "score_skip", "dense")[(layer + number) % 3], "share": share,
        "reason": "cheapest", "measured": 0.01, "measured_rows": 0.02 + share / 10,
        "parameters": {},
        "certificate": {
            "guarantee": "sampled", "upper": 0.03 + share / 8, "rows": 0.95, "confidence": 0.95,
            "estimate": 0.02, "terms": {}, "nonfinite": False,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    body = {
        "heads": [head(layer, number) for layer in range(4) for number in range(5)],
        "totals": {
            "share": 0.2, "seconds": 1.0, "dense_seconds": 2.0, "coverage": 1.0,
            "worst_measured": 0.01,
        },
        "settings": {}, "provenance": {},
    }  # fmt: skip
    path: Path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_report("a run", body, budget=0.1, before=("before", body)), "utf-8")
    browser.open(path)
    return browser


def mark(key: str) -> str:
    return f'svg .mark[data-key="{key}"]'


def test_nothing_is_fetched_and_nobody_complains(page: Any) -> None:
    assert [url for url in page.requested if not url.startswith("file:")] == []
    assert page.complaints == []
    assert page.picture().startswith(b"\x89PNG")


def test_pointing_shows_the_head_everywhere(page: Any) -> None:
    page.point(mark("2/0/3"))
    assert not page("tip.hidden")
    assert page("tip.textContent").startswith("layer 2 head 3\n")
    lit = page("[...document.querySelectorAll('.on')].map(e => e.dataset.key)")
    assert set(lit) == {"2/0/3"}
    assert len(lit) >= 5  # map, certificates, shares, two tables and the comparison's figures
    page.point("h1")
    assert page("tip.hidden")
    assert page("document.querySelectorAll('.on').length") == 0


def test_the_keyboard_walks_through_a_figure(page: Any) -> None:
    page("document.querySelector('svg .mark').focus()")
    here = "document.activeElement.dataset.key"
    assert page(here) == "0/0/0"
    for key, expected in (
        ("ArrowRight", "0/0/1"), ("ArrowDown", "1/0/1"), ("ArrowLeft", "1/0/0"),
    ):  # fmt: skip
        page.press(key)
        assert page(here) == expected
    assert "layer 1 head 0" in page("tip.textContent")
    page.press("Escape")
    assert page("tip.hidden")
    page.press("Tab")  # leaves the figure: one stop each, not one for every head
    first = "document.querySelector('svg').contains(document.activeElement)"
    assert not page(first)


def test_cells_change_their_face(page: Any) -> None:
    def faces() -> list[list[str]]:
        return page(
            "[...document.querySelectorAll('.cell')].map(c => [c.getAttribute('fill'),"
            " c.nextElementSibling.textContent])"
        )

    before = faces()
    page.point("input[value='1']", click=True)
    assert faces() != before
    assert all(text.endswith("%") and text[0].isdigit() for _, text in faces())
    page.point("input[value='0']", click=True)
    assert faces() == before


def place(page: Any, heading: str) -> int:
    """Number of a column: those that say nothing are left out."""
    names = page("[...heads.tHead.rows[0].cells].map(cell => cell.textContent)")
    return int(names.index(heading))


def column(page: Any, heading: str) -> list[str]:
    shown = "[...heads.tBodies[0].rows].filter(row => !row.hidden)"
    return list(page(f"{shown}.map(row => row.cells[{place(page, heading)}].textContent)"))


def test_headings_sort_and_words_filter(page: Any) -> None:
    button = f"#heads th:nth-child({place(page, 'certified upper') + 1}) button"
    page.point(button, click=True)
    up = [float(x) for x in column(page, "certified upper")]
    assert up == sorted(up)
    page.point(button, click=True)
    assert [float(x) for x in column(page, "certified upper")] == up[::-1]
    assert page("document.querySelector('#heads [aria-sort]').textContent") == "certified upper"
    field = "document.querySelector('input[data-table=\"heads\"]')"
    page(f"{field}.value = 'score_skip'; {field}.dispatchEvent(new Event('input'))")
    assert set(column(page, "structure")) == {"score_skip"}
    page(f"{field}.value = ''; {field}.dispatchEvent(new Event('input'))")


def test_columns_that_say_nothing_are_left_out(page: Any) -> None:
    names = page("[...heads.tHead.rows[0].cells].map(cell => cell.textContent)")
    assert "batch" not in names
    assert {"rank", "true rows", "held"} <= set(names)


def test_the_page_fits_a_narrow_window(page: Any) -> None:
    page.send(
        "Emulation.setDeviceMetricsOverride", width=420, height=800, deviceScaleFactor=1,
        mobile=False,
    )  # fmt: skip
    assert page("document.documentElement.scrollWidth") <= 420
    page.send("Emulation.clearDeviceMetricsOverride")


def test_numbers_can_be_read_back_on_the_page(page: Any) -> None:
    found = json.loads(page("document.getElementById('adaattn-data').textContent"))
    assert len(found["heads"]) == 20
