"""Host side of ``sm90_attn_bwd_f16``: a backward pass on Hopper's matrix unit.

A pass is: the sums of the queries' gradient zeroed, the rows' records, the kernel itself, the
sums turned into the gradient; then the passes of ``sm80_attn_bwd``, which look at one word of
memory and end, unless a result was not finite or an lse too large: they do it all again.
"""

from __future__ import annotations

import ctypes
import math
import threading
from typing import Any

from adaattn_cuda.device import driver, tensor_maps
from adaattn_cuda.device.launch import kernel_of
from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.kernels import sm80_attn_bwd as sm80
from adaattn_cuda.kernels import smxx_attn_bwd_rows as rows
from adaattn_cuda.kernels import smxx_attn_bwd_sinks as sinks
from adaattn_cuda.kernels.backward_task import POINTERS, BackwardTask
from adaattn_cuda.kernels.sm80_attn_fwd import UnitList
from adaattn_cuda.kernels.sm90_attn_fwd_f16 import (
    FORMATS,
    DeviceMatrix,
    aligned,
    arrays_refusal,
    encode_map,
)
from adaattn_cuda.tuning import sm80_attn_bwd as sm80_tuning
from adaattn_cuda.tuning import sm90_attn_bwd_f16 as tuning
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import ARCH

__all__ = ["Params", "Sm90Backward", "refusal"]

_MAPS = ("query", "grad", "key", "value")
_ARRAYS = {"query": "query", "grad": "grad_out", "key": "key", "value": "value"}


class Params(ctypes.Structure):
    """The twin of ``Params`` in sm90_bwd_params.cuh: 3,776 bytes, passed by value."""

    _fields_ = (
        *((f"{name}_map", ctypes.c_ubyte * tensor_maps.MAP_BYTES) for name in _MAPS),
        *(
            (name, ctypes.c_void_p)
            for name in ("lse", "delta", "d_query", "d_key", "d_value", "turns", "broken")
        ),
        *(
            (name, ctypes.c_int32)
            for name in ("dim_qk", "dim_v", "heads_q", "len_q", "heads_kv", "len_kv", "group")
        ),
        ("scale", ctypes.c_float),
        ("scale_log2", ctypes.c_float),
        ("reserved", ctypes.c_int32),
        ("work", UnitList),
        ("padding", ctypes.c_ubyte * 56),
    )


