"""Host side of the row_facts kernel: which records it writes, and reading them back."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.problem import AttentionProblem, SequenceSpan
from adaattn_cuda import driver
from adaattn_cuda.arrays import ITEM_BYTES, ArrayView
from adaattn_cuda.launch import kernel_of
from adaattn_cuda.library import Library
from adaattn_cuda.spec import KernelSpec

__all__ = ["ARRAYS", "SLOTS", "RowFacts", "shipped"]

ARRAYS = ("query", "key", "value", "out")
SLOTS = ("norm", "bf16", "f16", "tf32", "distance")
"""Columns of a record, all squared: the kernel's kSlots."""
THREADS = 256
ROWS_PER_BLOCK, MAX_BLOCKS = 128, 64
"""Rows that one block should have at least, and most blocks of one head of one array."""


class _Rows(ctypes.Structure):
    """The twin of ``Rows`` in row_facts.cuh."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "row")),
        *((name, ctypes.c_int32) for name in ("heads", "len", "dim", "first_unit")),
    )


class _Params(ctypes.Structure):
    """The twin of ``Params`` in row_facts.cuh."""

    _fields_ = (
        ("arrays", _Rows * len(ARRAYS)),
        ("records", ctypes.c_void_p),
        ("blocks", ctypes.c_int32),
        ("vectorised", ctypes.c_int32),
    )


def _spec(input_format: str, arch: str) -> KernelSpec:
    return KernelSpec("row_facts", (f"adaattn::sm80::Format::{input_format}",), 0, arch)


def shipped(arch: str) -> list[KernelSpec]:
    """Every specialisation, for `adaattn warmup` and the budgets."""
    return [_spec(name, arch) for name in ("bf16", "f16", "f32")]


class RowFacts:
    """Figures of one run, on their way on the device; reading them waits for the device.

    The kernel is enqueued here, behind the run on the same stream: it sees the arrays as the
    run saw them, whatever the caller writes into them afterwards. In a CUDA graph it is
    captured with the run, and the figures read are those of the last replay.

    Parameters
    ----------
    problem : AttentionProblem
    arrays : tuple of ArrayView
        query, key, value, out.
    library : Library
        Where the records are allocated.
    stream : int
    """

    def __init__(
        self,
        problem: AttentionProblem,
        arrays: tuple[ArrayView, ...],
        library: Library,
        stream: int,
    ) -> None:
        self._device = arrays[0].device
        query, key = arrays[:2]
        spans = problem.sequences
        whole = all(
            s.index == s.batch and (s.len_q, s.len_kv) == (query.shape[2], key.shape[2])
            for s in spans
        )
        parts: list[SequenceSpan | None] = [None] if whole else list(spans)
        blocks = -(-max(query.shape[2], key.shape[2]) // ROWS_PER_BLOCK)
        blocks = min(max(blocks, 1), MAX_BLOCKS)
        heads = [array.shape[1] for array in arrays]
        batch = query.shape[0] if whole else 1
        self._shape = (len(parts), batch * sum(heads), blocks, len(SLOTS))
        self._batch, self._heads = batch, heads
        # Doubles, asked for as pairs of floats: allocators align far beyond eight bytes.
        size = 2 * int(np.prod(self._shape))
        self.workspace_bytes = 4 * size
        self._records = library.empty((size,), "f32", problem.query)
        address = library.pointer(self._records)
        arch = driver.device_facts(self._device).arch
        kernel = kernel_of(_spec(query.dtype, arch), THREADS, stream)
        units, vectorised = self._shape[1], int(all(map(_is_vectorised, arrays)))
        for part in parts:
            params = _Params(records=address, blocks=blocks, vectorised=vectorised)
            first = 0
            for i, array in enumerate(arrays):
                params.arrays[i] = _rows(array, part, is_query=i in (0, 3), first_unit=first)
                first += batch * heads[i]
            if units:
                kernel.launch(self._device, units * blocks, stream, params)
            address += 8 * units * blocks * len(SLOTS)

    def read(self) -> list[NDArray[np.float64]]:
        """Return the records of query, key, value and out, shapes (sequences, heads, slots).

        Maxima over a head's rows; for out, sums.

        Raises
        ------
        AdaAttnError
            If a stream is recording a CUDA graph: read after its replay instead.
        """
        count = int(np.prod(self._shape))
        raw = driver.read(self._address(), 8 * count, self._device) if count else b""
        records = np.frombuffer(raw, np.float64).reshape(self._shape)
        return split_records(records, self._batch, self._heads)

    def _address(self) -> int:
        from adaattn_cuda.library import library_of  # noqa: PLC0415 -- only when read

        return library_of(self._records).pointer(self._records)


def _is_vectorised(array: ArrayView) -> bool:
    """Whether every row begins on 16 bytes and holds whole chunks of 16 bytes."""
    chunk = 16 // array.item_bytes
    steps = zip(array.shape[:3], array.strides[:3], strict=True)
    whole = not any(step % chunk for n, step in steps if n > 1)
    return whole and array.pointer % 16 == 0 and array.shape[3] % chunk == 0


def split_records(
    records: NDArray[np.float64], batch: int, heads: list[int]
) -> list[NDArray[np.float64]]:
    """Reduce records (parts, units, blocks, slots) over blocks, array by array."""
    out, first = [], 0
    for i, count in enumerate(heads):
        units = records[:, first : first + batch * count]
        first += batch * count
        reduced = units.sum(axis=2) if ARRAYS[i] == "out" else units.max(axis=2)
        out.append(reduced.reshape(-1, count, len(SLOTS)))
    return out


def _rows(array: ArrayView, part: SequenceSpan | None, is_query: bool, first_unit: int) -> Any:
    """Describe an array, or a sequence's stretch of it, as a batch of its own."""
    _, heads, length, dim = array.shape
    batch, head, row, _ = array.strides
    address = array.pointer
    if part is not None:
        start = part.q_start if is_query else part.kv_start
        length = part.len_q if is_query else part.len_kv
        address += (part.batch * batch + start * row) * ITEM_BYTES[array.dtype]
    return _Rows(address, batch, head, row, heads, length, dim, first_unit)
