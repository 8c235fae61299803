"""Host side of ``sm80_attn_bwd``: parameters, work lists and grids of a backward pass.

All but `Sm80Backward` touches no device: a pass is described completely and can be looked at in
a test. What a block owns (queries, or keys) decides how the problem is told to it: for keys,
both sides and both ends of the mask's window change places.
"""

from __future__ import annotations

import ctypes
import math
import threading
from typing import NamedTuple

from adaattn_core.errors import UnsupportedError
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import kernel_of
from adaattn_cuda.device.views import ArrayView
from adaattn_cuda.jit.spec import SOFTCAP
from adaattn_cuda.kernels import smxx_attn_bwd_rows as rows
from adaattn_cuda.kernels import smxx_attn_bwd_sinks as sinks
from adaattn_cuda.kernels.backward_task import POINTERS, BackwardTask
from adaattn_cuda.kernels.sm80_attn_fwd import BIAS_TYPES, MAX_UNITS, Unit, UnitList
from adaattn_cuda.tuning import sm80_attn_bwd as tuning
from adaattn_cuda.work.geometry import UNLIMITED, extent

__all__ = [
    "DIM_LIMITS",
    "Params",
    "Part",
    "Sm80Backward",
    "passes",
    "refuse",
    "workspace_bytes",
]

DIM_LIMITS = {"bf16": 256, "f16": 256, "f32": 192}
"""Longest rows whose gradients fit the registers of a warp."""

_SIDES = {False: ("query", "grad_out"), True: ("key", "value")}
_GRADIENTS = {
    "query": ("d_query", None),
    "key_value": ("d_key", "d_value"),
    "key": ("d_key", None),
    "value": (None, "d_value"),
    "statistics": (None, None),
}


class _Side(ctypes.Structure):
    """The twin of ``Side`` in sm80_bwd_params.cuh."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        *(
            (f"{name}_{axis}", ctypes.c_int64)
            for name in ("first", "second")
            for axis in ("batch", "head", "row")
        ),
    )


class Params(ctypes.Structure):
    """The twin of ``Params`` in sm80_bwd_params.cuh."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "allowed", "bias", "rows", "d_first", "d_second", "d_bias", "sinks", "broken",
            )
        ),
        ("own", _Side),
        ("streamed", _Side),
        *(
            (f"{name}_{axis}", ctypes.c_int64)
            for name in ("allowed", "bias", "d_bias")
            for axis in ("batch", "head", "row", "key")
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                "dim_qk", "dim_v", "heads_q", "len_q", "own_heads", "own_len", "group",
                "bias_type", "blocks", "grid",
            )
        ),
        ("scale", ctypes.c_float),
        ("score_scale", ctypes.c_float),
        ("softcap_rate", ctypes.c_float),
        ("out_scale", ctypes.c_float),
        ("work", UnitList),
    )  # fmt: skip


class Part(NamedTuple):
    """One launch of a backward pass; the addresses are still missing (see `place`)."""

    chosen: tuning.Specialisation
    params: Params
    blocks: int


def refuse(task: BackwardTask) -> None:
    """Raise if the kernel does not take a task.

    Raises
    ------
    UnsupportedError
        If a head dimension or a length is too large, or the sums of a broadcast mask's gradient
        would have to come in one order.
    """
    dtype, dims = task.query.dtype, (task.query.shape[3], task.value.shape[3])
    if max(dims) > DIM_LIMITS[dtype]:
        raise UnsupportedError(
            got=f"dim_qk={dims[0]}, dim_v={dims[1]} in {dtype}",
            needed=f"head dimensions of at most {DIM_LIMITS[dtype]} for its gradients",
            do="take another backend's gradient for this problem",
        )
    if max(task.query.shape[2], task.key.shape[2]) > UNLIMITED:
        raise UnsupportedError(
            got=f"len_q={task.query.shape[2]}, len_kv={task.key.shape[2]}",
            needed=f"lengths of at most {UNLIMITED}",
            do="split the queries",
        )
    if task.softcap and task.d_bias is not None:
        raise UnsupportedError(
            got="the gradient of an additive mask under a softcap",
            needed="one of the two: the kernels keep no score for both",
            do="take another backend's gradient for this problem",
        )
    if task.deterministic and task.d_bias is not None:
        sizes = zip(task.d_bias.shape, task.d_bias.strides, strict=True)
        if any(n > 1 and step == 0 for n, step in sizes):
            raise UnsupportedError(
                got="a deterministic gradient of a broadcast additive mask",
                needed="a mask of the scores' full shape: its entries are summed by no order",
                do="expand the mask and sum its gradient, or leave deterministic out",
            )


