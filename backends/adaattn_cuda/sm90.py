"""Host side of ``sm90_attn_fwd_f16``: what it takes, its launch plan, its parameter block with tensor maps.

A launch needs three steps. ``plan_launch`` depends on shapes only and is meant to be cached by its arguments; its records are
copied to the device once. ``pack_params`` depends on pointers and strides; its result can be cached by them. The launch itself
passes that block by value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda.bindings import driver
from numpy.typing import NDArray

from adaattn_core.errors import AdaAttnError
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.sm90_work import Geometry, work_records
from adaattn_cuda.tuning.sm90 import Tile, choose

__all__ = ["STEM", "DeviceMatrix", "LaunchPlan", "pack_params", "plan_launch", "supports"]

STEM = "sm90_attn_fwd_f16"

MAX_DIM = 256
SLACK_LOG2 = 8.0
"""How far the running maximum may grow before accumulators are rescaled; softmax/online.cuh says why."""
MAX_MAPS = 3
_ALIGNMENT_BYTES = 16
_PANEL_COLUMNS = 64
_MAX_STRIDE_BYTES = 1 << 40
_MAX_LEN = 1 << 29
_ELEMENT_BYTES = 2


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
        The specialisation; ``tile.traits(dtype)`` and ``tile.smem_bytes`` make its KernelSpec.
    dtype : str
        ``bf16`` or ``f16``.
    records : ndarray, shape (rounds, grid)
        To be copied to the device; (0, 0) if there is nothing to do.
    """

    tile: Tile
    dtype: str
    records: NDArray[np.void]

    @property
    def grid(self) -> int:
        """Blocks of the launch."""
        return int(self.records.shape[1])

    @property
    def rounds(self) -> int:
        """Records per block, at most."""
        return int(self.records.shape[0])


_MATRIX = np.dtype(
    [("data", "<u8"), ("stride_row", "<i8"), ("stride_head", "<i8"), ("stride_batch", "<i8")]
)

PARAMS = np.dtype(
    {
        "names": [
            "query_map", "key_map", "value_map", "query", "key", "value", "out", "lse",
            "records", "bias", "inverse_scale", "scale_log2", "slack", "rounds", "dim_qk", "dim_v",
        ],
        "formats": [
            (np.void, 128), (np.void, (MAX_MAPS * 128)), (np.void, (MAX_MAPS * 128)),
            _MATRIX, (_MATRIX, (MAX_MAPS,)), (_MATRIX, (MAX_MAPS,)), _MATRIX, _MATRIX,
            "<u8", "<u8", "<f4", "<f4", "<f4", "<i4", "<i4", "<i4",
        ],
        "offsets": [0, 128, 512, 896, 928, 1024, 1120, 1152, 1184, 1192, 1200, 1204, 1208, 1212, 1216, 1220],
        "itemsize": 1280,
    }
)  # fmt: skip
"""Memory layout of ``AttentionParams`` in ``attn/params.cuh``."""


def supports(problem: AttentionProblem) -> str | None:
    """Why this kernel does not take a problem, or None if it does.

    The answer depends on dtype, head dims, lengths and the kind of mask; strides and alignment are checked by
    :func:`layout_reason` once device pointers are known.
    """
    if problem.dtype not in ("bf16", "f16"):
        return f"dtype {problem.dtype}: only bf16 and f16 run on the 16-bit matrix unit"
    for name, dim in (("dim_qk", problem.dim_qk), ("dim_v", problem.dim_v)):
        if dim % 8 or not 8 <= dim <= MAX_DIM:
            return f"{name} {dim}: needs a multiple of 8 between 8 and {MAX_DIM}"
    if not problem.mask.is_structural:
        return f"{problem.mask.describe()} mask: only masks of one visible interval per row"
    if max(problem.len_q, problem.len_kv) > _MAX_LEN:
        return f"len {max(problem.len_q, problem.len_kv)}: at most {_MAX_LEN} rows"
    return None


def layout_reason(name: str, matrix: DeviceMatrix) -> str | None:
    """Why the copy engine cannot read (or the epilogue not write) an array, or None if it can."""
    if matrix.pointer % _ALIGNMENT_BYTES:
        return f"{name} starts at an address that is no multiple of {_ALIGNMENT_BYTES} bytes"
    for axis, size, stride in zip(
        ("batch", "heads", "len"), matrix.shape, matrix.strides, strict=False
    ):
        stride_bytes = stride * _ELEMENT_BYTES
        if size > 1 and (
            stride_bytes % _ALIGNMENT_BYTES or not 0 < stride_bytes < _MAX_STRIDE_BYTES
        ):
            return f"{name} has a stride of {stride_bytes} bytes along {axis}; needs a positive multiple of {_ALIGNMENT_BYTES}"
    return None


