"""Host side of ``smxx_attn_bwd_rows``: the launch that every backward pass begins with."""

from __future__ import annotations

import ctypes
import math

from adaattn_cuda.device.views import ArrayView
from adaattn_cuda.kernels.backward_task import BackwardTask
from adaattn_cuda.tuning.sm80_attn_bwd import ROWS_PER_BLOCK

__all__ = ["Params", "blocks", "is_vectorised", "pack", "place"]

_POINTERS = (
    "out", "grad_out", "lse", "grad_lse", "sinks", "rows", "lse_log2", "deltas", "broken",
)  # fmt: skip


class Params(ctypes.Structure):
    """The twin of ``Params`` in smxx_attn_bwd_rows.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *(
            (f"{name}_{axis}", ctypes.c_int64)
            for name in ("out", "grad")
            for axis in ("batch", "head", "row")
        ),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "len", "dim_v")),
        ("unit", ctypes.c_float),
        ("reserved", ctypes.c_int32),
    )


def pack(task: BackwardTask, unit: float) -> Params:
    """Pack all but the addresses."""
    params = Params()
    params.batch, params.heads, params.len, params.dim_v = task.out.shape
    for name, array in (("out", task.out), ("grad", task.grad_out)):
        for axis, stride in zip(("batch", "head", "row"), array.strides, strict=False):
            setattr(params, f"{name}_{axis}", stride)
    params.unit = unit
    return params


def place(params: Params, pointers: dict[str, int]) -> None:
    """Write the addresses; those that are not named are null."""
    for name in _POINTERS:
        setattr(params, name, pointers.get(name) or None)


def blocks(task: BackwardTask) -> int:
    """Blocks of the launch."""
    return -(-math.prod(task.out.shape[:3]) // ROWS_PER_BLOCK)


def is_vectorised(*arrays: ArrayView) -> bool:
    """Whether every row begins on 16 bytes and holds whole 16-byte chunks."""
    for array in arrays:
        chunk = 16 // array.item_bytes
        steps = (s for n, s in zip(array.shape[:3], array.strides[:3], strict=True) if n > 1)
        if array.pointer % 16 or array.shape[3] % chunk or any(s % chunk for s in steps):
            return False
    return True
