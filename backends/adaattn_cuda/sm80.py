"""Host side of the sm80 family: parameters, work list and grid of one launch.

Nothing here touches a device: a launch is described completely and can be looked at in a test.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

from adaattn_core.errors import UnsupportedError
from adaattn_core.problem import SequenceSpan

from adaattn_cuda.arrays import ArrayView
from adaattn_cuda.spec import KernelSpec
from adaattn_cuda.tuning import sm80 as tuning

__all__ = ["DenseTask", "Params", "WorkItem", "kernel_spec", "pack", "set_pointers", "work_items"]

UNLIMITED = 1 << 30
"""Window extent that no length reaches: kUnlimited in sm80_params.cuh."""

LEN_LIMIT = 1 << 29
BIAS_TYPES = {"f32": 1, "f16": 2, "bf16": 3}
INPUT_FORMATS = ("f32", "f16", "bf16")
OPERAND_FORMATS = ("f32", "tf32", "f16", "bf16")


class WorkItem(ctypes.Structure):
    """The twin of ``WorkItem`` in sm80_params.cuh."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in (
            "batch", "head", "tile", "q_start", "len_q", "kv_start", "len_kv", "reserved",
        )
    )  # fmt: skip


_POINTERS = ("query", "key", "value", "out", "lse", "allowed", "bias", "items")
_STRIDES = (
    *(f"{array}_{axis}" for array in ("query", "key", "value", "out") for axis in ("batch", "head", "row")),
    "lse_batch",
    "lse_head",
    *(f"{array}_{axis}" for array in ("allowed", "bias") for axis in ("batch", "head", "row", "key")),
)  # fmt: skip
_SIZES = (
    "batch", "heads_q", "group_size", "len_q", "len_kv", "dim_qk", "dim_v",
    "left", "right", "bottom_right", "bias_type",
)  # fmt: skip


