"""What the backend decides before anything reaches a device: a recording kernel stands in for
it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from backend_on_host import (
    NAMES,
    Recorder,
    host_backend,
    host_view,
    problem,
)

from adaattn_core import ErrorBudget, attention
from adaattn_core.backend import Backend, Forwards, Measures, Samples
from adaattn_core.errors import BudgetInfeasibleError, ShapeError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import Landmark, ScoreSkip
from adaattn_cuda import backend as backend_module
from adaattn_cuda import dispatch
from adaattn_cuda.backend import CudaBackend
from adaattn_cuda.device import driver
from adaattn_cuda.device.views import ArrayView
from adaattn_cuda.kernels.task import Task


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    return host_backend(monkeypatch)


def test_it_is_a_backend(backend: CudaBackend) -> None:
    assert isinstance(backend, Backend)
    assert isinstance(backend, Forwards)
    assert isinstance(backend, Samples)
    assert not isinstance(backend, Measures)
    can = backend.capabilities()
    assert (can.structures, can.target) == (("dense", "block_sparse", "landmark"), "sm80")


def test_one_kernel_on_the_callers_stream(backend: CudaBackend) -> None:
    p = problem()
    raw = backend.run(p, Plan.uniform(p, HeadPlan()))
    ((pointers, device, stream),) = Recorder.started
    arrays = (p.query, p.key, p.value, raw.out, raw.lse)
    assert pointers == (*(x.ctypes.data for x in arrays), 0, 0)
    assert (device, stream) == (0, 99)
    assert raw.out.shape == (1, 2, 40, 24)
    assert raw.lse.dtype == np.float32
    assert backend.provenance() == {
        "device": "a card", "arch": "sm_80", "nvrtc": "13.5", "kernels": "kernel of f32/f32",
        "workspace_bytes": "1008",
    }  # fmt: skip


def test_launch_plans_are_made_once_per_shape_stride_dtype_and_mask(
    backend: CudaBackend,
) -> None:
    causal = Mask.causal("bottom_right")
    for p in (problem(), problem(), problem(mask=causal), problem(mask=causal)):
        backend.run(p, Plan.uniform(p, HeadPlan()))
    assert len(Recorder.made) == 2
    different = (
        problem(len_q=41),
        problem(np.float16),
        problem(mask=Mask.causal("top_left")),
        problem(mask=Mask.key_lengths([7])),
        problem(mask=Mask.key_lengths([8])),
    )
    for p in different:
        backend.run(p, Plan.uniform(p, HeadPlan()))
    assert len(Recorder.made) == 7
    assert len(Recorder.started) == 9


def test_heads_of_different_formats_go_to_different_kernels(backend: CudaBackend) -> None:
    p = problem(heads=3)
    heads = {(0, 0): HeadPlan(), (0, 1): HeadPlan(qk="tf32", pv="f16"), (0, 2): HeadPlan()}
    backend.run(p, Plan(heads))
    assert [(t.qk, t.pv, t.heads) for t in Recorder.made] == [
        ("f32", "f32", ((0, 0), (0, 2))),
        ("tf32", "f16", ((0, 1),)),
    ]
    assert backend.provenance()["kernels"] == "kernel of f32/f32; kernel of tf32/f16"


def test_escalated_heads_are_written_into_the_same_arrays(backend: CudaBackend) -> None:
    p = problem()
    plan = Plan.uniform(p, HeadPlan(qk="bf16", pv="bf16"))
    raw = backend.run(p, plan)
    climbed = plan.with_heads({(0, 1): HeadPlan()})
    again = backend.run(p, climbed, heads=[(0, 1)], into=raw)
    assert again is raw
    assert Recorder.made[-1].heads == ((0, 1),)
    assert Recorder.started[0][0] == Recorder.started[1][0]


def test_masks_are_broadcast_by_strides(backend: CudaBackend) -> None:
    bias = np.zeros((1, 1, 50), np.float32)
    allowed = np.ones((40, 50), bool)
    p = problem(mask=Mask.additive(bias) & Mask.boolean(allowed))
    backend.run(p, Plan.uniform(p, HeadPlan()))
    (task,) = Recorder.made
    assert task.bias is not None
    assert task.allowed is not None
    assert task.bias.strides == (0, 0, 0, 1)
    assert task.allowed.strides == (0, 0, 50, 1)
    assert Recorder.started[0][0][5:] == (allowed.ctypes.data, bias.ctypes.data)


@pytest.mark.parametrize(
    ("make", "plan", "text"),
    [
        (lambda: problem(np.float64), HeadPlan(), "f64 arrays"),
        (problem, HeadPlan(structure=ScoreSkip()), "structure score_skip"),
        (problem, HeadPlan(structure=Landmark()), "landmarks with a screen of rank 16"),
        (problem, HeadPlan(structure=Landmark(clusters=2, screen_rank=0)), "2 clusters"),
    ],
)
def test_what_it_does_not_do_is_refused(
    backend: CudaBackend, make: Any, plan: HeadPlan, text: str
) -> None:
    p = make()
    with pytest.raises(UnsupportedError, match=text):
        backend.run(p, Plan.uniform(p, plan))
    assert Recorder.started == []


@pytest.mark.parametrize("scale", [1e-40, 1e38])
def test_scales_beyond_float32_are_refused(backend: CudaBackend, scale: float) -> None:
    p = problem()
    wild = AttentionProblem.from_arrays(p.query, p.key, p.value, scale=scale)
    with pytest.raises(UnsupportedError, match="scale 1e"):
        backend.run(wild, Plan.uniform(wild, HeadPlan()))


def test_wide_additive_masks_are_not_cast_silently(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cast could turn a finite entry into -inf, and so hide its key."""
    p = problem(mask=Mask.additive(np.full((40, 50), np.finfo(np.float64).min)))
    monkeypatch.setitem(NAMES, "float64", "f64")
    with pytest.raises(UnsupportedError, match="largest visible entry off"):
        backend.run(p, Plan.uniform(p, HeadPlan()))


