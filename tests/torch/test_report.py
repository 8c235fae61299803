"""model_report: what ran is what is reported, saved and replayed."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import adaattn_torch
from adaattn_core import FixedPolicy
from adaattn_core.errors import ArgumentError
from adaattn_core.policies.calibrated import CalibratedPolicy
from adaattn_torch.report import model_report


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*parts, is_causal=True)
        return x + out.transpose(1, 2).flatten(2)


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(Layer(), Layer())


def test_report_names_every_head_and_its_certificate(model) -> None:
    report = model_report(model, torch.randn(2, 65, 32), budget=0.1)
    seen = {(head.layer, head.sequence, head.head) for head in report.heads}
    assert seen == {(layer, s, h) for layer in "01" for s in range(2) for h in range(4)}
    assert all(head.upper <= 0.1 for head in report.heads)
    assert "dense" in str(report)
    assert json.loads(json.dumps(report.to_json()))["heads"][0]["layer"] == "0"


def test_saved_plans_replay_the_run(model, tmp_path) -> None:
    x = torch.randn(1, 65, 32)
    report = model_report(model, x, budget=0.1)
    report.save_plans(tmp_path)
    frozen = CalibratedPolicy(tmp_path)
    again = model_report(model, x, budget=0.1, policy=frozen)
    for layer, plans in report.plans.items():
        assert again.plans[layer][0].heads == plans[0].heads
        assert again.plans[layer][0].policy == "calibrated"


def test_calibration_freezes_what_a_few_batches_were_given(model) -> None:
    long, short = torch.randn(1, 300, 32), torch.randn(1, 40, 32)
    frozen = adaattn_torch.calibrate(model, [short, (long,), short], 0.3)
    by_hand = adaattn_torch.model_report(model, long, 0.3, policy=frozen)
    assert {plans[0].policy for plans in by_hand.plans.values()} == {"calibrated"}
    coarse = adaattn_torch.calibrate(model, [short], 1.0, policy=FixedPolicy(qk="i8", pv="i8"))
    again = adaattn_torch.model_report(model, short, 1.0, policy=coarse).plans["0"][0]
    assert {head.qk for head in again.heads.values()} == {"i8"}
    with pytest.raises(ArgumentError, match="no batch"):
        adaattn_torch.calibrate(model, [], 0.1)


def test_entropy_is_that_of_measured_heads(model) -> None:
    report = model_report(model, torch.randn(1, 300, 32), budget=0.1, policy="entropy")
    measured = [head for head in report.heads if head.entropy is not None]
    assert len(measured) == 8
    assert all(0 <= head.entropy <= 1 for head in measured)
    exact = model_report(model, torch.randn(1, 65, 32))
    assert all(head.entropy is None for head in exact.heads)


def test_fallbacks_are_listed_and_nothing_is_an_error(model) -> None:
    class Dropping(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    adaattn_torch.info.forget_warnings()
    with pytest.warns(adaattn_torch.FallbackWarning):
        report = model_report(Dropping(), torch.randn(1, 2, 5, 8), budget=0.1)
    assert report.fell_back == {"": "dropout"}
    with pytest.raises(ArgumentError, match="without a call"):
        model_report(torch.nn.Identity(), torch.randn(3))


def test_figure_is_written(model, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "report.png"
    model_report(model, torch.randn(1, 65, 32), budget=0.1).plot(path)
    assert path.stat().st_size > 1000


def test_names_that_are_imported_late() -> None:
    assert adaattn_torch.model_report is model_report
    assert callable(adaattn_torch.register_transformers)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = adaattn_torch.nothing