class Params(ctypes.Structure):
    """The twin of ``Params`` in sm80_params.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *((name, ctypes.c_int32) for name in _SIZES),
        ("scale_log2", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class DenseTask:
    """Dense attention of some heads, all in the same formats.

    Attributes
    ----------
    query, key, value, out : ArrayView
        (batch, heads, len, dim); last stride 1.
    lse : ArrayView
        f32, (batch, heads_q, len_q), last stride 1.
    allowed, bias : ArrayView or None
        Masks of four dimensions with stride 0 where they are broadcast.
    sequences : tuple of SequenceSpan
    left, right : int or None
    bottom_right : bool
    scale : float
    qk, pv : str
        Operand formats.
    heads : tuple of (sequence, head) or None
        Which to compute; None is all.
    """

    query: ArrayView
    key: ArrayView
    value: ArrayView
    out: ArrayView
    lse: ArrayView
    allowed: ArrayView | None
    bias: ArrayView | None
    sequences: tuple[SequenceSpan, ...]
    left: int | None
    right: int | None
    bottom_right: bool
    scale: float
    qk: str
    pv: str
    heads: tuple[tuple[int, int], ...] | None = None

    @property
    def is_uniform(self) -> bool:
        """Whether every sequence fills its batch entry, so that no work list is needed."""
        len_q, len_kv = self.query.shape[2], self.key.shape[2]
        return self.heads is None and all(
            s.index == s.batch and s.len_q == len_q and s.len_kv == len_kv for s in self.sequences
        )


def is_vectorised(task: DenseTask) -> bool:
    """Whether every row begins on 16 bytes and holds whole 16-byte chunks (8 bytes for out)."""
    for array in (task.query, task.key, task.value, task.out):
        chunk = 16 // array.item_bytes
        steps = (step for n, step in zip(array.shape[:3], array.strides[:3], strict=True) if n > 1)
        if array.pointer % 16 or array.shape[3] % chunk or any(s % chunk for s in steps):
            return False
    return True


def kernel_spec(task: DenseTask, arch: str) -> KernelSpec:
    """Which specialisation computes the task.

    Raises
    ------
    UnsupportedError
        If a head dimension exceeds 256, a length 2^29, or a format is not one of the family's.
    """
    dim_qk, dim_v = task.query.shape[3], task.value.shape[3]
    if max(dim_qk, dim_v) > tuning.DIM_LIMIT:
        raise UnsupportedError(
            got=f"dim_qk={dim_qk}, dim_v={dim_v}",
            needed=f"head dimensions of at most {tuning.DIM_LIMIT} on the GPU",
            do='use backend="numpy" for this problem',
        )
    if max(task.query.shape[2], task.key.shape[2]) > LEN_LIMIT:
        raise UnsupportedError(
            got=f"len_q={task.query.shape[2]}, len_kv={task.key.shape[2]}",
            needed=f"lengths of at most {LEN_LIMIT}",
            do="split the queries, or the keys and merge by lse",
        )
    if {task.qk, task.pv} - set(OPERAND_FORMATS):
        raise UnsupportedError(
            got=f"operand formats qk={task.qk}, pv={task.pv}",
            needed=f"formats out of {', '.join(OPERAND_FORMATS)} on this GPU path",
            do="plan with these formats (Capabilities lists them)",
        )
    return tuning.specialise(
        arch,
        task.query.dtype,
        task.qk,
        task.pv,
        dim_qk,
        dim_v,
        array_mask=task.allowed is not None or task.bias is not None,
        vectorised=is_vectorised(task),
    ).spec(arch)


def work_items(task: DenseTask, tile_m: int) -> list[tuple[int, ...]]:
    """Work list, longest item first; items without visible keys are kept (they write zeros).

    Returns
    -------
    list of tuple
        Fields of `WorkItem` in order.
    """
    heads_q = task.query.shape[1]
    if task.heads is None:
        chosen = [(s.index, head) for s in task.sequences for head in range(heads_q)]
    else:
        chosen = list(task.heads)
    items = []
    for index, head in chosen:
        s = task.sequences[index]
        for tile in range(-(-s.len_q // tile_m)):
            item = (s.batch, head, tile, s.q_start, s.len_q, s.kv_start, s.len_kv, 0)
            items.append((_visited_keys(task, s, tile, tile_m), item))
    items.sort(key=lambda pair: -pair[0])
    return [item for _, item in items]


def _visited_keys(task: DenseTask, s: SequenceSpan, tile: int, tile_m: int) -> int:
    """Keys between the first and the last that any row of the tile sees."""
    shift = s.len_kv - s.len_q if task.bottom_right else 0
    first, last = tile * tile_m + shift, min((tile + 1) * tile_m, s.len_q) - 1 + shift
    start = 0 if task.left is None else min(max(first - task.left, 0), s.len_kv)
    stop = s.len_kv if task.right is None else min(max(last + task.right + 1, 0), s.len_kv)
    return max(stop - start, 0)


def grid_blocks(task: DenseTask, tile_m: int) -> int:
    """Blocks of a uniform task."""
    batch, heads_q, len_q, _ = task.query.shape
    return batch * heads_q * -(-len_q // tile_m)


def pack(task: DenseTask) -> Params:
    """Kernel parameters of the task, all but the addresses (see `set_pointers`)."""
    params = Params()
    for name in ("query", "key", "value", "out"):
        array: ArrayView = getattr(task, name)
        for axis, stride in zip(("batch", "head", "row"), array.strides, strict=False):
            setattr(params, f"{name}_{axis}", stride)
    params.lse_batch, params.lse_head = task.lse.strides[:2]
    for name in ("allowed", "bias"):
        mask: ArrayView | None = getattr(task, name)
        if mask is not None:
            for axis, stride in zip(("batch", "head", "row", "key"), mask.strides, strict=True):
                setattr(params, f"{name}_{axis}", stride)
    params.batch, params.heads_q, params.len_q, params.dim_qk = task.query.shape
    params.len_kv, params.dim_v = task.value.shape[2:]
    params.group_size = task.query.shape[1] // task.key.shape[1]
    params.left = UNLIMITED if task.left is None else min(task.left, UNLIMITED)
    params.right = UNLIMITED if task.right is None else min(task.right, UNLIMITED)
    params.bottom_right = int(task.bottom_right)
    params.bias_type = 0 if task.bias is None else BIAS_TYPES[task.bias.dtype]
    params.scale_log2 = task.scale * math.log2(math.e)
    return params


def set_pointers(params: Params, pointers: Sequence[int], items: int = 0) -> None:
    """Fill in the addresses: query, key, value, out, lse, allowed, bias (0 = none), items."""
    (
        params.query,
        params.key,
        params.value,
        params.out,
        params.lse,
        params.allowed,
        params.bias,
    ) = pointers
    params.items = items
