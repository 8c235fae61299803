"""Budgets kept on the device: certificates against truth, plans, graphs, bad numbers, seeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import adaattn_core
from adaattn_core import ErrorBudget, Mask
from adaattn_core.errors import AdaAttnError
from adaattn_core.lazy import LazyHeads
from adaattn_core.policies import BudgetPolicy, FixedPolicy
from adaattn_core.structure import Landmark
from adaattn_cuda.device.graph import Graph

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


UNHURRIED = BudgetPolicy(worthwhile=1e9)
"""Measures and takes what is accurate, however short a problem and whatever it costs."""


def attention(*arrays: Any, **options: Any) -> Any:
    """`adaattn_core.attention`, whose budgets are planned at any length."""
    if "budget" in options:
        options.setdefault("policy", UNHURRIED)
    return adaattn_core.attention(*arrays, **options)


def smooth(
    heads_q: int = 6,
    heads_kv: int = 2,
    length: int = 8192,
    dim: int = 64,
    dtype: str = "bfloat16",
    seed: int = 0,
    sharp: float = 2.0,
) -> list[Any]:
    """Heads that look at their neighbourhood and at a few like places: landmarks serve them."""
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", generator=generator)

    noise = normal(length + 256, 64)
    kernel = torch.exp(-torch.arange(256, device="cuda") / 40.0)
    smoothed = torch.nn.functional.conv1d(
        noise.T[:, None], kernel.flip(0)[None, None] / kernel.norm()
    )[:, 0, :length].T
    to_key = normal(heads_kv, 64, dim) / 8
    to_query = to_key.repeat_interleave(heads_q // heads_kv, 0) * sharp
    to_query = to_query + 0.3 * normal(heads_q, 64, dim) / 8
    to_value = normal(heads_kv, 64, dim) / 8
    q, k, v = (
        torch.einsum("nc,hcd->hnd", smoothed, w)[None] for w in (to_query, to_key, to_value)
    )
    v = v + 0.3 * normal(*v.shape)
    return [x.to(getattr(torch, dtype)).contiguous() for x in (q, k, v)]


def truth(q: Any, k: Any, v: Any, rows: Any, causal: bool) -> Any:
    """Exact rows in float64."""
    group = q.shape[1] // k.shape[1]
    out = []
    for head in range(q.shape[1]):
        key, value = k[0, head // group].double(), v[0, head // group].double()
        scores = q[0, head, rows].double() @ key.T / math.sqrt(q.shape[3])
        if causal:
            seen = rows + k.shape[2] - q.shape[2]
            hidden = torch.arange(k.shape[2], device="cuda")[None] > seen[:, None]
            scores = scores.masked_fill(hidden, -math.inf)
            value = torch.where(torch.isfinite(value), value, torch.zeros_like(value))
        out.append(torch.softmax(scores, -1) @ value)
    return torch.stack(out)


def row_errors(result: Any, q: Any, k: Any, v: Any, causal: bool = True) -> Any:
    """Errors of 1,024 rows a head relative to the rms row, shape (heads, rows)."""
    rows = torch.arange(0, q.shape[2], max(q.shape[2] // 1024, 1), device="cuda")
    expected = truth(q, k, v, rows, causal)
    rms = result.out[0].double().square().sum(-1).mean(-1).sqrt()
    away = (result.out[0][:, rows].double() - expected).norm(dim=-1)
    return (away / rms[:, None]).cpu().numpy()


def assert_covered(found: Any, upper: Any) -> None:
    """A sentence holds with confidence 0.95: of a few heads one may miss, not by much."""
    assert (found > upper).sum() <= 1, (found, upper)
    assert (found <= 1.5 * upper).all(), (found, upper)


@pytest.mark.parametrize(
    ("case", "causal"),
    [
        ({}, True),
        ({"dtype": "float16", "heads_q": 4, "heads_kv": 4}, True),
        ({"dim": 128, "heads_q": 8, "heads_kv": 2}, True),
        ({"dim": 256, "heads_q": 2, "heads_kv": 1}, True),
        ({"dim": 96, "heads_q": 5, "heads_kv": 1}, True),
        ({"heads_q": 7, "heads_kv": 1, "length": 8192 + 37}, True),
        ({"length": 9000}, False),
    ],
)
@pytest.mark.parametrize("rel", [0.1, 0.2])
def test_certificates_cover_the_truth(case: dict[str, Any], causal: bool, rel: float) -> None:
    q, k, v = smooth(**case)
    mask = Mask.causal() if causal else None
    result = attention(q, k, v, mask=mask, budget=rel, backend="cuda", seed=1)
    assert result.provenance["planned_on"] == "device", result.provenance
    assert isinstance(result.plan.heads, LazyHeads)
    upper = result.certificate.upper[0]
    assert (upper <= rel).all()
    found = np.quantile(row_errors(result, q, k, v, causal), 0.95, axis=1)
    assert_covered(found, upper)


def test_exact_heads_are_proved_where_a_theorem_says_enough_and_sampled_elsewhere() -> None:
    """Rows are drawn for heads alone whose values cancel out, and the sentences hold."""
    q, k, v = smooth(length=4096, heads_q=4, heads_kv=4)
    v[:, 1] = torch.randn_like(v[:, 1])  # the mean of many: small beside the largest value
    k[:, 1] *= 0.01
    for _ in range(3):  # launch by launch, then as a graph
        result = attention(
            q, k, v, mask=Mask.causal(), budget=0.1, policy=BudgetPolicy(), backend="cuda"
        )
        kinds = result.certificate.guarantee[0].tolist()
        assert kinds == ["worst_case", "sampled", "worst_case", "worst_case"]
        upper = result.certificate.upper[0]
        assert (upper <= 0.1).all()
        errors = row_errors(result, q, k, v)
        assert errors[1].max() <= 0.1
        proved = [0, 2, 3]
        assert (errors[proved].max(axis=1) <= upper[proved]).all()
        assert np.isnan(result.certificate.estimate[0]).tolist() == [True, False, True, True]


def test_landmarks_are_chosen_where_they_serve_and_dense_where_they_do_not() -> None:
    q, k, v = smooth(length=16384)
    result = attention(q, k, v, mask=Mask.causal(), budget=0.1, backend="cuda")
    kinds = {head.structure.kind for head in result.plan.heads.values()}
    assert "landmark" in kinds
    assert min(facts.share for facts in result.facts.values()) < 0.5
    noise = [torch.randn_like(x) for x in (q, k, v)]
    noise[0] *= 4  # each row looks for a few keys of its own
    hurried = BudgetPolicy(worthwhile=1.7)  # measures, and does not take nearly all keys
    result = attention(*noise, mask=Mask.causal(), budget=0.1, policy=hurried, backend="cuda")
    assert {head.structure.kind for head in result.plan.heads.values()} == {"dense"}
    assert (result.certificate.upper <= 0.1).all()
    assert "dense" in result.plan.explain()


@pytest.mark.parametrize(("length", "dim"), [(2048, 64), (8192 + 37, 64), (6000, 128)])
def test_a_short_problem_is_dense_and_certified_without_measuring(
    length: int, dim: int
) -> None:
    q, k, v = smooth(length=length, dim=dim)
    result = adaattn_core.attention(
        q, k, v, mask=Mask.causal(), budget=0.1, backend="cuda", seed=3, profile=True
    )
    assert result.provenance["planned_on"] == "device"
    assert "probe_stats" not in result.provenance["stage_ms"]
    assert {head.structure.kind for head in result.plan.heads.values()} == {"dense"}
    assert {facts.share for facts in result.facts.values()} == {1.0}
    upper = result.certificate.upper[0]
    assert (upper <= 0.02).all()
    assert_covered(np.quantile(row_errors(result, q, k, v), 0.95, axis=1), upper)
    exact = adaattn_core.attention(q, k, v, mask=Mask.causal(), backend="cuda")
    assert (result.out - exact.out).float().abs().max() <= 2**-7 * exact.out.float().abs().max()
    for _ in range(3):
        again = adaattn_core.attention(
            q, k, v, mask=Mask.causal(), budget=0.1, backend="cuda", seed=3
        )
        assert torch.equal(again.out, result.out)
        assert np.array_equal(again.certificate.upper[0], upper)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 4000), (100, 300), (256, 256), (1000, 1500)])
def test_the_shortest_problems_are_certified_on_the_device(
    lengths: tuple[int, int], causal: bool
) -> None:
    """Training and decoding call with few rows: no milliseconds of the host for them."""
    q, k, v = smooth(length=max(lengths))
    q, k, v = (
        x[:, :, :n].contiguous() for x, n in ((q, lengths[0]), (k, lengths[1]), (v, lengths[1]))
    )
    mask = Mask.causal("bottom_right") if causal else Mask()
    found = adaattn_core.attention(q, k, v, mask=mask, budget=0.05, backend="cuda", seed=1)
    assert found.provenance["planned_on"] == "device"
    assert (found.certificate.upper <= 0.05).all()
    exact = adaattn_core.attention(q, k, v, mask=mask, backend="cuda")
    assert (found.out - exact.out).float().abs().max() <= 2**-7 * exact.out.float().abs().max()
    errors = row_errors(found, q, k, v, causal=causal)
    assert_covered(np.quantile(errors, 0.95, axis=1), found.certificate.upper[0])


def test_keys_that_no_row_sees_enter_no_certificate() -> None:
    q, k, v = smooth(length=1500)
    q = q[:, :, :1000].contiguous()
    seen = [x[:, :, :1000].contiguous() for x in (k, v)]
    k[:, :, 1000:], v[:, :, 1000:] = math.nan, math.inf
    mask = Mask.causal("top_left")
    found = adaattn_core.attention(q, k, v, mask=mask, budget=0.05, backend="cuda", seed=1)
    assert "no row sees" in found.provenance["planned_on_host"]
    assert not found.certificate.nonfinite.any()
    assert (found.certificate.upper <= 0.05).all()
    exact = adaattn_core.attention(q, *seen, mask=mask, backend="cuda")
    assert (found.out - exact.out).float().abs().max() <= 2**-7 * exact.out.float().abs().max()


def test_heads_decide_for_themselves_alone_or_in_a_batch() -> None:
    """The same seed gives every head the same plan and the same bits, whoever is beside it."""
    first, second = smooth(seed=1), smooth(seed=2)
    both = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    alone = attention(*first, mask=Mask.causal(), budget=0.1, backend="cuda", seed=5)
    again = attention(*first, mask=Mask.causal(), budget=0.1, backend="cuda", seed=5)
    assert torch.equal(alone.out, again.out)
    assert alone.plan == again.plan
    beside = attention(*both, mask=Mask.causal(), budget=0.1, backend="cuda", seed=5)
    same = [
        beside.plan[0, head].structure == alone.plan[0, head].structure
        for head in range(first[0].shape[1])
    ]
    for head, alike in enumerate(same):
        if alike:
            assert torch.equal(beside.out[0, head], alone.out[0, head])
    assert any(same)


def test_a_needle_is_found_by_the_last_tile() -> None:
    q, k, v = smooth(length=16384, sharp=0.5)
    depth = 5003
    for head in range(k.shape[1]):
        k[0, head, depth] = 0
        k[0, head, depth, 0] = 40.0
        v[0, head, depth] = 10.0
    q[:, :, -1] = 0
    q[:, :, -1, 0] = 8.0
    result = attention(q, k, v, mask=Mask.causal(), budget=0.1, backend="cuda")
    last = result.out[0, :, -1].float()
    assert (last - 10.0).abs().max() < 0.1
    assert (result.certificate.upper <= 0.1).all()


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_no_row_before_it_sees_does_not_leak(where: str) -> None:
    """NaN in the last token: rows before it are finite and right, and the head is flagged."""
    q, k, v = smooth(length=4096)
    clean = [x.clone() for x in (q, k, v)]
    {"query": q, "key": k, "value": v}[where][:, :, -1] = math.nan
    budget = ErrorBudget(0.1, on_violation="report")
    result = attention(q, k, v, mask=Mask.causal(), budget=budget, backend="cuda")
    assert result.out[:, :, :-1].isfinite().all()
    assert result.certificate.nonfinite.all()
    assert np.isinf(result.certificate.upper).all()
    exact = attention(*clean, mask=Mask.causal(), backend="cuda")
    away = (result.out - exact.out)[:, :, :-1].float().norm() / exact.out.float().norm()
    assert away < 0.2


@pytest.mark.parametrize("case", ["equal scores", "zero values", "one huge head", "sink"])
def test_odd_heads(case: str) -> None:
    q, k, v = smooth(length=8192)
    if case == "equal scores":
        q.zero_()
    elif case == "zero values":
        v.zero_()
    elif case == "one huge head":
        q[:, 0] *= 50
        v[:, 0] *= 1e4
    else:
        k[:, :, 0] = 0
        k[:, :, 0, 0] = 30.0
        q[:, :, :, 0] = 4.0
    result = attention(q, k, v, mask=Mask.causal(), budget=0.1, backend="cuda")
    assert (result.certificate.upper <= 0.1).all()
    if case != "zero values":
        found = np.quantile(row_errors(result, q, k, v), 0.95, axis=1)
        assert_covered(found, result.certificate.upper[0])
    else:
        assert not result.out.any()


def test_stages_are_timed_on_demand() -> None:
    q, k, v = smooth()
    result = attention(q, k, v, mask=Mask.causal(), budget=0.1, backend="cuda", profile=True)
    stages = result.provenance["stage_ms"]
    assert {"probe_stats", "attend", "certify"} <= set(stages)
    assert all(milliseconds > 0 for milliseconds in stages.values())


def test_a_replay_is_bit_equal_to_separate_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One set of addresses: the first start launches, the second records, the third replays."""
    q, k, v = smooth(seed=3)
    replays: list[int] = []
    start_graph = Graph.start

    def counted(graph: Graph, stream: int) -> None:
        replays.append(stream)
        start_graph(graph, stream)

    def start() -> tuple[Any, Any]:
        result = attention(q, k, v, mask=Mask.causal(), budget=0.1, backend="cuda", seed=7)
        return result.out.clone(), result.certificate.upper

    monkeypatch.setattr(Graph, "start", counted)
    first, upper = start()
    assert not replays
    for _ in range(5):  # what is freed is handed out again: the addresses come back
        out, again = start()
        assert torch.equal(out, first)
        assert np.array_equal(again, upper)
    assert len(replays) >= 2


