"""Host side of ``sm90_attn_fwd_f16``: what it takes, its launch plan, its parameters.

A launch needs three steps. `plan_launch` depends on shapes only and is meant to be cached by
its arguments; its work list is copied to the device once. `pack_params` depends on pointers and
strides; its result can be cached by them. The launch itself passes that block by value.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from adaattn_core.errors import AdaAttnError
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.device import driver
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import STEM, Tile, choose
from adaattn_cuda.work.geometry import UNLIMITED, Geometry
from adaattn_cuda.work.records import TENSORS, WorkList, work_list

__all__ = [
    "STEM",
    "DeviceMatrix",
    "LaunchPlan",
    "Params",
    "layout_reason",
    "move_params",
    "pack_params",
    "plan_launch",
    "supports",
]

MAX_DIM = 256
SLACK_LOG2 = 8.0
"""How far the running maximum may grow before rescaling; kSlackLog2 in softmax/slack.cuh."""

_Block = TypeVar("_Block", bound=ctypes.Structure)
_ALIGNMENT_BYTES = 16
_ELEMENT_BYTES = 2
_PANEL_COLUMNS = 64
_MAP_BYTES = 128
_MAP_ALIGNMENT_BYTES = 64
_MAX_STRIDE_BYTES = 1 << 40

# CUtensorMap* enumerators of cuda.h.
_DATA_TYPES = {"f16": 6, "bf16": 9}
_INTERLEAVE_NONE = 0
_SWIZZLE_128B = 3
_L2_PROMOTION_256B = 3
_OOB_FILL_ZEROS = 0


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


@dataclass(frozen=True, slots=True, eq=False)
class LaunchPlan:
    """What a launch of one geometry needs besides pointers.

    Attributes
    ----------
    tile : Tile
        The specialisation; `Tile.spec` makes its KernelSpec.
    dtype : str
        ``bf16`` or ``f16``.
    work : WorkList
        To be copied to the device.
    """

    tile: Tile
    dtype: str
    work: WorkList


class Matrix(ctypes.Structure):
    """The twin of ``Matrix`` in sm90_params.cuh; strides in elements."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("stride_row", ctypes.c_int64),
        ("stride_head", ctypes.c_int64),
        ("stride_batch", ctypes.c_int64),
    )


class Params(ctypes.Structure):
    """The twin of ``AttentionParams`` in sm90_params.cuh: 1,280 bytes, passed by value."""

    _fields_ = (
        ("query_map", ctypes.c_ubyte * _MAP_BYTES),
        ("key_map", ctypes.c_ubyte * _MAP_BYTES * len(TENSORS)),
        ("value_map", ctypes.c_ubyte * _MAP_BYTES * len(TENSORS)),
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
    )


def supports(problem: AttentionProblem) -> str | None:
    """Why this kernel does not take a problem, or None if it does.

    The answer depends on dtype, head dims, lengths and the kind of mask; strides and alignment
    are checked by `layout_reason` once device pointers are known.
    """
    if problem.dtype not in _DATA_TYPES:
        return f"dtype {problem.dtype}: only bf16 and f16 run on the 16-bit matrix unit"
    for name, dim in (("dim_qk", problem.dim_qk), ("dim_v", problem.dim_v)):
        if dim % 8 or not 8 <= dim <= MAX_DIM:
            return f"{name} {dim}: needs a multiple of 8 between 8 and {MAX_DIM}"
    if not problem.mask.is_structural:
        return f"{problem.mask.describe()} mask: only one visible interval per row"
    longest = max(problem.len_q, problem.len_kv)
    if longest > UNLIMITED:
        return f"len {longest}: at most {UNLIMITED} rows"
    return None


def layout_reason(name: str, matrix: DeviceMatrix) -> str | None:
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


def plan_launch(
    geometry: Geometry, dtype: str, blocks: int, tile: Tile | None = None
) -> LaunchPlan:
    """Choose the tile and deal the work.

    Parameters
    ----------
    geometry : Geometry
    dtype : {"bf16", "f16"}
    blocks : int
        Multiprocessors of the device.
    tile : Tile, optional
        Overrules the choice, for measurements.
    """
    tile = choose(geometry, blocks) if tile is None else tile
    return LaunchPlan(tile, dtype, work_list(geometry, tile.tile_m, tile.tile_n, blocks))


