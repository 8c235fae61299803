"""What the backend decides before anything reaches a device: a recording kernel stands in for
it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest

from adaattn_core import ErrorBudget, attention
from adaattn_core.backend import Backend, Forwards, Measures, Samples
from adaattn_core.errors import BudgetInfeasibleError, ShapeError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import Landmark, ScoreSkip
from adaattn_core.testing.oracles import exact_attention, rms_row_norm
from adaattn_cuda import backend as backend_module
from adaattn_cuda import dispatch, starts
from adaattn_cuda.backend import CudaBackend
from adaattn_cuda.device import driver
from adaattn_cuda.device.views import ArrayView
from adaattn_cuda.facts import kernel_arithmetic
from adaattn_cuda.kernels.task import Task

NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "bool": "bool"}


class HostLibrary:
    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        made = np.full(shape, 7, np.float32 if dtype == "f32" else like.dtype)
        HostRecords.outputs[made.ctypes.data] = made
        return made

    def outputs(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        out, lse = self.empty(shape, dtype, like), self.empty(shape[:3], "f32", like)
        return out, lse, (self.pointer(out), self.pointer(lse))

    def stream(self, device: int) -> int:
        return 99

    def layout(self, array: Any) -> Any:
        return array.shape, array.strides, str(array.dtype)

    def pointer(self, array: Any) -> int:
        return int(array.ctypes.data)


class Recorder:
    """Stands in for `Sm80Launch`."""

    made: list[Task]
    started: list[tuple[tuple[int, ...], int, int]]

    workspace_bytes = 8
    step_keys = 64
    scratch_bytes = ()

    def __init__(self, task: Task, stream: int) -> None:
        self.name = f"kernel of {task.qk}/{task.pv}"
        Recorder.made.append(task)

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        Recorder.started.append((pointers, device, stream))


class HostRecords:
    """Stands in for `RowFacts`: the same figures, of whatever the arrays hold when read."""

    workspace_bytes = 1000

    def __init__(
        self, plan: Any, arrays: Any, masks: Any, like: Any, library: Any, stream: int
    ):
        self.problem, self.out = plan, HostRecords.outputs[arrays[3].pointer]

    outputs: ClassVar[dict[int, Any]] = {}

    def read(self) -> list[Any]:
        p = self.problem
        return [figures(x) for x in (p.query, p.key, p.value)] + [
            np.pad(
                (self.out.astype(np.float64) ** 2).sum((2, 3))[..., None],
                ((0, 0), (0, 0), (0, 4)),
            )
        ]


def figures(x: Any) -> Any:
    """A NumPy model of smxx_operand_norms on (batch, heads, len, dim)."""
    wide = x.astype(np.float64)
    good = np.isfinite(wide).all(-1)
    wide = np.where(good[..., None], wide, 0)
    tf32 = wide.astype(np.float32).view(np.uint32)
    kept = (
        wide,
        wide - wide.astype(ml_dtypes.bfloat16).astype(np.float64),
        wide - np.clip(wide, -65504, 65504).astype(np.float16).astype(np.float64),
        wide - ((tf32 + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32),
        (wide - wide.sum(2, keepdims=True) / max(wide.shape[2], 1)) * good[..., None],
    )
    return np.stack([(part**2).sum(-1).max(-1, initial=0) for part in kept], axis=-1)


def host_view(x: Any) -> ArrayView:
    strides = tuple(s // x.dtype.itemsize for s in x.strides)
    return ArrayView(x.ctypes.data, x.shape, strides, NAMES[str(x.dtype)], 0)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaBackend]:
    facts = driver.DeviceFacts("a card", "sm_80", 108, 166912)
    monkeypatch.setattr(driver, "load_driver", lambda: None)
    monkeypatch.setattr(driver, "device_facts", lambda device: facts)
    monkeypatch.setattr(driver, "current_device", lambda: -1)
    monkeypatch.setattr(backend_module, "view", host_view)
    monkeypatch.setattr(dispatch, "view", host_view)
    monkeypatch.setattr(backend_module, "library_of", lambda array: HostLibrary())
    monkeypatch.setattr(starts, "library_of", lambda array: HostLibrary())
    monkeypatch.setattr(dispatch.sm80, "Sm80Launch", Recorder)
    monkeypatch.setattr(backend_module, "RowFacts", HostRecords)
    monkeypatch.setattr(backend_module, "FactsPlan", lambda problem, *others: problem)
    monkeypatch.setattr(backend_module, "nvrtc_version", lambda: "13.5")
    Recorder.made, Recorder.started = [], []
    return CudaBackend()


def problem(
    dtype: Any = np.float32, mask: Mask | None = None, len_q: int = 40, heads: int = 2
) -> AttentionProblem:
    rng = np.random.default_rng(0)
    shapes = ((1, heads, len_q, 16), (1, 1, 50, 16), (1, 1, 50, 24))
    return AttentionProblem.from_arrays(
        *(rng.standard_normal(shape).astype(dtype) for shape in shapes), mask=mask
    )


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


# --- facts ---
@pytest.mark.parametrize(("step_keys", "keys"), [(16, 16), (64, 32), (176, 32)])
def test_the_kernels_state_their_arithmetic(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch, step_keys: int, keys: int
) -> None:
    """In fields of its own: steps, scores, sums, exponentials; a repaired row takes 32 keys."""
    monkeypatch.setattr(Recorder, "step_keys", step_keys)
    p = problem()
    raw = backend.run(p, Plan.uniform(p, HeadPlan()))
    raw.out[...] = 1.0
    facts = raw.facts[0, 0]
    assert (facts.score_residual_upper, facts.dropped_mass_upper) == (0, 0)
    said = facts.arithmetic
    assert said.step_keys == keys
    assert said.exp_rel_upper == 2.0**-22
    assert said.score_rel_upper == (p.dim_qk / 8 + 8) * 2.0**-22 + 2.0**-21
    assert said.sum_rel_upper == (32 + 50 / (2 * keys)) * 2.0**-22 + 2.0**-21
    narrow = kernel_arithmetic("bf16", "bf16", 64, 4096, 32)
    assert narrow.score_rel_upper == 16 * 2.0**-22
    assert narrow.sum_rel_upper == (4096 / 8 + 16) * 2.0**-22


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_facts_are_upper_bounds_and_read_late(backend: CudaBackend, dtype: Any) -> None:
    p = problem(dtype, mask=Mask.causal("bottom_right"))
    name = NAMES[str(np.dtype(dtype))]
    raw = backend.run(p, Plan.uniform(p, HeadPlan(qk=name, pv=name)))
    raw.out[...] = exact_attention(p).out.astype(dtype)  # what the kernel would have written
    facts = raw.facts[0, 1]
    for array, norm, residual in (
        (p.query[0, 1], facts.query_norm_upper, facts.query_residual_upper),
        (p.key[0, 0], facts.key_norm_upper, facts.key_residual_upper),
        (p.value[0, 0], facts.value_norm_upper, facts.value_residual_upper),
    ):
        true = np.linalg.norm(array.astype(np.float64), axis=-1).max()
        assert true <= norm <= 1.001 * true
        assert residual <= 1e-30 * norm, "operands are exact"
    assert facts.keys_max == 50
    size = rms_row_norm(raw.out[0, 1].astype(np.float64))
    assert 0.999 * size <= facts.output_rms <= size
    assert set(dict(raw.facts)) == {(0, 0), (0, 1)}


@pytest.mark.parametrize(("name", "bits"), [("tf32", 11), ("bf16", 8), ("f16", 11)])
def test_residuals_of_narrower_operands(backend: CudaBackend, name: str, bits: int) -> None:
    p = problem()
    raw = backend.run(p, Plan.uniform(p, HeadPlan(qk=name, pv=name)))
    raw.out[...] = 1.0
    facts = raw.facts[0, 0]
    norm = facts.query_norm_upper
    assert 2.0 ** -(bits + 3) * norm < facts.query_residual_upper <= 2.0**-bits * norm


def test_facts_of_values_that_are_not_finite(backend: CudaBackend) -> None:
    p = problem()
    p.value[0, 0, 3, 3] = math.nan
    raw = backend.run(p, Plan.uniform(p, HeadPlan()))
    raw.out[0, 0] = math.nan
    raw.out[0, 1] = 1.0
    assert raw.facts[0, 0].nonfinite
    assert not raw.facts[0, 1].nonfinite
    assert math.isfinite(raw.facts[0, 1].value_norm_upper)


def test_facts_of_escalated_heads_are_measured_again(backend: CudaBackend) -> None:
    p = problem()
    plan = Plan.uniform(p, HeadPlan(qk="bf16", pv="bf16"))
    raw = backend.run(p, plan)
    raw.out[...] = 1.0
    before = raw.facts[0, 1].query_residual_upper
    backend.run(p, plan.with_heads({(0, 1): HeadPlan()}), heads=[(0, 1)], into=raw)
    assert raw.facts[0, 1].query_residual_upper < 1e-30 < before
    assert raw.facts[0, 0].query_residual_upper == pytest.approx(before, rel=0.5)


def test_facts_of_an_empty_additive_mask(backend: CudaBackend) -> None:
    p = problem(mask=Mask.additive(np.zeros((0, 50), np.float32)), len_q=0)
    raw = backend.run(p, Plan.uniform(p, HeadPlan()))
    assert raw.facts[0, 0].bias_max_abs == 0