def passes(task: BackwardTask, arch: str, most_blocks: int | None = None) -> list[Part]:
    """Every launch of a backward pass, in order; the rows' records come before them.

    With `most_blocks` no launch has more, and they take the work in turn.
    """
    array_mask = task.allowed is not None or task.bias is not None
    vectorised = rows.is_vectorised(task.query, task.key, task.value, task.grad_out)
    dtype, dims = task.query.dtype, (task.query.shape[3], task.value.shape[3])
    found = []
    for output in tuning.outputs(dtype, *dims):
        chosen = tuning.specialise(
            arch, dtype, dtype, output, *dims, array_mask=array_mask, vectorised=vectorised,
            rule=SOFTCAP if task.softcap else 0,
        )  # fmt: skip
        for chunk, tiles in own_units(task, chosen.owns_keys, chosen.rows):
            params = _pack(task, chosen, chunk, tiles)
            own_heads = params.work.heads_per_unit
            units = len(chunk) or params.work.batch
            params.blocks = units * own_heads * tiles
            params.grid = min(params.blocks, most_blocks or params.blocks)
            if params.grid:
                found.append(Part(chosen, params, params.grid))
    return found


def workspace_bytes(task: BackwardTask) -> int:
    """Bytes of the rows' records."""
    return tuning.RECORD_BYTES * math.prod(task.query.shape[:3])


