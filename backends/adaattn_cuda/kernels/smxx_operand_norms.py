"""Host side of ``smxx_operand_norms``: which records it writes, and reading them back."""

from __future__ import annotations

import ctypes
import math
import threading
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaattn_core.problem import AttentionProblem, SequenceSpan
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import kernel_of
from adaattn_cuda.device.library import Library
from adaattn_cuda.device.views import ITEM_BYTES, ArrayView
from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.kernels.smxx_mask_seen import MaskSeen

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
        *((name, ctypes.c_void_p) for name in ("data", "counted")),
        *((name, ctypes.c_int64) for name in ("batch", "head", "row", "counted_unit")),
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
    masks : tuple of ArrayView or None
        The boolean and the additive mask, broadcast to (batch, heads_q, len_q, len_kv).
    stream : int
        Where it will be started first: loading a kernel is refused during a graph capture.

    Attributes
    ----------
    shape : tuple of int
        Of the records: (parts, units, blocks, slots), float64.
    seen_bytes : int
        Scratch memory for what the masks leave visible.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        arrays: tuple[ArrayView, ...],
        masks: tuple[ArrayView | None, ArrayView | None],
        stream: int,
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
        self._seen: MaskSeen | None = None
        self.seen_bytes = 0
        if masks != (None, None):
            self._seen = MaskSeen(problem, parts, *masks, self._device, stream)
            self.seen_bytes = self._seen.keys_bytes + self._seen.rows_bytes
        self._parts: list[_Part] = []
        for number, part in enumerate(parts if units else ()):
            params = _Params(blocks=blocks, vectorised=vectorised)
            first, starts, counts = 0, [], []
            seeing, seen = _visible(problem, spans[0] if part is None else part)
            for i, array in enumerate(arrays):
                stretch = (seeing, seen, seen, slice(None))[i]
                rows, start, row_first = _rows(
                    array, part, stretch, is_query=i in (0, 3), first_unit=first
                )
                rows.counted_unit = array.shape[2]
                params.arrays[i] = rows
                starts.append(start)
                batch_first = 0 if part is None else part.batch
                counts.append(batch_first * self.heads[i] * array.shape[2] + row_first)
                first += self.batch * self.heads[i]
            place = 8 * number * units * blocks * len(SLOTS)
            call = driver.Call(kernel, params, units * blocks)
            self._parts.append(_Part(call, params, tuple(starts), tuple(counts), place))
        self._lock = threading.Lock()

    def start(
        self,
        arrays: tuple[ArrayView, ...],
        masks: tuple[int, int],
        records: int,
        seen: int,
        stream: int,
    ) -> None:
        """Enqueue it.

        Parameters
        ----------
        arrays : tuple of ArrayView
            query, key, value, out.
        masks : tuple of int
            Addresses of the boolean and the additive mask; 0: none.
        records : int
            Address of what it finds out.
        seen : int
            Address of `seen_bytes` of scratch memory, needed until it has run.
        stream : int
        """
        with self._lock:  # the driver copies the parameters before a start returns
            bytes_of: tuple[int | None, ...] = (None,) * 4
            if self._seen is not None:
                keys, rows_see = seen, seen + self._seen.keys_bytes
                self._seen.start(masks, keys, rows_see, stream)
                bytes_of = (rows_see, keys, keys, None)  # of out, hidden rows are 0
            for part in self._parts:
                for i, array in enumerate(arrays):
                    rows, counted = part.params.arrays[i], bytes_of[i]
                    rows.data = array.pointer + part.starts[i]
                    rows.counted = None if counted is None else counted + part.counts[i]
                part.params.records = records + part.place
                part.call.to(stream).start(self._device)


class _Part(NamedTuple):
    """A launch: one stretch of sequences."""

    call: driver.Call
    params: _Params
    starts: tuple[int, ...]
    """Bytes from each array's first element to the stretch's."""
    counts: tuple[int, ...]
    """Bytes from the first flag of each array's rows to the stretch's."""
    place: int
    """Bytes to its records."""


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
    masks : tuple of int
        Addresses of the boolean and the additive mask; 0: none.
    like : array
        One of the caller's, beside which the records are allocated.
    library : Library
    stream : int
    """

    def __init__(
        self,
        plan: FactsPlan,
        arrays: tuple[ArrayView, ...],
        masks: tuple[int, int],
        like: Any,
        library: Library,
        stream: int,
    ) -> None:
        self._plan, self._library, self._device = plan, library, arrays[0].device
        # Doubles, asked for as pairs of floats: allocators align far beyond eight bytes.
        size = 2 * math.prod(plan.shape)
        self._record_bytes = 4 * size
        # The flags go back to the library, which reuses memory in the order of the stream.
        flags = -(-plan.seen_bytes // 4)
        seen = library.empty((flags,), "f32", like) if flags else None
        self.workspace_bytes = self._record_bytes + 4 * flags
        self._records = library.empty((size,), "f32", like)
        place = 0 if seen is None else library.pointer(seen)
        plan.start(arrays, masks, library.pointer(self._records), place, stream)

    def read(self) -> list[NDArray[np.float64]]:
        """Return the records of query, key, value and out, shapes (sequences, heads, slots).

        Maxima over a head's rows; for out, sums.

        Raises
        ------
        AdaAttnError
            If a stream is recording a CUDA graph: read after its replay instead.
        """
        plan, address = self._plan, self._library.pointer(self._records)
        size = self._record_bytes
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

    By the intervals of the mask alone; `MaskSeen` finds what array masks hide besides.
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
) -> tuple[_Rows, int, int]:
    """Describe a stretch of an array, or of a sequence's rows of it, as a batch of its own.

    Returns
    -------
    rows : _Rows
        Without the address.
    start : int
        Bytes from the array's first element to the stretch's.
    row_first : int
        Row of the array at which the stretch begins.
    """
    _, heads, length, dim = array.shape
    batch, head, row, _ = array.strides
    start = begin = 0
    if part is not None:
        begin = part.q_start if is_query else part.kv_start
        length = part.len_q if is_query else part.len_kv
        start = part.batch * batch
    low, high, _ = stretch.indices(length)
    row_first = begin + low
    start = (start + row_first * row) * ITEM_BYTES[array.dtype]
    described = _Rows(
        batch=batch, head=head, row=row, heads=heads, len=high - low, dim=dim,
        first_unit=first_unit,
    )  # fmt: skip
    return described, start, row_first
