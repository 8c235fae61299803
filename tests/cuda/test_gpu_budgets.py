"""A sampled budget on whatever a GPU takes: planned on the device, or dense and said to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adaattn_core import ErrorBudget, attention
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import BlockSparse, Landmark

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
LENGTH = 2304
MASKS = {
    "none": (Mask.none(), True),
    "causal top left": (Mask.causal("top_left"), True),
    "causal bottom right": (Mask.causal("bottom_right"), True),
    "window": (Mask.sliding_window(900, 0, "bottom_right"), False),
    "two-sided window": (Mask.sliding_window(900, 300, "top_left"), False),
    "lengths": (Mask.key_lengths([2000]) & Mask.causal("top_left"), False),
    "ragged": (
        Mask.ragged([0, 1000, 1000, LENGTH], [0, 900, 1100, LENGTH])
        & Mask.causal("bottom_right"),
        False,
    ),
}
SIZES = [
    ("bf16", (64, 64), (4, 2)),
    ("f16", (96, 96), (3, 1)),
    ("f16", (256, 256), (2, 1)),
    ("bf16", (128, 64), (4, 1)),
    ("f32", (64, 64), (2, 1)),
]


def arrays(dtype: str, dims: tuple[int, int], heads: tuple[int, int]) -> list[Any]:
    generator = torch.Generator(device="cuda").manual_seed(3)
    shapes = ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]))
    return [
        torch.randn(1, h, LENGTH, d, device="cuda", generator=generator).to(DTYPES[dtype])
        for h, d in shapes
    ]


def truth(problem: AttentionProblem) -> Any:
    q, k, v = (x.double() for x in (problem.query, problem.key, problem.value))
    group = problem.heads_q // problem.heads_kv
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64, device="cuda")
    for s in problem.sequences:
        start, stop = problem.mask.intervals(s.len_q, s.len_kv)
        key = np.arange(s.len_kv)
        seen = torch.from_numpy((key >= start[:, None]) & (key < stop[:, None])).cuda()
        rows, keys = slice(s.q_start, s.q_stop), slice(s.kv_start, s.kv_stop)
        own = k[s.batch, :, keys].repeat_interleave(group, 0)
        scores = (q[s.batch, :, rows] @ own.mT * problem.scale).masked_fill(~seen, -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)
        out[s.batch, :, rows] = weights @ v[s.batch, :, keys].repeat_interleave(group, 0)
    return out


def assert_covered(result: Any, problem: AttentionProblem, rows: float) -> None:
    """Each head's quantile under its sentence, with what one of a few heads may miss by."""
    exact = truth(problem)
    for index in problem.heads():
        span = problem.sequences[index[0]]
        where = span.batch, index[1], slice(span.q_start, span.q_stop)
        out = result.out[where].double()
        live = torch.from_numpy(np.subtract(*problem.intervals(index[0])[::-1]) > 0).cuda()
        if not live.any():
            continue
        rms = out[live].square().sum(-1).mean().sqrt()
        away = (out - exact[where])[live].norm(dim=-1) / rms
        assert float(away.quantile(rows)) <= 1.5 * result.certificate[index].upper


@pytest.mark.parametrize(("dtype", "dims", "heads"), SIZES)
def test_every_problem_keeps_a_budget(
    dtype: str, dims: tuple[int, int], heads: tuple[int, int]
) -> None:
    q, k, v = arrays(dtype, dims, heads)
    for mask, on_device in MASKS.values():  # within one test: a kernel compiles once a process
        _keeps_a_budget(q, k, v, mask, on_device)
    for name in ("causal bottom right", "window", "ragged"):
        _are_certified_by_rows(q, k, v, MASKS[name][0])


def _keeps_a_budget(q: Any, k: Any, v: Any, mask: Mask, on_device: bool) -> None:
    budget = ErrorBudget(rel=0.1)
    result = attention(q, k, v, mask=mask, budget=budget, backend="cuda")
    assert result.certificate.holds(budget)
    problem = AttentionProblem.from_arrays(q, k, v, mask=mask)
    assert_covered(result, problem, budget.rows)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    if on_device and problem.dtype != "f32" and hopper:
        assert result.provenance["planned_on"] == "device"
        return
    # Nothing falls back unsaid, and nothing climbs for want of a look at the rows.
    assert "not planned on the device" in result.plan.explain()
    assert {h.structure.kind for h in result.plan.heads.values()} == {"dense"}
    assert {(h.qk, h.pv) for h in result.plan.heads.values()} == {(problem.dtype,) * 2}


def _are_certified_by_rows(q: Any, k: Any, v: Any, mask: Mask) -> None:
    """Blocks and landmarks have a sampled sentence where they have no theorem."""
    problem = AttentionProblem.from_arrays(q, k, v, mask=mask)
    report = ErrorBudget(rel=0.1, on_violation="report")
    structures: list[Any] = [BlockSparse(tau=0.1, band=128, group=512)]
    if problem.prefix_sequences():
        structures.append(Landmark(tau=0.05, band=64, group=256, tile=64, screen_rank=0))
    for structure in structures:
        head = HeadPlan(structure=structure, qk=problem.dtype, pv=problem.dtype)
        plan = Plan.uniform(problem, head)
        result = attention(q, k, v, mask=mask, plan=plan, budget=report, backend="cuda")
        assert np.isfinite(result.certificate.upper).all(), structure.kind
        assert "sampled" in result.certificate.guarantee
        assert_covered(result, problem, report.rows)


def test_a_plan_that_misses_its_budget_climbs() -> None:
    """Noise has no blocks to leave out: such heads end dense, and the result says so.

    Rows are drawn for two plans of a head; the last step is certified by a theorem, which says
    0.06 of f32 here: a budget below that is infeasible for this plan.
    """
    mask = Mask.causal("bottom_right")
    q, k, v = arrays("bf16", (64, 64), (2, 1))
    problem = AttentionProblem.from_arrays(q, k, v, mask=mask)
    blocks = BlockSparse(tau=0.5, band=0, group=512)
    plan = Plan.uniform(problem, HeadPlan(structure=blocks, qk="bf16", pv="bf16"))
    result = attention(q, k, v, mask=mask, plan=plan, budget=0.1, backend="cuda")
    assert (result.certificate.upper <= 0.1).all()
    assert result.provenance["escalated"]
    assert_covered(result, problem, 0.95)
