"""Host side of ``smxx_quantize``: where codes and scales lie, and the two launches."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import kernel_of, refuse_capture
from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.kernels.task import Task
from adaattn_cuda.tuning.sm90_attn_fwd_8bit import TILE_KEYS, TILE_SCALES
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import ARCH, padded_dim

__all__ = ["Codes", "Params", "Quantiser", "shipped", "spec"]

CENTRES, CODES = 0, 1
THREADS = 512
TILE = np.dtype(
    [(name, "<i4") for name in ("batch", "first", "begin", "end", "place", "span", "head", "_")]
)
"""``Tile`` of smxx_quantize.cuh: 256 rows of a head."""
SPAN = np.dtype([(name, "<i4") for name in ("batch", "low", "high", "_")])
"""``Span``: a sequence's visible keys."""
_ALIGNMENT_BYTES = 1024


class _Rows(ctypes.Structure):
    """The twin of ``Rows``."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("batch", "head", "row")),
    )


_POINTERS = (
    "spans", "key_tiles", "query_tiles", "query_codes", "key_codes", "value_codes",
    "query_scales", "lse_shift", "tile_scales", "centres",
)  # fmt: skip
_COUNTS = (
    "heads_q", "heads_kv", "len_q", "rows_kv", "key_tile_count", "query_tile_count", "dim_qk",
    "dim_v",
)  # fmt: skip


class Params(ctypes.Structure):
    """The twin of ``Params`` in smxx_quantize.cuh."""

    _fields_ = (
        ("query", _Rows),
        ("key", _Rows),
        ("value", _Rows),
        *((name, ctypes.c_uint64) for name in _POINTERS),
        *((name, ctypes.c_int32) for name in _COUNTS),
        ("scale", ctypes.c_float),
        ("smooth", ctypes.c_int32),
        ("decision", ctypes.c_uint64),
    )


@dataclass(frozen=True, slots=True)
class Codes:
    """Where codes and scales of one problem lie in two pieces of memory.

    Attributes
    ----------
    batch, heads_q, heads_kv, len_q, rows_kv, dim_qk, dim_v, spans : int
        Sizes; dims padded to 64 or 128, `rows_kv` to whole tiles.
    qk, pv : bool
        Whether queries and keys, and whether values, are quantised.
    """

    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    rows_kv: int
    dim_qk: int
    dim_v: int
    spans: int
    qk: bool
    pv: bool

    def _places(self, sizes: dict[str, int]) -> tuple[dict[str, int], int]:
        places, total = {}, 0
        for name, size in sizes.items():
            places[name] = total
            total += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return places, total

    def codes(self) -> tuple[dict[str, int], int]:
        """Offsets in bytes of what only the next kernel reads, and their total."""
        rows_q = self.batch * self.heads_q * self.len_q
        rows_kv = self.batch * self.heads_kv * self.rows_kv
        return self._places(
            {
                "query_codes": rows_q * self.dim_qk if self.qk else 0,
                "key_codes": rows_kv * self.dim_qk if self.qk else 0,
                "value_codes": rows_kv * self.dim_v if self.pv else 0,
                "lse_shift": 4 * rows_q if self.qk else 0,
            }
        )

    def scales(self) -> tuple[dict[str, int], int]:
        """Offsets in bytes of what certificates read as well, and their total."""
        tiles = self.batch * self.heads_kv * (self.rows_kv // TILE_KEYS)
        return self._places(
            {
                "query_scales": 4 * self.batch * self.heads_q * self.len_q if self.qk else 0,
                "tile_scales": 4 * TILE_SCALES * tiles,
                "centres": 4 * self.spans * self.heads_kv * self.dim_qk if self.qk else 0,
            }
        )


def spec(part: int, dtype: str, dim_qk: int, dim_v: int, qk: bool, pv: bool) -> KernelSpec:
    """One of the two launches; dims padded."""
    traits = (part, f"adaattn::Format::{dtype}", dim_qk, dim_v, int(qk), int(pv))
    return KernelSpec("smxx_quantize", traits, 0, ARCH, folder="quant")


def shipped() -> list[KernelSpec]:
    """Specialisations to compile ahead."""
    return [
        spec(part, dtype, dim, dim, True, True)
        for dtype in ("bf16", "f16")
        for dim in (64, 128)
        for part in (CENTRES, CODES)
    ]


class Quantiser:
    """The launches for one layout of arrays; addresses come with each start.

    Parameters
    ----------
    task : Task
        In i8, e4m3 or both.
    stream : int
        Where it will be started first.

    Attributes
    ----------
    layout : Codes
    places : list of int
        Row of each sequence's first key among the codes of its batch entry.

    Raises
    ------
    UnsupportedError
        If `stream` records a CUDA graph.
    """

    def __init__(self, task: Task, stream: int) -> None:
        refuse_capture(stream, "copies lists of tiles to the device")
        device = task.query.device
        batch, heads_q, len_q, dim_qk = task.query.shape
        heads_kv, dim_v = task.key.shape[1], task.value.shape[3]
        self.places, rows_kv = _places(task)
        self.layout = Codes(
            batch, heads_q, heads_kv, len_q, rows_kv, padded_dim(dim_qk), padded_dim(dim_v),
            len(task.sequences), task.qk == "i8", task.pv == "e4m3",
        )  # fmt: skip
        spans, key_tiles, query_tiles = _tables(task, self.places)
        if not self.layout.qk:
            query_tiles = query_tiles[:0]
        data = spans.tobytes() + key_tiles.tobytes() + query_tiles.tobytes()
        self._table = driver.DeviceTable(data, device)
        self._starts = (
            self._table.address,
            self._table.address + spans.nbytes,
            self._table.address + spans.nbytes + key_tiles.nbytes,
        )
        self.size_bytes = self._table.size_bytes
        self._counts = (
            heads_q, heads_kv, len_q, rows_kv, len(key_tiles), len(query_tiles), dim_qk, dim_v
        )  # fmt: skip
        self._strides = [array.strides[:3] for array in (task.query, task.key, task.value)]
        self._scale, self._smooth = task.scale, task.smooth_k
        parts = 2 * self.layout.qk + self.layout.pv
        grids = (
            len(spans) * heads_kv * self.layout.qk,
            parts * len(key_tiles) + 2 * len(query_tiles),
        )
        self._kernels = []
        for part, grid in zip((CENTRES, CODES), grids, strict=True):
            if grid:
                own = spec(
                    part, task.query.dtype, self.layout.dim_qk, self.layout.dim_v,
                    self.layout.qk, self.layout.pv,
                )  # fmt: skip
                kernel = kernel_of(own, THREADS, stream)
                kernel.prepare(device)
                self._kernels.append((kernel, grid))

    def calls(
        self,
        pointers: tuple[int, ...],
        codes: int,
        scales: int,
        stream: int,
        decision: int = 0,
    ) -> list[driver.Call]:
        """Return the launches for query, key and value, codes and scales at these addresses.

        `decision` is that of a number a query head; heads of -1 are quantised.
        """
        params = Params()
        for name, pointer, strides in zip(
            ("query", "key", "value"), pointers, self._strides, strict=False
        ):
            setattr(params, name, _Rows(pointer, *strides))
        for name, address in zip(_POINTERS, self._starts, strict=False):
            setattr(params, name, address)
        for base, (places, _) in ((codes, self.layout.codes()), (scales, self.layout.scales())):
            for name, offset in places.items():
                setattr(params, name, base + offset)
        for name, count in zip(_COUNTS, self._counts, strict=True):
            setattr(params, name, count)
        params.scale, params.smooth = self._scale, int(self._smooth)
        params.decision = decision
        return [driver.Call(kernel, params, grid, stream) for kernel, grid in self._kernels]


def _places(task: Task) -> tuple[list[int], int]:
    """Return where each sequence's keys begin, on whole tiles, and the rows of an entry."""
    used: dict[int, int] = {}
    places = []
    for span in task.sequences:
        places.append(used.get(span.batch, 0))
        used[span.batch] = places[-1] + -(-span.len_kv // TILE_KEYS) * TILE_KEYS
    return places, max(TILE_KEYS, *used.values()) if used else TILE_KEYS


def _tables(
    task: Task, places: list[int]
) -> tuple[NDArray[np.void], NDArray[np.void], NDArray[np.void]]:
    """List sequences, and tiles of the keys and queries of the heads that are computed."""
    geometry = task.geometry
    group = task.query.shape[1] // task.key.shape[1]
    spans = np.zeros(len(task.sequences), SPAN)
    keys, queries = [np.empty(0, TILE)], [np.empty(0, TILE)]
    for number, (span, place) in enumerate(zip(task.sequences, places, strict=True)):
        heads = geometry.heads_of(span)
        low = high = 0
        if span.len_q:
            _, first, stop = geometry.key_ranges(span, span.len_q)
            low, high = int(first[0]), int(stop[0])
        spans[number] = (span.batch, span.kv_start + low, span.kv_start + high, 0)
        begin = TILE_KEYS * np.arange(-(-span.len_kv // TILE_KEYS))
        tiles = np.zeros((len(np.unique(heads // group)), len(begin)), TILE)
        tiles["batch"], tiles["span"] = span.batch, number
        tiles["head"] = np.unique(heads // group)[:, None]
        tiles["first"], tiles["place"] = span.kv_start + begin, place + begin
        tiles["begin"] = np.clip(low - begin, 0, TILE_KEYS)
        tiles["end"] = np.clip(high - begin, 0, TILE_KEYS)
        keys.append(tiles.reshape(-1))
        begin = TILE_KEYS * np.arange(-(-span.len_q // TILE_KEYS))
        tiles = np.zeros((len(heads), len(begin)), TILE)
        tiles["batch"], tiles["span"], tiles["head"] = span.batch, number, heads[:, None]
        tiles["first"] = span.q_start + begin
        tiles["end"] = np.minimum(span.len_q - begin, TILE_KEYS)
        queries.append(tiles.reshape(-1))
    return spans, np.concatenate(keys), np.concatenate(queries)