def plan_launch(geometry: Geometry, dtype: str, blocks: int, tile: Tile | None = None) -> LaunchPlan:
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
    records = work_records(geometry, tile.tile_m, tile.tile_n, blocks, tile.max_sources)
    return LaunchPlan(tile, dtype, records)


def tensor_map(matrix: DeviceMatrix, rows: int, dtype: str) -> bytes:
    """Tensor map of a (dim, len, heads, batch) array whose box is `rows` rows of 64 columns, swizzled by 128 bytes.

    Columns and rows outside the array arrive as zeros, which is what pads head dims that are no multiple of 64.
    """
    batch, heads, length, dim = matrix.shape
    packed_stride = dim * _ELEMENT_BYTES  # any legal value: an axis of one entry is never stepped
    strides = [
        stride * _ELEMENT_BYTES if size > 1 else packed_stride
        for size, stride in zip((length, heads, batch), reversed(matrix.strides), strict=True)
    ]
    kind = driver.CUtensorMapDataType
    result, encoded = driver.cuTensorMapEncodeTiled(
        kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if dtype == "bf16" else kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        4,
        matrix.pointer,
        [driver.cuuint64_t(n) for n in (dim, max(length, 1), heads, batch)],
        [driver.cuuint64_t(n) for n in strides],
        [driver.cuuint32_t(n) for n in (_PANEL_COLUMNS, rows, 1, 1)],
        [driver.cuuint32_t(1)] * 4,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if result != driver.CUresult.CUDA_SUCCESS:
        raise AdaAttnError(
            got=f"{result.name} from cuTensorMapEncodeTiled for shape {matrix.shape}, strides {matrix.strides}",
            needed="a layout that the copy engine can address",
            do="copy the array to a contiguous one",
            matrix=matrix,
        )
    return np.array([int(word) for word in encoded.opaque], "<u8").tobytes()


def pack_params(
    plan: LaunchPlan,
    query: DeviceMatrix,
    keys: list[DeviceMatrix],
    values: list[DeviceMatrix],
    out: DeviceMatrix,
    lse: DeviceMatrix,
    scale: float,
    records_pointer: int,
    bias_pointer: int = 0,
) -> bytes:
    """The kernel's parameter block, 1,280 bytes, to be passed by value.

    Parameters
    ----------
    plan : LaunchPlan
    query, out : DeviceMatrix
        Shapes (batch, heads_q, len_q, dim_qk) and (batch, heads_q, len_q, dim_v).
    keys, values : list of DeviceMatrix
        Up to three pairs; a source's ``map`` is its index here.
    lse : DeviceMatrix
        float32, shape (batch, heads_q, len_q, 1).
    scale : float
        Factor on the scores, > 0.
    records_pointer : int
        Device address of ``plan.records``.
    bias_pointer : int
        Device address of the float32 biases of a tile with ``bias``; added to the scaled scores.
    """
    tile = plan.tile
    block = np.zeros((), PARAMS)
    block["query_map"] = np.void(tensor_map(query, tile.tile_m, plan.dtype))
    for name, matrices in (("key", keys), ("value", values)):
        maps = b"".join(tensor_map(m, tile.tile_n, plan.dtype) for m in matrices)
        block[f"{name}_map"] = np.void(maps.ljust(MAX_MAPS * 128, b"\0"))
        for index, matrix in enumerate(matrices):
            block[name][index] = _matrix(matrix)
    block["query"] = _matrix(query)
    block["out"] = _matrix(out)
    block["lse"] = _matrix(lse)
    block["records"] = records_pointer
    block["bias"] = bias_pointer
    scale_log2 = scale * math.log2(math.e)
    block["inverse_scale"] = 1.0 / scale
    block["scale_log2"] = scale_log2
    block["slack"] = SLACK_LOG2 / scale_log2
    block["rounds"] = plan.rounds
    block["dim_qk"] = query.shape[3]
    block["dim_v"] = out.shape[3]
    return block.tobytes()


def _matrix(matrix: DeviceMatrix) -> tuple[Any, ...]:
    batch, head, row = matrix.strides
    return matrix.pointer, row, head, batch
