"""Host side of ``sm90_attn_fwd_8bit``: quantiser and attention as one launch."""

from __future__ import annotations

import ctypes
import math
import threading
from typing import Any

from adaattn_cuda.device import driver, tensor_maps
from adaattn_cuda.device.launch import kernel_of, upload
from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
from adaattn_cuda.kernels.smxx_quantize import Codes, Quantiser
from adaattn_cuda.kernels.task import Task
from adaattn_cuda.quantised import QuantisedRun
from adaattn_cuda.recent import Recent
from adaattn_cuda.tuning.sm90_attn_fwd_8bit import MAX_DIM, Tile, choose
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import ARCH
from adaattn_cuda.work.records import work_list

__all__ = ["EightBitLaunch", "QuantisedParams", "is_asked", "launch", "pack", "refusal"]

E4M3_MAX = 448.0
MOST_SLACK_LOG2 = 8.0
"""How far a weight may exceed its factor before the reference follows, where it has room."""
_PANEL_BYTES = 128
_ADDRESSES_REMEMBERED = 128


class QuantisedParams(ctypes.Structure):
    """The twin of ``QuantisedParams`` in sm90_attn_fwd_8bit.cuh: 1,408 bytes."""

    _fields_ = (
        ("attention", sm90.Params),
        *((name, ctypes.c_uint64) for name in ("query_scales", "lse_shift", "tile_scales")),
        *((name, ctypes.c_int32) for name in ("heads_q", "heads_kv", "len_q", "rows_kv")),
        ("weight_log2", ctypes.c_float),
        ("weight_slack", ctypes.c_float),
        ("zero", ctypes.c_float),
        ("reserved", ctypes.c_int32 * 3),
    )


def is_asked(task: Task) -> bool:
    """Whether an operand of the task has 8 bits."""
    return task.qk in ("i8", "e4m3") or task.pv in ("i8", "e4m3")


def refusal(task: Task, arch: str) -> str | None:
    """Why this kernel does not take a task on an architecture, or None if it does."""
    dtype = task.query.dtype
    if arch != ARCH:
        return f"formats {task.qk}, {task.pv} on {arch}: 8-bit products run on sm_90a alone"
    if dtype not in sm90.FORMATS:
        return f"{dtype} arrays in formats {task.qk}, {task.pv}: bf16 or f16 arrays"
    if task.qk not in ("i8", dtype) or task.pv not in ("e4m3", dtype):
        return f"formats {task.qk}, {task.pv}: qk i8 or {dtype}, pv e4m3 or {dtype}"
    if task.allowed is not None or task.bias is not None:
        return "a mask given as an array: only one visible interval per row in 8 bits"
    if task.rule:
        return "a softcap or sinks: not in 8 bits"
    for name, dim in (("dim_qk", task.query.shape[3]), ("dim_v", task.value.shape[3])):
        if dim > MAX_DIM:
            return f"{name} {dim}: at most {MAX_DIM} in 8 bits"
    return sm90.arrays_refusal(task.query, task.key, task.value, task.out)


class EightBitLaunch:
    """Quantiser and attention, ready for arrays at any address.

    Parameters
    ----------
    task : Task
        One that `refusal` has nothing against.
    stream : int
        Where it will be started first.
    tile : Tile, optional
        Overrules the choice, for measurements.

    Attributes
    ----------
    scratch_bytes : tuple of int
        For codes and for scales; nobody reads the codes after a start.
    layout : Codes

    Raises
    ------
    UnsupportedError
        If it is made while the stream records a graph: lists must be copied first.
    """

    def __init__(self, task: Task, stream: int, tile: Tile | None = None) -> None:
        device = task.query.device
        dims = task.query.shape[3], task.value.shape[3]
        self._tile = choose(task.qk, task.pv, *dims) if tile is None else tile
        self._quantiser = Quantiser(task, stream)
        self.layout: Codes = self._quantiser.layout
        blocks = driver.device_facts(device).multiprocessors
        items = work_list(
            task.geometry, self._tile.tile_m, self._tile.tile_n, blocks,
            key_step=self._tile.tile_n, places=self._quantiser.places,
        )  # fmt: skip
        self._work = upload(items, device, stream)
        self._task = task
        self._calls: Recent[list[driver.Call]] = Recent(_ADDRESSES_REMEMBERED)
        self._lock = threading.Lock()
        own = self._tile.spec(task.query.dtype)
        self.name = own.name
        self.step_keys = self._tile.tile_n
        self.scratch_bytes: tuple[int, ...] = (self.layout.codes()[1], self.layout.scales()[1])
        self.workspace_bytes = self._work.size_bytes + self._quantiser.size_bytes
        if self._work.grid:
            self._kernel = kernel_of(own, self._tile.threads, stream)
            self._kernel.prepare(device)

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        """Enqueue the quantiser and the kernel behind it.

        Parameters
        ----------
        pointers : tuple of int
            Of query, key, value, out and lse; of two masks that are not looked at; of scratch
            memory for codes and scales, on multiples of 16 bytes.
        device, stream : int
        """
        if not self._work.grid:
            return
        known_by = (stream, pointers)
        with self._lock:
            calls = self._calls.get(known_by)
            if calls is None:
                calls = self._make(pointers[:5], pointers[-2], pointers[-1], stream)
                self._calls.put(known_by, calls)
        for call in calls:
            call.start(device)

    def quantised(self, memory: Any, address: int) -> QuantisedRun:
        """Return what certificates read of a start's scales, which `memory` keeps alive."""
        return QuantisedRun(
            self.layout, self._task.sequences, self._quantiser.places, memory, address,
            self.scratch_bytes[-1], self._task.query.device,
        )  # fmt: skip

    def _make(
        self, pointers: tuple[int, ...], codes: int, scales: int, stream: int
    ) -> list[driver.Call]:
        params = pack(self._task, self._tile, self.layout, pointers, codes, scales)
        own = params.attention
        own.items, own.sources = self._work.items, self._work.sources
        own.rounds = self._work.rounds
        quantise = self._quantiser.calls(pointers[:3], codes, scales, stream)
        return [*quantise, driver.Call(self._kernel, params, self._work.grid, stream)]