def pack_params(
    plan: LaunchPlan,
    query: DeviceMatrix,
    keys: Sequence[DeviceMatrix],
    values: Sequence[DeviceMatrix],
    out: DeviceMatrix,
    lse: DeviceMatrix,
    scale: float,
    work_pointer: int,
    bias_pointer: int = 0,
) -> Params:
    """Pack the kernel's parameter block, 1,280 bytes, to be passed by value.

    Parameters
    ----------
    plan : LaunchPlan
    query, out : DeviceMatrix
        Shapes (batch, heads_q, len_q, dim_qk) and (batch, heads_q, len_q, dim_v).
    keys, values : sequence of DeviceMatrix
        Up to three pairs; a source's ``tensor`` is the index here.
    lse : DeviceMatrix
        float32, shape (batch, heads_q, len_q, 1).
    scale : float
        Factor on the scores, > 0.
    work_pointer : int
        Device address of ``plan.work.tobytes()``.
    bias_pointer : int
        Device address of float32 biases, for a tile with ``bias``; added to the scaled scores.

    Raises
    ------
    AdaAttnError
        If the driver refuses a tensor map; `layout_reason` names what it would refuse.
    """
    params = pack_arrays(plan.tile, plan.dtype, query, keys, values, out, lse, scale)
    params.items, params.sources = plan.work.addresses(work_pointer)
    params.bias, params.rounds = bias_pointer, plan.work.rounds
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
        params.key[index], params.value[index] = _matrix(key), _matrix(value)
    params.query, params.out, params.lse = _matrix(query), _matrix(out), _matrix(lse)
    params.inverse_scale = 1.0 / scale
    params.scale_log2 = scale * math.log2(math.e)
    params.slack = SLACK_LOG2 / params.scale_log2
    params.dim_qk, params.dim_v = query.shape[3], out.shape[3]
    return params


def move_params(params: Params, pointers: Sequence[int]) -> Params:
    """Return a copy of a parameter block with a single source, for arrays at other addresses.

    Parameters
    ----------
    params : Params
    pointers : sequence of int
        Addresses of query, key, value, out and lse; whatever follows is not looked at.

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
    replace_address = driver.load_driver().cuTensorMapReplaceAddress
    for place, pointer in zip(
        (moved.query_map, moved.key_map[0], moved.value_map[0]), pointers, strict=False
    ):
        status = replace_address(ctypes.byref(place), ctypes.c_void_p(pointer))
        if status:
            raise AdaAttnError(
                got=f"CUDA error {status} for an array at {pointer:#x}",
                needed="an address that the copy engine takes",
                do="copy the array to memory of its own",
                status=status,
            )
    return moved


def aligned(kind: type[_Block]) -> _Block:
    """Return zeros where the driver may write tensor maps: on a multiple of 64 bytes."""
    memory = ctypes.create_string_buffer(ctypes.sizeof(kind) + _MAP_ALIGNMENT_BYTES)
    return kind.from_buffer(memory, -ctypes.addressof(memory) % _MAP_ALIGNMENT_BYTES)


def _matrix(matrix: DeviceMatrix) -> Matrix:
    batch, head, row = matrix.strides
    return Matrix(matrix.pointer, row, head, batch)


def encode_map(place: Any, matrix: DeviceMatrix, rows: int, dtype: str) -> None:
    """Write the tensor map whose box is `rows` rows of 64 columns, swizzled by 128 bytes.

    Columns and rows outside the array arrive as zeros, which is what pads head dims that are no
    multiple of 64.
    """
    batch, heads, length, dim = matrix.shape
    any_legal = dim * _ELEMENT_BYTES  # an axis of one entry is never stepped
    steps = [
        stride * _ELEMENT_BYTES if size > 1 else any_legal
        for size, stride in zip((length, heads, batch), matrix.strides[::-1], strict=True)
    ]
    status = driver.load_driver().cuTensorMapEncodeTiled(
        ctypes.byref(place),
        _DATA_TYPES[dtype],
        4,
        ctypes.c_void_p(matrix.pointer),
        (ctypes.c_uint64 * 4)(dim, max(length, 1), heads, batch),
        (ctypes.c_uint64 * 3)(*steps),
        (ctypes.c_uint32 * 4)(_PANEL_COLUMNS, rows, 1, 1),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        _INTERLEAVE_NONE,
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        _OOB_FILL_ZEROS,
    )
    if status:
        raise AdaAttnError(
            got=f"CUDA error {status} for shape {matrix.shape}, strides {matrix.strides}",
            needed="a layout that the copy engine can address",
            do="copy the array to contiguous memory",
            status=status,
        )