def test_a_call_is_captured_in_a_graph() -> None:
    q, k, v = smooth()
    attention(q, k, v, mask=Mask.causal(), budget=0.1, backend="cuda")  # loads, uploads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = attention(q, k, v, mask=Mask.causal(), budget=0.1, backend="cuda")
    other = smooth(seed=9)
    for old, new in zip((q, k, v), other, strict=True):
        old.copy_(new)
    result.out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert (result.certificate.upper <= 0.1).all()
    found = np.quantile(row_errors(result, q, k, v), 0.95, axis=1)
    assert_covered(found, result.certificate.upper[0])


@pytest.mark.parametrize(
    ("mask", "change", "reason"),
    [
        (Mask.sliding_window(100, 0), {}, "mask"),
        (Mask.causal(), {"length": 1024}, "shorter"),
        (Mask.causal(), {"dtype": "float32"}, "16-bit"),
    ],
)
def test_what_is_not_planned_on_the_device_is_said(
    mask: Mask, change: dict[str, Any], reason: str
) -> None:
    q, k, v = smooth(**change)
    result = attention(q, k, v, mask=mask, budget=0.2, backend="cuda")
    assert reason in result.provenance["planned_on_host"]
    assert (result.certificate.upper <= 0.2).all()


def test_a_forced_structure_is_run_and_certified_as_it_is() -> None:
    q, k, v = smooth()
    structure = Landmark(tau=0.3, band=256, group=1024, tile=128, screen_rank=0)
    policy = FixedPolicy(structure=structure, qk="bf16", pv="bf16")
    budget = ErrorBudget(0.5, on_violation="report")
    try:
        result = attention(
            q, k, v, mask=Mask.causal(), budget=budget, policy=policy, backend="cuda"
        )
    except AdaAttnError as error:
        pytest.fail(str(error))
    found = np.quantile(row_errors(result, q, k, v), 0.95, axis=1)
    assert_covered(found, result.certificate.upper[0])


@pytest.mark.parametrize("case", [{"length": 32_768}, {"length": 4096, "dim": 128}])
def test_a_frozen_plan_repeats_bit_for_bit_without_measuring(case: dict[str, Any]) -> None:
    q, k, v = smooth(**case)
    first = attention(q, k, v, mask=Mask.causal(), budget=0.1, backend="cuda", seed=11)
    assert "landmark" in {head.structure.kind for head in first.plan.heads.values()}
    again = adaattn_core.attention(
        q, k, v, mask=Mask.causal(), budget=0.1, plan=first.plan, backend="cuda", profile=True
    )
    assert "judge" not in again.provenance["stage_ms"]
    assert torch.equal(again.out, first.out)
    assert torch.equal(again.lse, first.lse)
    assert again.plan == first.plan
    assert (again.certificate.upper <= 0.1).all()
    assert_covered(
        np.quantile(row_errors(again, q, k, v), 0.95, axis=1), again.certificate.upper[0]
    )
    for _ in range(3):  # replayed as a graph
        more = adaattn_core.attention(
            q, k, v, mask=Mask.causal(), budget=0.1, plan=first.plan, backend="cuda"
        )
        assert torch.equal(more.out, first.out)
