"""Measuring prices: a few calls on heads drawn at random, some seconds in all."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from adaattn_core.costs import CostModel, get_cost_model
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_core.stats import MeasureRequest
from adaattn_torch.backend import costing
from adaattn_torch.backend.backend import SIZES, TorchBackend
from adaattn_torch.backend.tensors import DTYPES

HEADS = 4
DENSE_ROWS, FAR_ROWS = 4096, 8192
ROWS = 288
"""Of a head: about what a certificate draws."""
REPEATS = 4
TAUS = (0.1, 0.02)


def measure(device: str, rows: int = FAR_ROWS) -> CostModel:
    """Time dense heads in every format, landmarks, exact rows and a look at heads.

    Parameters
    ----------
    device : str
        Kind of device.
    rows : int
        Rows of the heads that landmarks run on; dense ones have half as many.
    """
    base = get_cost_model(costing.TARGET)
    with torch.inference_mode():
        model = _dense(base, device, rows // 2)
        return _far(model, device, rows)


def _dense(model: CostModel, device: str, rows: int) -> CostModel:
    """Rates of the formats and of the softmax, from heads of two sizes."""
    backend, visible = TorchBackend(), rows * (rows + 1) / 2

    def score_seconds(dim: int, name: str) -> float:
        q, k, v = (x.to(DTYPES[name]) for x in _heads(rows, dim, device))
        taken = _seconds(lambda: backend.forward(q, k, v, mask=Mask.causal()), device)
        return taken / HEADS / visible

    small, large = score_seconds(64, "f32"), score_seconds(128, "f32")
    # 4 dim operations a score and one exponential; what is left of the former is the latter.
    product = max(large - small, 0.5 * small) / 64
    softmax = max(small - 64 * product, 0.02 * small)
    rates = {"f32": 4 / product}
    for name in model.flops.keys() - rates.keys():
        spent = max(score_seconds(64, name) - softmax, 0.1 * small)
        rates[name] = 4 * 64 / spent
    flops = {name: rates[name] for name in model.flops}
    return replace(model, flops=flops, softmax_rate=1 / softmax)


def _far(model: CostModel, device: str, rows: int) -> CostModel:
    """Find what landmarks, certificates and a look at heads reach of these rates."""
    backend = TorchBackend()
    problem = AttentionProblem.from_arrays(*_heads(rows, 64, device), mask=Mask.causal())
    visible = rows * (rows + 1) / 2
    plan = Plan.uniform(problem, HeadPlan(structure=replace(SIZES, tau=TAUS[0])), seed=1)

    def scores(share: float) -> float:
        return model.scores_seconds(share * visible, share * visible, 64, 64, "f32", "f32")

    def look() -> None:
        structures = tuple(replace(SIZES, tau=tau) for tau in TAUS)
        request = MeasureRequest(
            rows=0.97, structures=structures, enough_error=0.065, formats=(), spectrum=False,
            seed=1,
        )  # fmt: skip
        backend.measure(problem, request)

    raw = backend.run(problem, plan)
    share = statistics.mean(facts.share for facts in raw.facts.values())
    ran = _seconds(lambda: backend.run(problem, plan), device) / HEADS
    rng = np.random.default_rng(1)
    drawn = {index: rng.integers(0, rows, ROWS) for index in problem.heads()}
    judged = (
        _seconds(lambda: backend.row_errors(problem, raw, drawn, enough=0.1), device) / HEADS
    )
    efficiency = {
        "landmark": min(scores(share) / ran, 1.0),
        "rows": min(scores(ROWS / rows) / judged, 1.0),
    }
    probed = scores(SIZES.samples / SIZES.group) / efficiency["rows"]
    usual = model.head_seconds + rows * model.key_seconds
    spent = max(_seconds(look, device) / HEADS - probed, 0.1 * usual)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return replace(
        model,
        efficiency=efficiency,
        head_seconds=model.head_seconds * spent / usual,
        key_seconds=model.key_seconds * spent / usual,
        source=f"measured on {device}, {today}, PyTorch {torch.__version__},"
        f" {torch.get_num_threads()} threads",
    )


def _heads(rows: int, dim: int, device: str) -> tuple[torch.Tensor, ...]:
    """Draw heads whose rows look nearby, (1, HEADS, rows, dim): keys drift, queries follow."""
    draw = torch.Generator().manual_seed(0)
    steps, noise, value = (torch.randn(1, HEADS, rows, dim, generator=draw) for _ in range(3))
    walk = steps.cumsum(dim=2)
    key = walk / walk.square().mean(dim=3, keepdim=True).sqrt()
    query = 2 * key + 0.5 * noise
    return tuple(x.contiguous().to(device) for x in (query, key, value))


def _seconds(call: Callable[[], object], device: str) -> float:
    """Least of some calls, after one that is not counted: other work only adds to them."""
    module = getattr(torch, device)
    taken = []
    for number in range(REPEATS + 1):
        started = time.perf_counter()
        call()
        module.synchronize()
        if number:
            taken.append(time.perf_counter() - started)
    return min(taken)


def warm_up(say: Callable[[str], None]) -> None:
    """Measure every kind of device here whose prices are not known yet, and keep them."""
    for device in TorchBackend().capabilities().array_devices:
        model = costing.known(device)
        if model is None:
            model = measure(device)
            costing.keep(device, model)
        say(f"torch: prices {told(model)}")


def told(model: CostModel) -> str:
    """Say a model in a line."""
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in model.flops.items())
    shares = ", ".join(f"{name} {share:.2f}" for name, share in model.efficiency.items())
    return f"{model.source}: {rates} GFLOP/s, {shares} of that"