class FinishParams(ctypes.Structure):
    """The twin of ``Params`` in smxx_attn_bwd_finish.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("sums", "out", "broken")),
        ("rows", ctypes.c_int64),
        ("len", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("reserved", ctypes.c_int32),
    )


def refusal(task: BackwardTask, arch: str) -> str | None:
    """Why this kernel does not take a task on an architecture, or None if it does."""
    dtype = task.query.dtype
    if arch != ARCH:
        return f"architecture {arch}: Hopper's matrix unit and copy engine"
    if dtype not in FORMATS:
        return f"{dtype} arrays: bf16 or f16"
    if task.softcap:
        return "a softcap: its derivative has no registers here"
    if task.allowed is not None or task.bias is not None:
        return "a mask given as an array: only one visible interval per row"
    if max(task.query.shape[3], task.value.shape[3]) > tuning.MAX_DIM:
        return f"a head dimension above {tuning.MAX_DIM}: no registers for its sums"
    if 0 in task.query.shape:
        return "no query at all"
    return arrays_refusal(task.query, task.key, task.value, task.grad_out)


def workspace_parts(task: BackwardTask, dim_qk: int) -> dict[str, tuple[int, int]]:
    """Offset and size in bytes of what a pass keeps beside the arrays; what is zeroed first."""
    count = math.prod(task.query.shape[:3])
    sizes = {
        "sums": 4 * count * dim_qk,
        "turns": 8 * count * task.deterministic,
        "broken": 16,
        "rows": sm80_tuning.RECORD_BYTES * count,
        "lse_log2": 4 * count,
        "deltas": 4 * count,
    }
    found, offset = {}, 0
    for name, size in sizes.items():
        found[name] = (offset, size)
        offset += -(-size // 16) * 16
    return found


class Sm90Backward:
    """A backward pass on Hopper, ready for arrays at any address.

    Parameters
    ----------
    task : BackwardTask
        One that `refusal` has nothing against.
    stream : int
        Where it will be started first.

    Raises
    ------
    UnsupportedError
        While the stream records a graph.
    """

    def __init__(self, task: BackwardTask, stream: int) -> None:
        device, dtype = task.query.device, task.query.dtype
        facts = driver.device_facts(device)
        chosen = tuning.choose(
            dtype, task.query.shape[3], task.value.shape[3], task.deterministic
        )
        self.name = chosen.spec.name
        self._parts = workspace_parts(task, chosen.dim_qk)
        self.workspace_bytes = sum(self._parts["deltas"])
        self._lock = threading.Lock()
        self._matrices = {
            name: DeviceMatrix.of(getattr(task, array)) for name, array in _ARRAYS.items()
        }
        vectorised = rows.is_vectorised(task.out, task.grad_out)

        def call(spec: KernelSpec, threads: int, params: Any, grid: int) -> driver.Call:
            kernel = kernel_of(spec, threads, stream)
            kernel.prepare(device)
            return driver.Call(kernel, params, grid)

        self._rows = rows.pack(task, 1.0 / task.scale)
        before = sm80_tuning.rows_spec(dtype, vectorised, facts.arch)
        self._calls = [call(before, sm80_tuning.ROWS_THREADS, self._rows, rows.blocks(task))]
        self._main: list[Params] = []
        for chunk, tiles in sm80.own_units(task, True, chosen.tile_n):
            params = _pack(task, chunk, tiles, self._matrices, chosen)
            units = len(chunk) or params.work.batch
            if grid := units * params.heads_kv * tiles:
                self._main.append(params)
                self._calls.append(call(chosen.spec, chosen.threads, params, grid))
        self._finish = FinishParams(rows=math.prod(task.query.shape[:3]), scale=task.scale)
        self._finish.len, self._finish.dim = task.query.shape[2:]
        grid = -(-self._finish.rows // chosen.finish_rows)
        self._calls.append(call(chosen.finish, chosen.finish_threads, self._finish, grid))
        self._again = sm80.passes(task, facts.arch, facts.multiprocessors)
        for part in self._again:
            spec = part.chosen.spec(facts.arch)
            self._calls.append(call(spec, part.chosen.threads, part.params, part.blocks))
        self._sinks = sinks.pack(task, 1.0 / task.scale)
        if task.sinks is not None:
            self._calls.append(sinks.call(task, self._sinks, stream))

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        """Enqueue the launches; `pointers` in the order of `POINTERS`."""
        named = dict(zip(POINTERS, pointers, strict=True))
        named |= {name: named["workspace"] + at for name, (at, _) in self._parts.items()}
        with self._lock:  # the driver copies the parameters before a start returns
            rows.place(self._rows, named)
            sinks.place(self._sinks, named)
            for params in self._main:
                for name in _MAPS:
                    tensor_maps.move(getattr(params, f"{name}_map"), named[_ARRAYS[name]])
                params.lse, params.delta = named["lse_log2"], named["deltas"]
                params.d_query, params.turns = named["sums"], named["turns"]
                params.broken = named["broken"]
                params.d_key, params.d_value = named["d_key"], named["d_value"]
            finish = self._finish
            finish.sums, finish.out = named["sums"], named["d_query"]
            finish.broken = named["broken"]
            for part in self._again:
                sm80.place(part, named)
            driver.zero_bytes(named["sums"], sum(self._parts["broken"]), stream)
            for call in self._calls:
                call.to(stream).start(device)


def _pack(
    task: BackwardTask,
    chunk: list[tuple[int, ...]],
    tiles: int,
    matrices: dict[str, DeviceMatrix],
    chosen: tuning.Tile,
) -> Params:
    params = aligned(Params)
    for name in _MAPS:
        box = chosen.tile_m if name in ("query", "grad") else chosen.tile_n
        encode_map(getattr(params, f"{name}_map"), matrices[name], box, task.query.dtype)
    _, params.heads_q, params.len_q, params.dim_qk = task.query.shape
    _, params.heads_kv, params.len_kv, params.dim_v = task.value.shape
    params.group = params.heads_q // params.heads_kv
    params.scale, params.scale_log2 = task.scale, task.scale * math.log2(math.e)
    sm80.pack_work(params.work, task, True, chunk, tiles)
    return params
