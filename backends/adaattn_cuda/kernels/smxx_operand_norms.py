"""Host side of ``smxx_operand_norms``: which records it writes, and reading them back."""

from __future__ import annotations

import ctypes
import math
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.problem import AttentionProblem, SequenceSpan
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import kernel_of
from adaattn_cuda.device.library import Library
from adaattn_cuda.device.views import ITEM_BYTES, ArrayView
from adaattn_cuda.jit.spec import KernelSpec

__all__ = ["ARRAYS", "SLOTS", "FactsPlan", "RowFacts", "shipped"]

ARRAYS = ("query", "key", "value", "out")
SLOTS = ("norm", "bf16", "f16", "tf32", "distance")
"""Columns of a record, all squared: the kernel's Slot."""
THREADS = 256
ROWS_PER_BLOCK, MAX_BLOCKS = 128, 64
"""Rows that one block should have at least, and most blocks of one head of one array."""


class _Rows(ctypes.Structure):
    """The twin of ``Rows`` in smxx_operand_norms.cuh."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "row")),
        *((name, ctypes.c_int32) for name in ("heads", "len", "dim", "first_unit")),
    )


class _Params(ctypes.Structure):
    """The twin of ``Params`` in smxx_operand_norms.cuh."""

    _fields_ = (
        ("arrays", _Rows * len(ARRAYS)),
        ("records", ctypes.c_void_p),
        ("blocks", ctypes.c_int32),
        ("vectorised", ctypes.c_int32),
    )


def _spec(input_format: str, arch: str) -> KernelSpec:
    return KernelSpec(
        "smxx_operand_norms", (f"adaattn::Format::{input_format}",), 0, arch, folder="quant"
    )


def shipped(arch: str) -> list[KernelSpec]:
    """Every specialisation, for `adaattn warmup` and the budgets."""
    return [_spec(name, arch) for name in ("bf16", "f16", "f32")]


class FactsPlan:
    """The kernel's launches for one layout of arrays; only their addresses are missing.

    Parameters
    ----------
    problem : AttentionProblem
        Only its sequences are looked at.
    arrays : tuple of ArrayView
        query, key, value, out.
    stream : int
        Where it will be started first: loading a kernel is refused during a graph capture.

    Attributes
    ----------
    shape : tuple of int
        Of the records: (parts, units, blocks, slots), float64.
    """

    def __init__(
        self, problem: AttentionProblem, arrays: tuple[ArrayView, ...], stream: int
    ) -> None:
        query, key = arrays[:2]
        spans = problem.sequences
        whole = all(
            s.index == s.batch and (s.len_q, s.len_kv) == (query.shape[2], key.shape[2])
            for s in spans
        )
        parts: list[SequenceSpan | None] = [None] if whole else list(spans)
        blocks = -(-max(query.shape[2], key.shape[2]) // ROWS_PER_BLOCK)
        blocks = min(max(blocks, 1), MAX_BLOCKS)
        self.heads = [array.shape[1] for array in arrays]
        self.batch = query.shape[0] if whole else 1
        units = self.batch * sum(self.heads)
        self.shape = (len(parts), units, blocks, len(SLOTS))
        self._device = query.device
        kernel = kernel_of(_spec(query.dtype, _arch(self._device)), THREADS, stream)
        kernel.prepare(self._device)
        vectorised = int(all(map(_is_vectorised, arrays)))
        self._parts: list[tuple[driver.Call, _Params, tuple[int, ...], int]] = []
        for number, part in enumerate(parts if units else ()):
            params = _Params(blocks=blocks, vectorised=vectorised)
            first, starts = 0, []
            seeing, seen = _visible(problem, spans[0] if part is None else part)
            for i, array in enumerate(arrays):
                stretch = (seeing, seen, seen, slice(None))[i]
                rows, start = _rows(
                    array, part, stretch, is_query=i in (0, 3), first_unit=first
                )
                params.arrays[i] = rows
                starts.append(start)
                first += self.batch * self.heads[i]
            place = 8 * number * units * blocks * len(SLOTS)
            call = driver.Call(kernel, params, units * blocks)
            self._parts.append((call, params, tuple(starts), place))
        self._lock = threading.Lock()

    def start(self, arrays: tuple[ArrayView, ...], records: int, stream: int) -> None:
        """Enqueue it: what it finds out about `arrays` goes to the address `records`."""
        with self._lock:  # the driver copies the parameters before a start returns
            for call, params, starts, place in self._parts:
                for rows, array, start in zip(params.arrays, arrays, starts, strict=True):
                    rows.data = array.pointer + start
                params.records = records + place
                call.to(stream).start(self._device)


class RowFacts:
    """Figures of one run, on their way on the device; reading them waits for the device.

    The kernel is enqueued here, behind the run on the same stream: it sees the arrays as the
    run saw them, whatever the caller writes into them afterwards. In a CUDA graph it is
    captured with the run, and the figures read are those of the last replay.

    Parameters
    ----------
    plan : FactsPlan
    arrays : tuple of ArrayView
        query, key, value, out.
    like : array
        One of the caller's, beside which the records are allocated.
    library : Library
    stream : int
    """

    def __init__(
        self,
        plan: FactsPlan,
        arrays: tuple[ArrayView, ...],
        like: Any,
        library: Library,
        stream: int,
    ) -> None:
        self._plan, self._library, self._device = plan, library, arrays[0].device
        # Doubles, asked for as pairs of floats: allocators align far beyond eight bytes.
        size = 2 * math.prod(plan.shape)
        self.workspace_bytes = 4 * size
        self._records = library.empty((size,), "f32", like)
        plan.start(arrays, library.pointer(self._records), stream)

    def read(self) -> list[NDArray[np.float64]]:
        """Return the records of query, key, value and out, shapes (sequences, heads, slots).

        Maxima over a head's rows; for out, sums.

        Raises
        ------
        AdaAttnError
            If a stream is recording a CUDA graph: read after its replay instead.
        """
        plan, address = self._plan, self._library.pointer(self._records)
        size = self.workspace_bytes
        raw = driver.read(address, size, self._device) if size else b""
        records = np.frombuffer(raw, np.float64).reshape(plan.shape)
        return split_records(records, plan.batch, plan.heads)


def _arch(device: int) -> str:
    return driver.device_facts(device).arch


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


def _visible(problem: AttentionProblem, span: SequenceSpan) -> tuple[slice, slice]:
    """Rows of a sequence from the first to the last that see a key, and the keys they see.

    By the intervals of the mask alone: what a boolean or additive mask hides besides counts.
    """
    start, stop = problem.mask.intervals(span.len_q, span.len_kv)
    live = np.flatnonzero(stop > start)
    if not len(live):
        return slice(0, 0), slice(0, 0)
    rows = slice(int(live[0]), int(live[-1]) + 1)
    return rows, slice(int(start[live].min()), int(stop[live].max()))


def _rows(
    array: ArrayView,
    part: SequenceSpan | None,
    stretch: slice,
    is_query: bool,
    first_unit: int,
) -> tuple[_Rows, int]:
    """Describe a stretch of an array, or of a sequence's rows of it, as a batch of its own.

    Returns
    -------
    rows : _Rows
        Without the address.
    start : int
        Bytes from the array's first element to the stretch's.
    """
    _, heads, length, dim = array.shape
    batch, head, row, _ = array.strides
    start = begin = 0
    if part is not None:
        begin = part.q_start if is_query else part.kv_start
        length = part.len_q if is_query else part.len_kv
        start = part.batch * batch
    low, high, _ = stretch.indices(length)
    start = (start + (begin + low) * row) * ITEM_BYTES[array.dtype]
    length = high - low
    return _Rows(0, batch, head, row, heads, length, dim, first_unit), start
