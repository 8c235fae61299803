"""Host side of ``smxx_attn_bwd_sinks``: the sinks' own gradient, at the end of a pass."""

from __future__ import annotations

import ctypes
import math

from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import kernel_of
from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.kernels.backward_task import BackwardTask

__all__ = ["THREADS", "Params", "call", "pack", "place", "shipped", "spec"]

THREADS = 256
_POINTERS = ("sinks", "rows", "d_sinks")


class Params(ctypes.Structure):
    """The twin of ``Params`` in smxx_attn_bwd_sinks.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "len")),
        ("unit", ctypes.c_float),
        ("score_scale", ctypes.c_float),
        ("reserved", ctypes.c_int32),
    )


def spec(arch: str) -> KernelSpec:
    """Return the kernel to build."""
    return KernelSpec("smxx_attn_bwd_sinks", (THREADS,), 16 * THREADS, arch)


def shipped(arch: str) -> list[KernelSpec]:
    """Its one specialisation, for `adaattn warmup` and the budgets."""
    return [spec(arch)]


def pack(task: BackwardTask, unit: float) -> Params:
    """Pack all but the addresses; a block to a query head, records in units of 1 / `unit`."""
    params = Params(unit=unit, score_scale=math.log2(math.e) / unit)
    params.batch, params.heads, params.len, _ = task.query.shape
    return params


def call(task: BackwardTask, params: Params, stream: int) -> driver.Call:
    """Make the launch ready on the task's device."""
    device = task.query.device
    kernel = kernel_of(spec(driver.device_facts(device).arch), THREADS, stream)
    kernel.prepare(device)
    return driver.Call(kernel, params, params.heads)


def place(params: Params, pointers: dict[str, int]) -> None:
    """Write the addresses."""
    for name in _POINTERS:
        setattr(params, name, pointers[name])