def own_units(
    task: BackwardTask, keys: bool, rows_per_block: int
) -> list[tuple[list[tuple[int, ...]], int]]:
    """Sequences of each launch as its blocks see them, longest first; tiles of the longest."""
    if task.is_uniform:
        length = (task.key if keys else task.query).shape[2]
        return [([], -(-length // rows_per_block))]
    every: list[tuple[int, ...]] = []
    for s in task.sequences:
        queries, own = (s.q_start, s.len_q), (s.kv_start, s.len_kv)
        first, second = (own, queries) if keys else (queries, own)
        if first[1] > 0:
            every.append((s.batch, 0, *first, *second))
    every.sort(key=lambda unit: -unit[3])
    chunks = [every[i : i + MAX_UNITS] for i in range(0, len(every), MAX_UNITS)]
    return [(chunk, -(-chunk[0][3] // rows_per_block)) for chunk in chunks]


def pack_work(
    work: UnitList,
    task: BackwardTask,
    keys: bool,
    chunk: list[tuple[int, ...]],
    tiles: int,
) -> None:
    """Write the work list of a launch whose blocks own queries, or keys."""
    own, streamed = (task.key, task.query) if keys else (task.query, task.key)
    work.batch, work.heads_per_unit, work.len_q, _ = own.shape
    work.len_kv = streamed.shape[2]
    left, right = extent(task.left), extent(task.right)
    work.left, work.right = (right, left) if keys else (left, right)
    work.bottom_right = int(task.bottom_right)
    work.group_size = 1 if keys else task.query.shape[1] // task.key.shape[1]
    work.tiles, work.unit_count = tiles, len(chunk)
    for i, unit in enumerate(chunk):
        work.units[i] = Unit(*unit)


def _pack(
    task: BackwardTask, chosen: tuning.Specialisation, chunk: list[tuple[int, ...]], tiles: int
) -> Params:
    params, keys = Params(), chosen.owns_keys
    pack_work(params.work, task, keys, chunk, tiles)
    own = task.key if keys else task.query
    _, params.own_heads, params.own_len, params.dim_qk = own.shape
    params.group = task.query.shape[1] // task.key.shape[1] if keys else 1
    for side, which in ((params.own, keys), (params.streamed, not keys)):
        for place_name, name in zip(("first", "second"), _SIDES[which], strict=True):
            array: ArrayView = getattr(task, name)
            for axis, stride in zip(("batch", "head", "row"), array.strides, strict=False):
                setattr(side, f"{place_name}_{axis}", stride)
    axes = ("batch", "head", "key", "row") if keys else ("batch", "head", "row", "key")
    for name in ("allowed", "bias", "d_bias"):
        mask: ArrayView | None = getattr(task, name)
        if mask is not None:
            for axis, stride in zip(axes, mask.strides, strict=True):
                setattr(params, f"{name}_{axis}", stride)
    params.bias_type = 0 if task.bias is None else BIAS_TYPES[task.bias.dtype]
    _, params.heads_q, params.len_q, _ = task.query.shape
    params.dim_v = task.value.shape[3]
    params.scale = task.softcap or task.scale
    params.score_scale = math.log2(math.e) * (1.0 if chosen.array_mask else params.scale)
    params.softcap_rate, params.out_scale = task.softcap_rate, task.scale
    return params


def place(part: Part, pointers: dict[str, int]) -> None:
    """Write the addresses of a start into a launch's parameters."""
    params, keys = part.params, part.chosen.owns_keys
    for side, which in ((params.own, keys), (params.streamed, not keys)):
        side.first, side.second = (pointers[name] for name in _SIDES[which])
    for name in ("allowed", "bias", "d_bias", "sinks"):
        setattr(params, name, pointers[name] or None)
    params.rows, params.broken = pointers["rows"], pointers.get("broken") or None
    first, second = _GRADIENTS[part.chosen.output]
    params.d_first = pointers[first] if first else None
    params.d_second = pointers[second] if second else None


class Sm80Backward:
    """A backward pass on the sm80 family, ready for arrays at any address.

    Parameters
    ----------
    task : BackwardTask
    stream : int
        Where it will be started first.

    Raises
    ------
    UnsupportedError
        As `refuse` does, or while the stream records a graph.
    """

    def __init__(self, task: BackwardTask, stream: int) -> None:
        refuse(task)
        device = task.query.device
        arch = driver.device_facts(device).arch
        self.workspace_bytes = workspace_bytes(task)
        parts = passes(task, arch)
        self.name = "; ".join(dict.fromkeys(part.chosen.spec(arch).name for part in parts))
        self._lock = threading.Lock()
        array_mask = task.allowed is not None or task.bias is not None
        unit = 1.0 if array_mask else 1.0 / (task.softcap or task.scale)
        self._rows = rows.pack(task, unit)
        vectorised = rows.is_vectorised(task.out, task.grad_out)
        before = tuning.rows_spec(task.query.dtype, vectorised, arch)
        kernel = kernel_of(before, tuning.ROWS_THREADS, stream)
        kernel.prepare(device)
        grid = rows.blocks(task)
        self._calls = [driver.Call(kernel, self._rows, grid)] if grid else []
        self._parts = parts
        for part in parts:
            kernel = kernel_of(part.chosen.spec(arch), part.chosen.threads, stream)
            kernel.prepare(device)
            self._calls.append(driver.Call(kernel, part.params, part.blocks))
        self._sinks = sinks.pack(task, unit)
        if task.sinks is not None:
            self._calls.append(sinks.call(task, self._sinks, stream))

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        """Enqueue the launches; `pointers` in the order of `POINTERS`."""
        named = dict(zip(POINTERS, pointers, strict=True))
        named["rows"] = named["workspace"]
        with self._lock:  # the driver copies the parameters before a start returns
            rows.place(self._rows, named)
            sinks.place(self._sinks, named)
            for part in self._parts:
                place(part, named)
            for call in self._calls:
                call.to(stream).start(device)
