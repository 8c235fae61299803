"""Prices of PyTorch's operations: measured, kept, shown, and what plans are made with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from adaattn_core import Mask, attention
from adaattn_core.cli.app import build_app
from adaattn_core.costs import get_cost_model
from adaattn_torch import plugin
from adaattn_torch.backend import TorchBackend, costing, pricing


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAATTN_CACHE_DIR", str(tmp_path))
    costing._read.cache_clear()


def test_nothing_is_known_before_it_is_measured() -> None:
    assert costing.known() is None
    assert not TorchBackend().capabilities().costs


def test_a_call_does_not_look_for_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call asks for its backend's capabilities: no file is opened, nothing is hashed."""
    model = replace(get_cost_model("torch_cpu"), softmax_rate=2e9, source="today")
    costing.keep("cpu", model)
    assert TorchBackend().capabilities().costs == {"cpu": model}

    def again(*_: object) -> None:
        raise AssertionError("looked for again")

    monkeypatch.setattr(costing, "_read", again)
    monkeypatch.setattr(costing, "_made_for", again)
    assert TorchBackend().capabilities().costs == {"cpu": model}


def test_what_is_measured_is_a_whole_model() -> None:
    model = pricing.measure("cpu", rows=1024)
    base = get_cost_model("torch_cpu")
    assert model.flops.keys() == base.flops.keys()
    rates = [*model.flops.values(), *model.efficiency.values(), model.softmax_rate]
    assert all(0 < x < math.inf for x in (*rates, model.head_seconds, model.key_seconds))
    assert all(share <= 1 for share in model.efficiency.values())
    assert "measured on cpu" in model.source


def test_prices_are_kept_and_come_back(tmp_path: Path) -> None:
    model = replace(get_cost_model("torch_cpu"), softmax_rate=2e9, source="today")
    path = costing.keep("cpu", model)
    assert path.is_relative_to(tmp_path / "prices")
    assert costing.known() == model
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)  # other prices
    try:
        assert costing.known() is None
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: text.replace("2000000000.0", "-1"),
        lambda text: text.replace("2000000000.0", '"fast"'),
        lambda text: text.replace("2000000000.0", "NaN"),
        lambda text: text.replace('"f64"', '"f63"'),
        lambda text: json.dumps([text]),
    ],
)
def test_a_damaged_file_is_as_none(damage: Callable[[str], str]) -> None:
    model = replace(get_cost_model("torch_cpu"), softmax_rate=2e9)
    path = costing.keep("cpu", model)
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    costing._read.cache_clear()
    assert costing.known() is None


@pytest.mark.parametrize("share", [1.0, 1e-6])
def test_plans_are_made_with_them(share: float) -> None:
    """Where landmarks reach nothing of the machine's rates nobody looks for any."""
    base = get_cost_model("torch_cpu")
    cheap = {"landmark": share, "rows": share}
    costing.keep("cpu", replace(base, efficiency=cheap, head_seconds=1e-9, key_seconds=1e-12))
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 2048, 16), dtype=np.float32) for _ in range(3))
    result = attention(q, k, v, mask=Mask.causal(), budget=0.5, backend="torch", seed=0)
    assert (result.stats is not None) == (share == 1.0)


def test_warmup_measures_once_and_doctor_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(device: str) -> object:
        asked.append(device)
        return replace(get_cost_model("torch_cpu"), source="measured in a test")

    monkeypatch.setattr(pricing, "measure", measure)
    said: list[str] = []
    plugin.adaattn_warm_up(said.append, None)
    plugin.adaattn_warm_up(said.append, None)
    plugin.adaattn_warm_up(said.append, "sm_90a")  # for a machine elsewhere
    devices = TorchBackend().capabilities().array_devices
    assert asked == list(devices)
    assert len(said) == 2 * len(devices)
    assert "GFLOP/s" in said[0]
    found = CliRunner().invoke(build_app(), ["doctor", "--json"])
    prices = {f["name"]: f["detail"] for f in json.loads(found.stdout)["findings"]}
    assert prices["prices torch"] == "measured in a test"
    assert prices["prices numpy"] == get_cost_model("cpu").source