def test_last_axis_must_be_contiguous(backend: CudaBackend) -> None:
    x = np.zeros((1, 1, 16, 16), np.float32).swapaxes(2, 3)
    p = AttentionProblem.from_arrays(x, x, x)
    with pytest.raises(UnsupportedError, match="stride 16 along its last axis"):
        backend.run(p, Plan.uniform(p, HeadPlan()))


@pytest.mark.parametrize("name", ["key", "the additive mask"])
def test_elements_must_begin_on_multiples_of_their_size(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    p = problem(mask=Mask.additive(np.zeros((40, 50), np.float32)))
    misaligned = p.key if name == "key" else p.mask.bias

    def shifted(x: Any) -> ArrayView:
        seen = host_view(x)
        return seen._replace(pointer=seen.pointer + 2) if x is misaligned else seen

    monkeypatch.setattr(dispatch, "view", shifted)
    with pytest.raises(UnsupportedError, match=f"{name} at address"):
        backend.run(p, Plan.uniform(p, HeadPlan()))
    assert Recorder.started == []


def test_mask_on_another_device(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(mask=Mask.boolean(np.ones((40, 50), bool)))

    def elsewhere(x: Any) -> ArrayView:
        seen = host_view(x)
        device = 1 if seen.dtype == "bool" else 0
        return ArrayView(seen.pointer, seen.shape, seen.strides, seen.dtype, device)

    monkeypatch.setattr(dispatch, "view", elsewhere)
    with pytest.raises(ShapeError, match="boolean mask on device 1"):
        backend.run(p, Plan.uniform(p, HeadPlan()))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_sampled_budgets_are_kept_by_theorem_where_it_reaches(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    p, budget = problem(dtype), ErrorBudget(rel=0.1)
    name = NAMES[str(np.dtype(dtype))]
    result = attention(p.query, p.key, p.value, budget=budget, backend=backend)
    assert result.certificate.holds(budget)
    assert set(result.certificate.guarantee.ravel()) == {"worst_case"}
    assert [(t.qk, t.pv, t.heads) for t in Recorder.made] == [(name, name, None)]
    # Else by rows that are drawn and computed exactly: here by a device that is not there.
    for error, holds in ((1e-9, True), (1.0, False)):

        def figures(task: Any, rows: Any, *_: Any, error: float = error) -> Any:
            return {i: np.tile([error, 1.0], (len(own), 1)) for i, own in rows.items()}

        monkeypatch.setattr(backend_module, "row_figures", figures)
        tight = ErrorBudget(rel=1e-6, on_violation="report")
        result = attention(p.query, p.key, p.value, budget=tight, backend=backend)
        assert result.certificate.holds(tight) == holds
        assert set(result.certificate.guarantee.ravel()) == {"sampled"}
    with pytest.raises(BudgetInfeasibleError):
        attention(p.query, p.key, p.value, budget=ErrorBudget(rel=1e-6), backend=backend)


def test_explain_says_why_the_host_planned(backend: CudaBackend) -> None:
    p = problem(mask=Mask.sliding_window(9, 0, "top_left"))
    result = attention(
        p.query, p.key, p.value, mask=p.mask, budget=ErrorBudget(rel=0.5), backend=backend
    )
    assert "dense" in result.plan.explain()
    assert "planning kernels are Hopper's" in result.plan.explain()


HOPPER = driver.DeviceFacts("a card", "sm_90a", 132, 232448)


def test_hopper_takes_heads_in_the_inputs_own_format(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed and escalated plans as well: its work list names the heads."""
    taken: list[Task] = []

    def launch(task: Task, stream: int) -> Any:
        taken.append(task)
        return SimpleNamespace(
            name="hopper's",
            workspace_bytes=0,
            step_keys=128,
            scratch_bytes=(),
            start=lambda *where: Recorder.started.append(where),
        )

    monkeypatch.setattr(driver, "device_facts", lambda device: HOPPER)
    monkeypatch.setattr(dispatch.sm90, "launch", launch)
    p = problem(ml_dtypes.bfloat16, heads=3)
    own, wide = HeadPlan(qk="bf16", pv="bf16"), HeadPlan()
    backend.run(p, Plan({(0, 0): own, (0, 1): wide, (0, 2): own}))
    assert [t.heads for t in taken] == [((0, 0), (0, 2))]
    assert [t.heads for t in Recorder.made] == [((0, 1),)]
    assert backend.provenance()["kernels"] == "hopper's; kernel of f32/f32"


def test_hopper_takes_8_bits_by_name_and_nothing_by_halves(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of one way run together; a problem without rows asks for no product."""
    taken: list[Task] = []

    def launch(task: Task, stream: int) -> Any:
        taken.append(task)
        return SimpleNamespace(
            name="eight bits",
            workspace_bytes=0,
            step_keys=128,
            scratch_bytes=(64, 32),
            start=lambda *where: Recorder.started.append(where),
        )

    monkeypatch.setattr(driver, "device_facts", lambda device: HOPPER)
    monkeypatch.setattr(dispatch.eight_bit, "launch", launch)
    p = problem(ml_dtypes.bfloat16, heads=3)
    one, other = HeadPlan(qk="i8", pv="e4m3"), HeadPlan(qk="i8", pv="e4m3", smooth_k=False)
    backend.run(p, Plan({(0, 0): one, (0, 1): other, (0, 2): one}))
    ways = [(task.heads, task.smooth_k) for task in taken]
    assert ways == [(((0, 0), (0, 2)), True), (((0, 1),), False)]
    assert len(Recorder.started[0][0]) == 9  # seven arrays, two pieces of scratch memory
    fields: dict[str, Any] = {"scales": "token", "rounding": "stochastic", "flush_keys": 64}
    for name, value in fields.items():
        refused = HeadPlan(**{"qk": "i8", "pv": "e4m3", name: value})
        with pytest.raises(UnsupportedError, match=name):
            backend.run(p, Plan.uniform(p, refused))
    single = problem(np.float32)
    with pytest.raises(UnsupportedError, match="f32"):
        backend.run(single, Plan.uniform(single, one))
    empty = problem(ml_dtypes.bfloat16, len_q=0)
    backend.run(empty, Plan.uniform(empty, one))
    assert [(task.qk, task.pv) for task in Recorder.made] == [("bf16", "bf16")]
