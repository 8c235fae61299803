"""A backend without a device: a recording kernel stands in for it."""

from __future__ import annotations

from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest

from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_cuda import backend as backend_module
from adaattn_cuda import dispatch, starts
from adaattn_cuda.backend import CudaBackend
from adaattn_cuda.device import driver
from adaattn_cuda.device.views import ArrayView
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


def host_backend(monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """A backend whose arrays, launches and figures are the host's."""
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
