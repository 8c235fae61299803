"""The backend on a real device: streams, captures, libraries, provenance and bad input."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from adaattn_core import ErrorBudget, attention
from adaattn_core.errors import ShapeError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.backend import CudaBackend
from adaattn_cuda.forward import attention_forward

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-19}


@pytest.fixture(scope="module")
def backend() -> Any:
    return CudaBackend()


def arrays(
    dtype: str = "bfloat16", length: int = 300, dim: int = 64, heads: int = 4
) -> list[Any]:
    shape = (2, heads, length, dim)
    return [torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)) for _ in range(3)]


def exact(q: Any, k: Any, v: Any, causal: bool = False) -> Any:
    return torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=causal
    )


def relative(got: Any, expected: Any) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def plan_of(problem: AttentionProblem) -> Plan:
    return Plan.uniform(problem, HeadPlan(qk=problem.dtype, pv=problem.dtype))


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("causal", [False, True])
def test_front_door(dtype: str, causal: bool) -> None:
    q, k, v = arrays(dtype)
    mask = Mask.causal() if causal else None
    budget = ErrorBudget(rel=1.0, guarantee="worst_case", on_violation="report")
    result = attention(q, k, v, mask=mask, backend="cuda", budget=budget, policy="exact")
    expected = exact(q, k, v, causal)
    assert result.out.dtype == q.dtype
    assert relative(result.out, expected) <= UNIT[dtype]
    assert "attn_fwd" in result.provenance["kernels"]
    rms = result.out.double().square().sum(-1).mean(-1).sqrt().cpu().numpy()
    worst = (result.out.double() - expected).norm(dim=-1).amax(-1).cpu().numpy()
    assert (worst <= result.certificate.upper * rms).all()


@pytest.mark.parametrize("dtype", UNIT)
def test_forward_without_a_plan(dtype: str) -> None:
    """The second call takes the remembered launch, at other addresses and on other numbers."""
    for _ in range(2):
        q, k, v = arrays(dtype)
        out, lse = attention_forward(q, k, v, mask=Mask.causal(), scale=0.5)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), is_causal=True, scale=0.5
        )
        assert relative(out, expected) <= UNIT[dtype]
        scores = q.double() @ k.double().mT * 0.5
        hidden = torch.ones(300, 300, device="cuda").triu(1) > 0
        exact_lse = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
        assert (lse - exact_lse).abs().max() <= 2.0**-18 * exact_lse.abs().max()


@pytest.mark.parametrize("dtype", UNIT)
def test_forward_with_array_masks(backend, dtype: str) -> None:
    """Masks are passed by address: the second call has other ones of the same layout."""
    for _ in range(2):
        q, k, v = arrays(dtype)
        allowed = torch.rand((300, 300), device="cuda") > 0.3
        bias = torch.randn((4, 1, 300), device="cuda", dtype=q.dtype)
        out, _ = backend.forward(q, k, v, mask=Mask.boolean(allowed) & Mask.additive(bias))
        added = bias.double().expand(2, 4, 300, 300).masked_fill(~allowed, -torch.inf)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), attn_mask=added
        )
        assert relative(out, expected) <= UNIT[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_forward_is_captured_after_a_warm_up(backend, dtype: str) -> None:
    q, k, v = arrays(dtype, length=301, dim=72)  # a kernel and a geometry of their own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy = q + 1
        with pytest.raises(UnsupportedError, match="CUDA-graph capture"):
            backend.forward(q, k, v)
    graph.replay()
    assert torch.equal(copy, q + 1), "the capture goes on"
    backend.forward(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = backend.forward(q, k, v)
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    assert relative(out, exact(q, k, v)) <= UNIT[dtype]


def test_forward_on_many_addresses_streams_and_threads(backend) -> None:
    """More sets of addresses than are remembered, from two threads on their own streams."""
    sets = [arrays(length=64, heads=1) for _ in range(150)]
    torch.cuda.synchronize()
    found: dict[int, list[Any]] = {}

    def work(name: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found[name] = [backend.forward(*three)[0] for three in sets + sets]
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outs in found.values():
        for out, three in zip(outs, sets + sets, strict=True):
            assert relative(out, exact(*three)) <= UNIT["bfloat16"]
    assert set(found) == {0, 1}


@pytest.mark.parametrize("dtype", UNIT)
def test_sampled_budgets_are_kept(dtype: str) -> None:
    """By theorem, for every row, or by drawn rows, for the share of rows that they speak of."""
    q, k, v = arrays(dtype)
    budget = ErrorBudget(rel=0.1, confidence=0.9999)
    result = attention(q, k, v, budget=budget, backend="cuda")
    assert result.certificate.holds(budget)
    expected = exact(q, k, v)
    rms = result.out.double().square().sum(-1).mean(-1).sqrt().cpu().numpy()
    errors = (result.out.double() - expected).norm(dim=-1).cpu().numpy()
    for (sequence, head), certified in result.certificate.heads.items():
        allowed = certified.upper * rms[sequence, head]
        share = (errors[sequence, head] <= allowed).mean()
        assert share >= (1.0 if certified.guarantee == "worst_case" else certified.rows)
    assert int(result.provenance["workspace_bytes"]) > 0


def test_auto_finds_the_backend() -> None:
    q, k, v = arrays()
    assert attention(q, k, v).provenance["backend"] == "cuda"


def test_stream_is_the_callers(backend) -> None:
    """Work queued behind a slow kernel on a side stream sees what that kernel writes."""
    q, k, v = arrays()
    problem = AttentionProblem.from_arrays(q, k, v)
    plan = plan_of(problem)
    backend.run(problem, plan)
    torch.cuda.synchronize()
    source, side = torch.randn_like(q), torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        q.copy_(source)
        started = time.perf_counter()
        raw = backend.run(problem, plan)
        took = time.perf_counter() - started
    assert took < 0.05, "the call waited for the device"
    side.synchronize()
    assert relative(raw.out, exact(source, k, v)) <= UNIT["bfloat16"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_graph_capture(backend, dtype: str) -> None:
    q, k, v = arrays(dtype)
    problem = AttentionProblem.from_arrays(q, k, v)
    plan = plan_of(problem)
    backend.run(problem, plan)  # warm-up: compiles and loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        raw = backend.run(problem, plan)
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    assert relative(raw.out, exact(q, k, v)) <= UNIT[dtype]


def test_formats_differ_by_head(backend) -> None:
    q, k, v = arrays("float32", heads=3)
    problem = AttentionProblem.from_arrays(q, k, v)
    names = ("f32", "tf32", "bf16")
    heads = {(s, h): HeadPlan(qk=names[h], pv=names[h]) for s in range(2) for h in range(3)}
    raw = backend.run(problem, Plan(heads))
    expected = exact(q, k, v)
    errors = [relative(raw.out[:, h], expected[:, h]) for h in range(3)]
    assert errors[0] < 2e-6 < errors[1] < 1e-3 < errors[2] < 1e-2
    again = backend.run(problem, Plan(heads).with_heads({(1, 2): HeadPlan()}),
                        heads=[(1, 2)], into=raw)  # fmt: skip
    assert relative(again.out[1, 2], expected[1, 2]) < 2e-6
    assert relative(again.out[0, 2], expected[0, 2]) > 1e-3


def test_cupy_and_dlpack(backend) -> None:
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    q, k, v = cupy.asarray(rng.standard_normal((3, 1, 2, 100, 64), np.float32))
    problem = AttentionProblem.from_arrays(q, k, v)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        raw = backend.run(problem, plan_of(problem))
    stream.synchronize()
    assert isinstance(raw.out, cupy.ndarray)
    got = torch.from_dlpack(raw.out)
    assert relative(got, exact(*(torch.from_dlpack(x) for x in (q, k, v)))) < 2e-6


def test_views_of_cuda_core(backend) -> None:
    cupy = pytest.importorskip("cupy")
    from cuda.core.utils import StridedMemoryView  # noqa: PLC0415 -- where cuda.core is

    rng = np.random.default_rng(0)
    three = cupy.asarray(rng.standard_normal((3, 1, 2, 100, 64), np.float32))
    views = [StridedMemoryView.from_any_interface(x, stream_ptr=-1) for x in three]
    out, lse = backend.forward(*views)
    assert isinstance(out, cupy.ndarray)
    assert (out.shape, lse.shape) == ((1, 2, 100, 64), (1, 2, 100))
    expected = exact(*(torch.from_dlpack(x) for x in three))
    assert relative(torch.from_dlpack(out), expected) < 2e-6


def test_empty_problems(backend) -> None:
    q, k, v = arrays()
    nothing = AttentionProblem.from_arrays(q, k[:, :, :0], v[:, :, :0])
    raw = backend.run(nothing, plan_of(nothing))
    assert (raw.out == 0).all()
    assert torch.isneginf(raw.lse).all()
    rowless = AttentionProblem.from_arrays(q[:, :, :0], k, v)
    assert backend.run(rowless, plan_of(rowless)).out.shape == (2, 4, 0, 64)


def test_bad_input(backend) -> None:
    q, k, v = arrays()
    strided = AttentionProblem.from_arrays(q.mT.contiguous().mT, k, v)
    with pytest.raises(UnsupportedError, match="stride 1 there"):
        backend.run(strided, plan_of(strided))
    host = AttentionProblem.from_arrays(q, k, v, mask=Mask.boolean(torch.ones(300, 300) > 0))
    with pytest.raises((UnsupportedError, ShapeError), match=r"CUDA memory|one device"):
        backend.run(host, plan_of(host))
    with pytest.raises(UnsupportedError, match='backend="numpy"'):
        attention(q.double(), k.double(), v.double(), backend="cuda")
    huge = AttentionProblem.from_arrays(*(x[:, :, :1] for x in arrays(dim=264)))
    with pytest.raises(UnsupportedError, match="at most 256"):
        backend.run(huge, plan_of(huge))


def test_rows_that_begin_anywhere(backend) -> None:
    """Rows and arrays off the 16-byte grid are computed all the same, by the sm80 family."""
    for dtype, shift in (("bfloat16", 1), ("float16", 3), ("float32", 2)):
        flat = torch.randn(2 * 4 * 300 * 65 + 8, device="cuda", dtype=getattr(torch, dtype))
        q = flat[shift : shift + 2 * 4 * 300 * 65].view(2, 4, 300, 65)[..., :64]
        assert q.data_ptr() % 16
        problem = AttentionProblem.from_arrays(q, q, q)
        raw = backend.run(problem, plan_of(problem))
        assert relative(raw.out, exact(q, q, q)) <= UNIT[dtype]
        assert "sm80_attn_fwd" in backend.provenance()["kernels"]
        out, _ = backend.forward(q, q, q)
        assert torch.equal(out, raw.out)


two_devices = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two devices"
)


@two_devices
@pytest.mark.parametrize("dtype", UNIT)
def test_arrays_on_a_device_that_is_not_current(backend, dtype: str) -> None:
    q, k, v = (x.to("cuda:1") for x in arrays(dtype))
    for _ in range(2):
        out, lse = backend.forward(q, k, v)
        assert (out.device, lse.device) == (q.device, q.device)
        assert relative(out, exact(q, k, v)) <= UNIT[dtype]
    budget = ErrorBudget(rel=0.1)
    assert attention(q, k, v, budget=budget, backend="cuda").certificate.holds(budget)
    assert torch.cuda.current_device() == 0
    with pytest.raises(ShapeError, match="one device"):
        backend.forward(q, k.to("cuda:0"), v)
    with pytest.raises(ShapeError, match="mask on device 0"):
        backend.forward(q, k, v, mask=Mask.boolean(torch.ones(300, 300, device="cuda:0") > 0))


@two_devices
def test_cupy_arrays_on_a_device_that_is_not_current(backend) -> None:
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Device(1):
        q, k, v = cupy.random.standard_normal((3, 1, 2, 100, 64), cupy.float32)
    with cupy.cuda.Device(0):
        outs = [backend.forward(q, k, v)[0] for _ in range(2)]
        problem = AttentionProblem.from_arrays(q, k, v)
        raw = backend.run(problem, plan_of(problem))
    expected = exact(*(torch.from_dlpack(x) for x in (q, k, v)))
    for out in (*outs, raw.out):
        assert out.device.id == 1
        assert relative(torch.from_dlpack(out), expected) < 2e-6


def test_out_of_memory_says_so(backend) -> None:
    q = torch.zeros((1, 1, 1, 64), device="cuda", dtype=torch.bfloat16)
    rows = torch.cuda.mem_get_info()[1] // 64
    endless = AttentionProblem.from_arrays(
        q.expand(1, rows // 2**20 + 1, 2**20, 64), q, q, mask=Mask.none()
    )
    with pytest.raises(Exception, match="no device memory"):
        backend.run(endless, plan_of(endless))


def test_more_than_2_31_elements(backend) -> None:
    """Offsets are 64-bit: the last head of a 2.2-billion-element tensor is right."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free device memory")
    heads, length, dim = 17, 2**20, 128
    query = torch.zeros((1, heads, length, dim), device="cuda", dtype=torch.bfloat16)
    query[0, -1, -5:] = torch.randn((5, dim), device="cuda", dtype=torch.bfloat16)
    key, value = (
        torch.randn((1, 1, 64, dim), device="cuda", dtype=torch.bfloat16) for _ in "kv"
    )
    problem = AttentionProblem.from_arrays(query, key, value)
    raw = backend.run(problem, plan_of(problem))
    expected = exact(query[:, -1:, -5:], key, value)
    assert relative(raw.out[:, -1:, -5:], expected) <= UNIT["bfloat16"]


def test_attention_does_not_wait() -> None:
    """The call returns while the device is busy; looking at the certificate waits."""
    q, k, v = arrays()
    attention(q, k, v, backend="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)
    started = time.perf_counter()
    result = attention(q, k, v, backend="cuda")
    called = time.perf_counter()
    q.zero_()  # what the caller does to the arrays afterwards changes no certificate
    upper = result.certificate.upper
    assert called - started < 0.05, "the call waited for the device"
    assert time.perf_counter() - called > 0.05, "the certificate did not wait"
    assert (upper > 0).all()
    assert result.facts[0, 0].query_norm_upper > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_attention_is_captured(dtype: str) -> None:
    from adaattn_torch import scaled_dot_product_attention  # noqa: PLC0415 -- needs torch

    q, k, v = arrays(dtype)
    for call in (
        lambda: attention(q, k, v, backend="cuda", mask=Mask.causal()).out,
        lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
    ):
        call()  # warm-up: compiles and loads
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        q.copy_(torch.randn_like(q))
        graph.replay()
        torch.cuda.synchronize()
        assert relative(out, exact(q, k, v, causal=True)) <= UNIT[dtype]
