"""Decode steps on a GPU: the page is what its kept figures say; the picture is drawn."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "benchmarks" / "gpu_decode.json"


@pytest.fixture
def report_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("decode_report")
    sys.modules.pop("decode_report")


def test_the_page_is_what_its_figures_say(report_module: Any) -> None:
    report = json.loads(KEPT.read_text())
    assert report_module.markdown(report) == KEPT.with_suffix(".md").read_text()


def test_it_is_drawn_with_and_without_real_caches(report_module: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = json.loads(KEPT.read_text())
    for real in (report["real"], []):
        report_module.plot(report | {"real": real}, tmp_path / "drawn.png")
        assert (tmp_path / "drawn.png").stat().st_size > 5000