def pack(
    task: Task, tile: Tile, layout: Codes, pointers: tuple[int, ...], codes: int, scales: int
) -> QuantisedParams:
    """Return the kernel's argument without its work.

    Parameters
    ----------
    task, tile, layout : Task, Tile, Codes
    pointers : tuple of int
        Of query, key, value, out and lse.
    codes, scales : int
        Addresses of what the quantiser makes.
    """
    dtype = task.query.dtype
    query, key, value, out, lse = (
        sm90.DeviceMatrix.of(array).at(pointer)
        for array, pointer in zip(
            (task.query, task.key, task.value, task.out, task.lse), pointers, strict=True
        )
    )
    params = sm90.aligned(QuantisedParams)
    own = params.attention
    own.query, own.key[0], own.value[0], own.out, own.lse = (
        sm90.matrix(m) for m in (query, key, value, out, lse)
    )
    places = {name: codes + offset for name, offset in layout.codes()[0].items()}
    places |= {name: scales + offset for name, offset in layout.scales()[0].items()}
    rows, kv_rows = (layout.batch, layout.heads_q), (layout.batch, layout.heads_kv)
    if layout.qk:
        _encode(own.query_map, places["query_codes"], (*rows, layout.len_q, layout.dim_qk),
                tile.tile_m)  # fmt: skip
        _encode(own.key_map[0], places["key_codes"],
                (*kv_rows, layout.rows_kv, layout.dim_qk), tile.tile_n)  # fmt: skip
    else:
        sm90.encode_map(own.query_map, query, tile.tile_m, dtype)
        sm90.encode_map(own.key_map[0], key, tile.tile_n, dtype)
    if layout.pv:
        _encode(own.value_map[0], places["value_codes"],
                (*kv_rows, layout.dim_v, layout.rows_kv), layout.dim_v)  # fmt: skip
    else:
        sm90.encode_map(own.value_map[0], value, tile.tile_n, dtype)
    own.scale_log2 = task.scale * math.log2(math.e)
    own.inverse_scale = 1.0 / task.scale
    own.dim_qk, own.dim_v = query.shape[3], out.shape[3]
    for name in ("query_scales", "lse_shift", "tile_scales"):
        setattr(params, name, places.get(name, 0))
    for name in ("heads_q", "heads_kv", "len_q", "rows_kv"):
        setattr(params, name, getattr(layout, name))
    room = math.inf
    if layout.pv:
        params.weight_log2 = math.log2(task.p_scale)
        room = math.log2(E4M3_MAX) - params.weight_log2
    params.weight_slack = min(max(room, 0.0), MOST_SLACK_LOG2)
    return params


def _encode(place: Any, address: int, shape: tuple[int, int, int, int], rows: int) -> None:
    """Write the tensor map of contiguous codes, whose box is `rows` rows of 128 bytes."""
    batch, heads, length, columns = shape
    steps = (columns, columns * length, columns * length * heads)
    tensor_maps.encode(
        place, "u8", address, (columns, length, heads, batch), steps, (_PANEL_BYTES, rows)
    )


def launch(task: Task, stream: int, tile: Tile | None = None) -> EightBitLaunch:
    """Make a task ready; see `EightBitLaunch`."""
    return EightBitLaunch(task, stream, tile)
