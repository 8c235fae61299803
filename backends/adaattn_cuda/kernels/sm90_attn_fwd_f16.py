"""Host side of ``sm90_attn_fwd_f16``: what it takes, its parameters, its launches.

A launch is a specialisation, arrays and a work list, from the host or written by a kernel. The
parameter block depends on pointers and strides; it is passed by value, packed once and moved to
other addresses.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from adaattn_core.errors import ArgumentError
from adaattn_cuda.device import driver, tensor_maps
from adaattn_cuda.device.launch import DeviceWork, kernel_of, upload
from adaattn_cuda.device.views import ArrayView
from adaattn_cuda.jit.spec import SINKS
from adaattn_cuda.kernels.task import Task
from adaattn_cuda.recent import Recent
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import ARCH, FROM_TABLE, Tile, choose
from adaattn_cuda.work.geometry import UNLIMITED
from adaattn_cuda.work.records import TENSORS, work_list

__all__ = [
    "DeviceMatrix",
    "Params",
    "Sm90Launch",
    "aligned",
    "arrays_refusal",
    "encode_map",
    "launch",
    "move_params",
    "pack_arrays",
    "pack_params",
    "refusal",
]

FORMATS = ("bf16", "f16")
MAX_DIM = 256
SLACK_LOG2 = 8.0
"""How far the running maximum may grow before rescaling; kSlackLog2 in softmax/slack.cuh."""

_Block = TypeVar("_Block", bound=ctypes.Structure)
_ALIGNMENT_BYTES = 16
_ELEMENT_BYTES = 2
_PANEL_COLUMNS = 64
_MAX_STRIDE_BYTES = 1 << 40
_ADDRESSES_REMEMBERED = 128
_NAMES = ("query", "key", "value", "out")
_SINKS_PLACE = 7
"""Of the sinks' address among those of `Arrays`."""


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    """A (batch, heads, len, dim) array on the device, unit stride along dim.

    Attributes
    ----------
    pointer : int
        Device address of the first element.
    shape : tuple of int
        (batch, heads, len, dim).
    strides : tuple of int
        Elements from one batch entry, head and row to the next.
    """

    pointer: int
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int]

    @classmethod
    def of(cls, array: ArrayView) -> DeviceMatrix:
        """Describe a (batch, heads, len, dim) array, or a (batch, heads, len) one as dim 1."""
        shape, (batch, head, row) = (*array.shape, 1)[:4], array.strides[:3]
        return cls(array.pointer, cast("Any", shape), (batch, head, row))

    def at(self, pointer: int) -> DeviceMatrix:
        """Describe the same layout at another address."""
        return DeviceMatrix(pointer, self.shape, self.strides)


