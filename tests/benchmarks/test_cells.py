"""Passes over cells: what is counted, and pages that any kept report gives again."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from adaattn_bench.cells import OTHERS, OURS, TOKENS, WIDTH, cell_named, difference

pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["gpu_dense", "gpu_backward"])
def one(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(request.param)
    yield module.FORWARD if request.param == "gpu_dense" else module.BACKWARD
    sys.modules.pop(request.param)


def report_of(one: Any) -> dict[str, Any]:
    """Everybody as fast as the place of its name, but nobody third at the second cell."""
    cells = []
    for number, cell in enumerate(one.cells[:2]):
        times = {name: 1.0 + k for k, name in enumerate(one.colours)}
        if number:
            times.pop("FA3")
        cells.append({
            **dict(zip(("dim", "len", "causal"), cell, strict=True)),
            "tflops": {name: one.tflops(*cell, ms) for name, ms in times.items()},
            "ratio": min(times[n] for n in OTHERS if n in times) / times[OURS],
        })  # fmt: skip
    ceilings = {"matmul_tflops": 800.0, "copy_tbps": 3.0}
    return {
        "device": "a GPU", "driver": "1", "cuda": "13", "torch": "2", "cudnn": 9, "rounds": 1,
        "date": "today", "command": "this", "revision": "abc", "burst_ms": 1.0,
        "ceilings_before": ceilings, "ceilings_after": ceilings, "cells": cells,
    }  # fmt: skip


def test_a_kept_report_is_rendered_again(one: Any, tmp_path: Path) -> None:
    path = tmp_path / f"{one.stem}.json"
    path.write_text(json.dumps({**report_of(one), "note": "The kernel has changed since."}))
    one.main("x", ["--render", str(path)])
    text = path.with_suffix(".md").read_text()
    assert "\n\nThe kernel has changed since.\n\n" in text
    rows = [line for line in text.splitlines() if line.startswith(("| 64 |", "| 128 |"))]
    assert len(rows) == 2
    assert rows[1].count(" - ") == 1  # who was not there
    assert all(row.count("|") == len(one.colours) + 5 for row in rows)
    assert f"({one.stem}.png)" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_operations_are_counted_by_the_mask(one: Any) -> None:
    full, causal = (one.tflops(128, 4096, mask, 1.0) for mask in (False, True))
    assert full == 2 * causal
    assert full == 2 * one.products * TOKENS * WIDTH * 4096 / 1e9
    assert cell_named("128:16384:full") == (128, 16384, False)


def test_differences_are_the_largest_of_all_pairs() -> None:
    import torch  # noqa: PLC0415 -- skipped above without it

    one, twice = torch.ones(8), 2 * torch.ones(8)
    assert difference([one, twice], [one, one]) == pytest.approx(1.0)
