"""Decoding over pages on a device, against float64: the door, and the short way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from adaattn_core import ErrorBudget, attention
from adaattn_core.decoding import DevicePages
from adaattn_core.errors import AdaAttnError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.paged import PagedKV
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.plugins.registry import get_backend
from adaattn_core.structure import ScoreSkip
from adaattn_core.testing.kit import WORST_CASE
from adaattn_core.testing.oracles import exact_attention
from adaattn_core.testing.paged import PagedSpec

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

BASE = PagedSpec(starts=(0, 70, 5, 9), lengths=(300, 333, 5, 10), heads_kv=2, group=4,
                 page_len=64, dim_qk=128, dim_v=128, dtype="bf16")  # fmt: skip
UNIT = {"bf16": 2.0**-8, "f16": 2.0**-11}


def send(x: NDArray[Any]) -> Any:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.astype(np.float32)).cuda().bfloat16()
    return torch.from_numpy(np.ascontiguousarray(x)).cuda()


def host(x: Any) -> NDArray[np.float64]:
    return np.asarray(x.double().cpu().numpy())


def run(spec: PagedSpec, **arguments: Any) -> Any:
    problem = spec.problem(send)
    arguments.setdefault("mask", spec.mask)
    return attention(problem.query, problem.paged, backend="cuda", **arguments)


CASES = {
    "plain": BASE,
    "dim 64": replace(BASE, dim_qk=64, dim_v=64, group=3),
    "dim 256": replace(BASE, dim_qk=256, dim_v=256),
    "several rows": replace(BASE, len_q=4, causal=True),
    "64 rows": replace(BASE, len_q=64, causal=True, group=1),
    "rows that see all": replace(BASE, len_q=3),
    "long, pages of 128": replace(BASE, page_len=128, lengths=(3000,), starts=(17,), seed=3),
    "many splits": replace(BASE, page_len=192, lengths=(9000, 1, 0), starts=(0, 0, 0)),
    "group of 16": replace(BASE, group=16, heads_kv=1),
}


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("narrow", ["", "i8", "e4m3"])
@pytest.mark.parametrize("case", CASES)
def test_near_float64_of_what_is_stored(case: str, narrow: str, dtype: str) -> None:
    spec = replace(CASES[case], narrow=narrow, dtype=dtype)
    result, exact = run(spec), spec.stored()
    out, lse = host(result.out), host(result.lse)
    blind = exact.lse == -np.inf
    assert (out[blind] == 0).all()
    assert (lse[blind] == -np.inf).all()
    error = np.linalg.norm(out - exact.out) / np.linalg.norm(exact.out)
    assert error <= 2 * UNIT[dtype]
    moved = np.abs(lse[~blind] - exact.lse[~blind]).max()
    assert moved <= 2.0**-10 * np.abs(exact.lse[~blind]).max()


@pytest.mark.parametrize("narrow", ["", "i8"])
def test_windows(narrow: str) -> None:
    spec = replace(BASE, len_q=3, causal=True, narrow=narrow)
    mask = Mask.sliding_window(100, 0, "bottom_right")
    out = host(run(spec, mask=mask).out)
    exact = spec.stored(left=100)
    assert np.linalg.norm(out - exact.out) <= 2 * UNIT["bf16"] * np.linalg.norm(exact.out)


@pytest.mark.parametrize("narrow", ["", "i8", "e4m3"])
@pytest.mark.parametrize("lam", [0.0, 1e-4])
@pytest.mark.parametrize("peak", [0.0, 0.75])
def test_certificates_cover_what_was_written(peak: float, lam: float, narrow: str) -> None:
    spec = replace(
        BASE, page_len=128, lengths=(4000, 700), starts=(0, 9), narrow=narrow, peak=peak
    )
    problem = spec.problem(send)
    head = HeadPlan(qk="bf16", pv="bf16")
    if lam:
        head = replace(head, structure=ScoreSkip(lam=lam))
    scale = 0.4
    result = attention(
        problem.query, problem.paged, backend="cuda", plan=Plan.uniform(problem, head),
        budget=WORST_CASE, scale=scale,
    )  # fmt: skip
    exact = exact_attention(replace(spec.dense(), scale=scale)).out
    out = host(result.out)
    error = np.linalg.norm(out - exact, axis=-1)[..., 0]
    size = np.linalg.norm(out, axis=-1)[..., 0]
    assert (error <= result.certificate.upper * size).all()
    dropped = [facts.dropped_mass_upper for facts in result.facts.values()]
    assert max(dropped) <= lam * 4000
    if lam and peak:
        assert min(dropped) > 0, "values of some head were all read: the test says nothing"
    if not lam:
        assert max(dropped) == 0


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("narrow", ["", "i8", "e4m3"])
def test_unread_values_weigh_what_is_said(narrow: str, dim: int) -> None:
    """Beside the same step with all values read; both are exact but for `dropped`."""
    spec = replace(
        BASE, page_len=128, lengths=(9000, 2111), starts=(0, 70), dim_qk=dim, dim_v=dim,
        narrow=narrow, peak=14 / dim**0.5,
    )  # fmt: skip
    problem = spec.problem(send)
    backend: Any = get_backend("cuda")
    pages = device_pages(problem.paged, narrow or "i8")
    given: dict[str, Any] = {"scale": 3 / dim**0.5, "causal": False}
    whole, lse, none = backend.decode(problem.query, pages, **given)
    assert (none == 0).all()
    for lam in (1e-5, 1e-3):
        out, kept_lse, dropped = (host(x) for x in backend.decode(
            problem.query, pages, lam=lam, **given
        ))  # fmt: skip
        assert (dropped > 0).all()
        assert (dropped[..., 0] <= lam * np.array(spec.lengths)[:, None]).all()
        whole_lse = kept_lse - np.log1p(-dropped)
        assert np.abs(whole_lse - host(lse)).max() <= 2.0**-10 * np.abs(whole_lse).max()
        moved = np.linalg.norm(out - host(whole), axis=-1)
        diameter = 2 * np.linalg.norm(spec.arrays[2].astype(np.float64), axis=-1).max()
        rounding = 4 * UNIT["bf16"] * np.linalg.norm(out, axis=-1)
        assert (moved <= dropped * diameter + rounding).all()


def test_a_budget_is_kept_or_refused() -> None:
    spec = replace(BASE, page_len=128, lengths=(4000,), starts=(0,))
    asked = ErrorBudget(0.2, 1.0, 1.0, "worst_case", "report")
    result = run(spec, budget=asked, mask=Mask.none())
    assert result.plan.policy == "paged"
    assert result.provenance["kernels"].startswith("smxx_attn_decode")


def test_runs_are_equal_bit_for_bit() -> None:
    spec = replace(BASE, lengths=(5000,), starts=(0,), narrow="i8")
    first = run(spec)
    for order in (1, 2):
        again = run(replace(spec, order=order))
        assert torch.equal(first.out, again.out)
        assert torch.equal(first.lse, again.lse)


def device_pages(kv: PagedKV, format: str = "i8") -> DevicePages:
    parts: list[Any] = [
        None if pool is None else (pool.data, pool.unit, pool.centre, pool.reach)
        for pool in (kv.key_narrow, kv.value_narrow)
    ]
    table, lengths, starts = (
        torch.from_numpy(np.array(x, np.int32)).cuda()
        for x in (kv.table, kv.lengths, kv.starts)
    )
    return DevicePages(kv.key.data, kv.value.data, parts[0], parts[1], format, table, lengths,
                       starts, int(kv.lengths.max()))  # fmt: skip


def test_the_short_way_is_the_same_and_can_be_recorded() -> None:
    spec = replace(BASE, lengths=(5000, 300), starts=(0, 5), narrow="i8")
    problem = spec.problem(send)
    backend: Any = get_backend("cuda")
    pages = device_pages(problem.paged)
    query = problem.query.clone()

    def step() -> Any:
        return backend.decode(query, pages, scale=problem.scale)

    out, lse, dropped = step()
    door = run(spec, mask=Mask.causal("bottom_right"))
    assert torch.equal(out, door.out)
    assert torch.equal(lse, door.lse)
    assert (dropped == 0).all()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            recorded = step()[0]
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        query.copy_(torch.randn_like(query))
        graph.replay()
        assert torch.equal(recorded, step()[0])


def test_facts_are_those_of_what_was_read() -> None:
    problem = replace(BASE, lengths=(300,), starts=(0,)).problem(send)
    plan = Plan.uniform(problem, HeadPlan(qk="bf16", pv="bf16"))
    raw = get_backend("cuda").run(problem, plan)
    problem.paged.key.data[0, 0, 0] = 1.0
    with pytest.raises(AdaAttnError, match="written to since the run"):
        raw.facts[0, 0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "f32"}, "pages of f32"),
        ({"dim_qk": 96, "dim_v": 96}, "dim 96"),
        ({"dim_v": 64}, "values of dim 64"),
        ({"page_len": 48}, "page_len=48"),
        ({"len_q": 65, "group": 1}, "65 rows"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        run(replace(BASE, **change))


def test_one_thousand_tables_against_float64() -> None:
    """Random tables, lengths and padding, in one process: the fuzz of the CPU, on a device."""
    rng = np.random.default_rng(7)
    for n in range(1000):
        page_len = int(rng.choice([64, 128]))
        lengths = tuple(int(x) for x in rng.integers(0, 5 * page_len, int(rng.integers(1, 4))))
        spec = PagedSpec(
            starts=tuple(int(rng.integers(0, x + 1)) * int(rng.integers(2)) for x in lengths),
            lengths=lengths, heads_kv=int(rng.integers(1, 3)), group=int(rng.choice([1, 3, 4])),
            len_q=int(rng.choice([1, 1, 2, 5])), page_len=page_len, dim_qk=64, dim_v=64,
            dtype="bf16", narrow=str(rng.choice(["", "i8"])), causal=bool(rng.random() < 0.5),
            seed=n, order=n,
        )  # fmt: skip
        out, exact = host(run(spec).out), spec.stored().out
        assert np.isfinite(out).all(), spec
        error = np.linalg.norm(out - exact)
        assert error <= 3 * UNIT["bf16"] * np.linalg.norm(exact), spec