class Matrix(ctypes.Structure):
    """The twin of ``Matrix`` in sm90_params.cuh; strides in elements."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("stride_row", ctypes.c_int64),
        ("stride_head", ctypes.c_int64),
        ("stride_batch", ctypes.c_int64),
    )


class Params(ctypes.Structure):
    """The twin of ``AttentionParams`` in sm90_params.cuh: 1,344 bytes, passed by value."""

    _fields_ = (
        ("query_map", ctypes.c_ubyte * tensor_maps.MAP_BYTES),
        ("key_map", ctypes.c_ubyte * tensor_maps.MAP_BYTES * len(TENSORS)),
        ("value_map", ctypes.c_ubyte * tensor_maps.MAP_BYTES * len(TENSORS)),
        ("query", Matrix),
        ("key", Matrix * len(TENSORS)),
        ("value", Matrix * len(TENSORS)),
        ("out", Matrix),
        ("lse", Matrix),
        ("items", ctypes.c_uint64),
        ("sources", ctypes.c_uint64),
        ("bias", ctypes.c_uint64),
        *(
            (n, ctypes.c_uint64)
            for n in ("queue", "row_stops", "partial_out", "partial_lse", "squares")
        ),
        ("inverse_scale", ctypes.c_float),
        ("scale_log2", ctypes.c_float),
        ("slack", ctypes.c_float),
        ("rounds", ctypes.c_int32),
        ("dim_qk", ctypes.c_int32),
        ("dim_v", ctypes.c_int32),
        ("squares_head", ctypes.c_int32),
        ("squares_batch", ctypes.c_int32),
        ("skipped", ctypes.c_uint64),
        ("skipped_most", ctypes.c_uint64),
        ("sinks", ctypes.c_uint64),
        ("softcap_rate", ctypes.c_float),
        ("padding", ctypes.c_ubyte * 36),
    )


# --- what it takes ---------------------------------------------------------------------------
def refusal(task: Task, arch: str) -> str | None:
    """Why this kernel does not take a task on an architecture, or None if it does."""
    dtype = task.query.dtype
    if arch != ARCH:
        return f"architecture {arch}: Hopper's matrix unit and copy engine"
    if dtype not in FORMATS or {task.qk, task.pv} != {dtype}:
        return f"{dtype} arrays in formats {task.qk}, {task.pv}: bf16 or f16 throughout"
    if task.allowed is not None or task.bias is not None:
        return "a mask given as an array: only one visible interval per row"
    return arrays_refusal(task.query, task.key, task.value, task.out)


def arrays_refusal(
    query: ArrayView, key: ArrayView, value: ArrayView, out: ArrayView | None = None
) -> str | None:
    """Why the kernel does not take 16-bit arrays of these sizes and layouts, or None."""
    for name, dim in (("dim_qk", query.shape[3]), ("dim_v", value.shape[3])):
        if dim % 8 or not 8 <= dim <= MAX_DIM:
            return f"{name} {dim}: needs a multiple of 8 between 8 and {MAX_DIM}"
    longest = max(query.shape[2], key.shape[2])
    if longest > UNLIMITED:
        return f"len {longest}: at most {UNLIMITED} rows"
    if key.shape[2] == 0:
        return "no key at all: an array without memory has no tensor map"
    reasons = (
        _layout_refusal(name, DeviceMatrix.of(array))
        for name, array in zip(_NAMES, (query, key, value, out), strict=True)
        if array is not None
    )
    return next((reason for reason in reasons if reason), None)


def _layout_refusal(name: str, matrix: DeviceMatrix) -> str | None:
    """Why the copy engine cannot address an array, or None if it can.

    The epilogue's 16-byte stores ask the same of the output.
    """
    if matrix.pointer % _ALIGNMENT_BYTES:
        return f"{name} starts at an address that is no multiple of {_ALIGNMENT_BYTES} bytes"
    for axis, size, stride in zip(
        ("batch", "heads", "len"), matrix.shape, matrix.strides, strict=False
    ):
        step = stride * _ELEMENT_BYTES
        if size > 1 and (step % _ALIGNMENT_BYTES or not 0 < step < _MAX_STRIDE_BYTES):
            needed = f"a positive multiple of {_ALIGNMENT_BYTES}"
            return f"{name} steps {step} bytes along {axis}; needs {needed}"
    return None


# --- parameters ------------------------------------------------------------------------------
def pack_params(
    tile: Tile,
    dtype: str,
    query: DeviceMatrix,
    keys: Sequence[DeviceMatrix],
    values: Sequence[DeviceMatrix],
    out: DeviceMatrix,
    lse: DeviceMatrix,
    scale: float,
    work: DeviceWork,
) -> Params:
    """Pack the kernel's parameter block, 1,344 bytes, to be passed by value.

    Parameters
    ----------
    tile : Tile
    dtype : {"bf16", "f16"}
    query, out : DeviceMatrix
        Shapes (batch, heads_q, len_q, dim_qk) and (batch, heads_q, len_q, dim_v).
    keys, values : sequence of DeviceMatrix
        Up to three pairs; a source's ``tensor`` is the index here.
    lse : DeviceMatrix
        float32, shape (batch, heads_q, len_q, 1).
    scale : float
        Factor on the scores, > 0.
    work : DeviceWork

    Raises
    ------
    AdaAttnError
        If the driver refuses a tensor map; `refusal` names what it would refuse.
    """
    params = pack_arrays(tile, dtype, query, keys, values, out, lse, scale)
    params.items, params.sources, params.rounds = work.items, work.sources, work.rounds
    return params


def pack_arrays(
    tile: Tile,
    dtype: str,
    query: DeviceMatrix,
    keys: Sequence[DeviceMatrix],
    values: Sequence[DeviceMatrix],
    out: DeviceMatrix,
    lse: DeviceMatrix,
    scale: float,
) -> Params:
    """Pack the arrays and the scale alone; what names the work is left to the caller."""
    params = aligned(Params)
    encode_map(params.query_map, query, tile.tile_m, dtype)
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        encode_map(params.key_map[index], key, tile.tile_n, dtype)
        encode_map(params.value_map[index], value, tile.tile_n, dtype)
        params.key[index], params.value[index] = matrix(key), matrix(value)
    params.query, params.out, params.lse = matrix(query), matrix(out), matrix(lse)
    params.inverse_scale = 1.0 / scale
    params.scale_log2 = scale * math.log2(math.e)
    params.slack = SLACK_LOG2 / params.scale_log2
    params.dim_qk, params.dim_v = query.shape[3], out.shape[3]
    return params


def move_params(params: Params, pointers: Sequence[int]) -> Params:
    """Return a copy of a parameter block for query, keys, values and outputs elsewhere.

    Parameters
    ----------
    params : Params
    pointers : sequence of int
        Addresses of query, key, value, out and lse, of two masks that are not looked at, and of
        sinks; what is left out at the end stays where it is, as further keys and values do.

    Raises
    ------
    AdaAttnError
        If the driver refuses an address: none that is a multiple of 16 bytes.
    """
    moved = aligned(Params)
    ctypes.memmove(ctypes.addressof(moved), ctypes.addressof(params), ctypes.sizeof(Params))
    matrices = (moved.query, moved.key[0], moved.value[0], moved.out, moved.lse)
    for matrix, pointer in zip(matrices, pointers, strict=False):
        matrix.data = pointer
    if len(pointers) > _SINKS_PLACE:
        moved.sinks = pointers[_SINKS_PLACE]
    for place, pointer in zip(
        (moved.query_map, moved.key_map[0], moved.value_map[0]), pointers, strict=False
    ):
        tensor_maps.move(place, pointer)
    return moved


def aligned(kind: type[_Block]) -> _Block:
    """Return zeros where the driver may write tensor maps."""
    alignment = tensor_maps.ALIGNMENT_BYTES
    memory = ctypes.create_string_buffer(ctypes.sizeof(kind) + alignment)
    return kind.from_buffer(memory, -ctypes.addressof(memory) % alignment)


def matrix(described: DeviceMatrix) -> Matrix:
    batch, head, row = described.strides
    return Matrix(described.pointer, row, head, batch)


def encode_map(place: Any, matrix: DeviceMatrix, rows: int, dtype: str) -> None:
    """Write the tensor map whose box is `rows` rows of 64 columns."""
    batch, heads, length, dim = matrix.shape
    any_legal = dim * _ELEMENT_BYTES  # an axis of one entry is never stepped
    row, head, entry = (
        stride * _ELEMENT_BYTES if size > 1 else any_legal
        for size, stride in zip((length, heads, batch), matrix.strides[::-1], strict=True)
    )
    sizes = (dim, max(length, 1), heads, batch)
    tensor_maps.encode(
        place, dtype, matrix.pointer, sizes, (row, head, entry), (_PANEL_COLUMNS, rows)
    )


# --- launches --------------------------------------------------------------------------------
class Sm90Launch:
    """A work list on the kernel, ready for arrays at any address.

    Parameters
    ----------
    tile : Tile
    arrays : sequence of ArrayView
        query, key, value, out, lse (whatever follows is not looked at); `start` says where.
    scale : float
        Factor on the scores, > 0; with a softcap in the tile's rule, the cap.
    work : DeviceWork
        From `upload`, or written by a kernel.
    stream : int
        Where it will be started first.
    further : sequence of (DeviceMatrix, DeviceMatrix)
        Pairs of keys and values that stay where they are, for sources of another ``tensor``.
    softcap_rate : float
        Scale over cap, for tiles with a softcap.

    Raises
    ------
    ArgumentError
        If an item has more sources than the tile has room for.
    UnsupportedError
        If the kernel would have to be loaded while the stream records a graph.
    """

    scratch_bytes: tuple[int, ...] = ()

    def __init__(
        self,
        tile: Tile,
        arrays: Sequence[ArrayView],
        scale: float,
        work: DeviceWork,
        stream: int,
        further: Sequence[tuple[DeviceMatrix, DeviceMatrix]] = (),
        softcap_rate: float = 0.0,
    ) -> None:
        if tile.max_sources != FROM_TABLE and work.max_sources > tile.max_sources:
            raise ArgumentError(
                got=f"items of up to {work.max_sources} sources",
                needed=f"at most {tile.max_sources}, for which the tile has room",
                do="take a tile with a larger max_sources",
            )
        self._tile, self._dtype = tile, arrays[0].dtype
        self._matrices = tuple(DeviceMatrix.of(array) for array in arrays[:5])
        self._further = tuple(further)
        self._scale, self._work, self._softcap_rate = scale, work, softcap_rate
        self._calls: Recent[driver.Call] = Recent(_ADDRESSES_REMEMBERED)
        self._packed: Params | None = None
        self._lock = threading.Lock()
        spec = tile.spec(self._dtype)
        self.name = spec.name
        self.step_keys = tile.tile_n
        self.workspace_bytes = work.size_bytes
        if work.grid:
            self._kernel = kernel_of(spec, tile.threads, stream)
            self._kernel.prepare(arrays[0].device)

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        """Enqueue it; tensor maps are moved once per set of addresses."""
        if not self._work.grid:
            return
        call = self._calls.get((stream, pointers))
        if call is None:
            params = self._params(pointers)
            call = driver.Call(self._kernel, params, self._work.grid, stream)
            self._calls.put((stream, pointers), call)
        call.start(device)  # nothing writes to its parameters any more

    def _params(self, pointers: tuple[int, ...]) -> Params:
        """Parameters for a set of addresses: packed once, for others a copy is moved there."""
        with self._lock:
            if self._packed is not None:
                return move_params(self._packed, pointers)
            query, key, value, out, lse = (
                matrix.at(pointer)
                for matrix, pointer in zip(self._matrices, pointers, strict=False)
            )
            keys, values = zip((key, value), *self._further, strict=True)
            packed = pack_params(
                self._tile, self._dtype, query, keys, values, out, lse, self._scale,
                self._work,
            )  # fmt: skip
            packed.softcap_rate = self._softcap_rate
            if self._tile.rule & SINKS:
                packed.sinks = pointers[_SINKS_PLACE]
            self._packed = packed
            return packed


def launch(task: Task, stream: int, tile: Tile | None = None) -> Sm90Launch:
    """Choose the tile, deal the work, copy it to the device.

    Parameters
    ----------
    task : Task
        One that `refusal` has nothing against.
    stream : int
        Where it will be started first.
    tile : Tile, optional
        Overrules the choice, for measurements.

    Raises
    ------
    UnsupportedError
        If it is made while the stream records a graph: the work list must be copied first.
    """
    device = task.query.device
    geometry = task.geometry
    blocks = driver.device_facts(device).multiprocessors
    tile = choose(geometry, blocks, task.rule) if tile is None else tile
    work = upload(work_list(geometry, tile.tile_m, tile.tile_n, blocks), device, stream)
    arrays = (task.query, task.key, task.value, task.out, task.lse)
    return Sm90Launch(tile, arrays, task.factor, work, stream, softcap_rate=task.softcap_rate)
