"""Host side of ``smxx_attn_decode``: its parameters and its launches."""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import NamedTuple

from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import kernel_of, refuse_capture
from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.tuning.sm80_attn_fwd import ARCHITECTURES
from adaattn_cuda.tuning.smxx_attn_decode import (
    CHUNK_KEYS,
    COLUMNS,
    STATS,
    Specialisation,
    has_copy_engine,
    specialise,
    splits_for,
)

__all__ = ["Decode", "PageAddresses", "Params", "Rows", "shipped"]

LOG2_E = 1.4426950408889634
_ADDRESSES = struct.Struct("19Q")
"""What a start changes: the first fields of `Params`, up to the strides."""


class NarrowPool(ctypes.Structure):
    """The twin of ``NarrowPool`` in decode_params.cuh."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("data", "unit", "centre", "reach"))


class Params(ctypes.Structure):
    """The twin of ``Params`` in decode_params.cuh."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("query", "out", "lse", "dropped", "key", "value")
        ),
        ("key_narrow", NarrowPool),
        ("value_narrow", NarrowPool),
        *(
            (name, ctypes.c_void_p)
            for name in ("table", "lengths", "starts", "partials", "arrivals")
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "query_batch", "query_head", "query_row", "out_batch", "out_head", "out_row",
                "table_batch", "table_head",
            )
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                "heads_kv", "group", "len_q", "page_chunks", "splits", "row_tiles", "units",
                "causal", "left",
            )
        ),
        ("scale_log2", ctypes.c_float),
        ("skip_share", ctypes.c_float),
    )  # fmt: skip


class PageAddresses(NamedTuple):
    """Where a cache lies on the device; it does not keep it alive.

    Attributes
    ----------
    key, value : int
        Wide pages, (pages, page_len, dim).
    key_narrow, value_narrow : tuple of int
        Codes, unit, centre, reach; zeros where there are none.
    table : int
        int32, (batch, heads_kv, pages), strides `table_strides` of the first two axes.
    lengths, starts : int
        int32, (batch,).
    """

    key: int
    value: int
    key_narrow: tuple[int, int, int, int]
    value_narrow: tuple[int, int, int, int]
    table: int
    table_strides: tuple[int, int]
    lengths: int
    starts: int


class Rows(NamedTuple):
    """What decides a launch besides addresses: sizes, formats, what is asked for.

    Attributes
    ----------
    dtype : str
        ``bf16`` or ``f16``.
    key_code, value_code : str
        Of narrow pages.
    batch, heads_q, heads_kv, len_q, dim, page_len : int
    keys_max : int
        No less than the keys of the longest sequence; decides how many blocks share them.
    causal : bool
        Whether rows are those of the newest keys, and see no later one.
    left : int
        Keys before its own that a row sees; -1: all.
    scale : float
    lam : float
        Mean weight of 64 keys below which their values need not be read; 0: all are read.
    query_strides, out_strides : tuple of int
        Batch, head, row; in elements.
    device : int
    """

    dtype: str
    key_code: str
    value_code: str
    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    dim: int
    page_len: int
    keys_max: int
    causal: bool
    left: int
    scale: float
    lam: float
    query_strides: tuple[int, ...]
    out_strides: tuple[int, ...]
    device: int


class Decode:
    """The kernel made ready for rows of one kind.

    Attributes
    ----------
    workspace_bytes : int
        Device memory of partial results.
    """

    def __init__(self, rows: Rows, stream: int, special: Specialisation | None = None) -> None:
        group = rows.heads_q // rows.heads_kv
        facts = driver.device_facts(rows.device)
        packed = group * rows.len_q
        if special is None:
            special = specialise(
                rows.dtype, rows.key_code, rows.value_code, rows.dim, packed, rows.lam > 0,
                facts.smem_bytes, has_copy_engine(facts.arch),
            )  # fmt: skip
        columns = special.tiles * COLUMNS
        row_tiles = -(-packed // columns)
        units = rows.batch * rows.heads_kv * row_tiles
        chunks = -(-rows.keys_max // CHUNK_KEYS)
        splits = splits_for(units, chunks, facts.multiprocessors * special.resident)
        self.special, self.splits, self._device = special, splits, rows.device
        self.name = special.spec(facts.arch).name
        parts = units * splits * columns * (rows.dim + STATS) if splits > 1 else 0
        self.workspace_bytes = 4 * parts
        kernel = kernel_of(special.spec(facts.arch), special.threads, stream)
        kernel.prepare(rows.device)
        self._params = Params(
            heads_kv=rows.heads_kv, group=group, len_q=rows.len_q,
            page_chunks=rows.page_len // CHUNK_KEYS, splits=splits, row_tiles=row_tiles,
            units=units, causal=rows.causal, left=rows.left, scale_log2=rows.scale * LOG2_E,
            skip_share=CHUNK_KEYS * rows.lam,
        )  # fmt: skip
        p = self._params
        p.query_batch, p.query_head, p.query_row = rows.query_strides[:3]
        p.out_batch, p.out_head, p.out_row = rows.out_strides[:3]
        self._call = driver.Call(kernel, p, units * splits, early=special.bulk)
        self._units = units
        self._scratch: dict[int, tuple[int, int]] = {}  # by stream: partial results, counters
        self._keep: list[driver.DeviceTable] = []
        self._lock = threading.Lock()

    step_keys = CHUNK_KEYS

    def start(
        self, query: int, out: int, lse: int, dropped: int, pages: PageAddresses, stream: int
    ) -> None:
        """Enqueue it; `dropped` may be 0.

        Starts on one stream follow each other and share what they need besides; so do the
        graphs that were recorded on it, wherever they are replayed.
        """
        p = self._params
        with self._lock:  # the driver copies the parameters before a start returns
            _ADDRESSES.pack_into(
                p, 0, query, out, lse, dropped, pages.key, pages.value, *pages.key_narrow,
                *pages.value_narrow, pages.table, pages.lengths, pages.starts,
                *(self._scratch.get(stream) or self._make_scratch(stream)),
            )  # fmt: skip
            p.table_batch, p.table_head = pages.table_strides
            self._call.to(stream).start(self._device)

    def _make_scratch(self, stream: int) -> tuple[int, int]:
        """Room of one stream for partial results, and counters: every start leaves 0."""
        if self.splits == 1:
            found = (0, 0)
        else:
            refuse_capture(stream, "makes its counters")
            partials = _partials_of(self._device, stream, self.workspace_bytes)
            arrivals = driver.DeviceTable(bytes(4 * self._units), self._device)
            self._keep += [partials, arrivals]
            found = (partials.address, arrivals.address)
        self._scratch[stream] = found
        return found


_partials: dict[tuple[int, int], driver.DeviceTable] = {}
_partials_lock = threading.Lock()


def _partials_of(device: int, stream: int, size_bytes: int) -> driver.DeviceTable:
    """Room that all starts on a stream share; it grows, and launches keep the old one."""
    with _partials_lock:
        found = _partials.get((device, stream))
        if found is None or found.size_bytes < size_bytes:
            room = max(size_bytes, 2 * found.size_bytes if found else 0)
            found = _partials[device, stream] = driver.DeviceTable(bytes(room), device)
        return found


def shipped(arch: str) -> list[KernelSpec]:
    """Specialisations that `adaattn warmup` and `adaattn kernels` build for an architecture."""
    smem = 1024 * ARCHITECTURES[arch][0]
    return [
        specialise("bf16", "i8", "i8", dim, 4, skip, smem, has_copy_engine(arch)).spec(arch)
        for dim in (64, 128)
        for skip in (False, True)
    ]
