"""Work records of ``sm90_attn_fwd_f16``: which block computes which query tile over which keys.

One record is a query tile of one head with the run of keys that its rows may see. Records are
dealt to the blocks beforehand, longest first and always to the block with the least work, so
the kernel needs no counter and the same problem always runs in the same order. The layouts
mirror ``attn/work_item.cuh``.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.problem import AttentionProblem, SequenceSpan

__all__ = ["MAX_LEN", "Geometry", "record_dtype", "work_records"]

UNLIMITED = 1 << 29
"""Stands for "no limit" in a visible interval: sums of two stay far from overflow."""

MAX_LEN = UNLIMITED

_L2_SECTION_BYTES = 32 << 20
"""Keys and values that neighbouring blocks should find in L2: about half of an H100's."""

_ITEM_OVERHEAD_TILES = 1.0
"""Start and end of an item, in units of one key tile."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Everything that decides the work list.

    Attributes
    ----------
    spans : tuple of SequenceSpan
    heads_q, heads_kv, dim_qk, dim_v : int
    bottom_right : bool
        Whether row i is aligned with key i + len_kv - len_q rather than key i.
    left, right : int or None
        A row aligned with key p sees keys p - left .. p + right; None: unlimited.
    """

    spans: tuple[SequenceSpan, ...]
    heads_q: int
    heads_kv: int
    dim_qk: int
    dim_v: int
    bottom_right: bool = False
    left: int | None = None
    right: int | None = None

    @classmethod
    def of(cls, problem: AttentionProblem) -> Geometry:
        """Geometry of a checked problem with a structural mask."""
        mask = problem.mask
        return cls(
            spans=problem.sequences,
            heads_q=problem.heads_q,
            heads_kv=problem.heads_kv,
            dim_qk=problem.dim_qk,
            dim_v=problem.dim_v,
            bottom_right=mask.alignment == "bottom_right",
            left=mask.left,
            right=mask.right,
        )

    def offsets(self, span: SequenceSpan) -> tuple[int, int]:
        """(start, stop) such that row r of the span sees keys start + r <= j < stop + r."""
        shift = span.len_kv - span.len_q if self.bottom_right else 0
        start = -UNLIMITED if self.left is None else shift - min(self.left, UNLIMITED)
        stop = UNLIMITED if self.right is None else shift + min(self.right, UNLIMITED) + 1
        return start, stop

    def key_ranges(
        self, span: SequenceSpan, tile_m: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return each query tile's first row, and the keys [first, stop) that it may see."""
        start, stop = self.offsets(span)
        first = np.arange(0, span.len_q, tile_m, dtype=np.int64)
        last = np.minimum(first + tile_m, span.len_q) - 1
        key_first = np.clip(start + first, 0, span.len_kv)
        return first, key_first, np.maximum(np.clip(stop + last, 0, span.len_kv), key_first)


def record_dtype(max_sources: int) -> np.dtype[np.void]:
    """Memory layout of one work record with room for `max_sources` sources."""
    item = [
        "batch", "head", "row_first", "rows", "tiles", "sources",
        "key_start", "key_stop", "start_offset", "stop_offset", "reserved_0", "reserved_1",
    ]  # fmt: skip
    source = ["map", "batch", "head", "first", "keys", "position", "masked", "bias_first"]
    source_dtype = np.dtype([(name, "<i4") for name in source])
    fields: list[Any] = [(name, "<i4") for name in item]
    return np.dtype([*fields, ("source", source_dtype, (max_sources,))])


def work_records(
    geometry: Geometry, tile_m: int, tile_n: int, blocks: int, max_sources: int = 1
) -> NDArray[np.void]:
    """List the records in the order in which the blocks take them.

    Parameters
    ----------
    geometry : Geometry
    tile_m, tile_n : int
        Query rows and keys of a tile.
    blocks : int
        Upper limit of the grid, at least 1: the multiprocessors of a persistent launch.
    max_sources : int
        Room for sources in a record; one is used.

    Returns
    -------
    ndarray of ``record_dtype(max_sources)``, shape (rounds, grid)
        Block b takes column b from the top and stops at the first record without rows; grid <=
        blocks. Empty if there is no query row at all.
    """
    parts = [_span_tiles(geometry, span, tile_m, tile_n) for span in geometry.spans]
    tiles = np.concatenate(parts) if parts else np.empty(0, record_dtype(1))
    if not len(tiles):
        return np.empty((0, 0), record_dtype(max_sources))
    order = _longest_first(geometry, tiles)
    columns = _deal(tiles["tiles"][order] + _ITEM_OVERHEAD_TILES, min(blocks, len(tiles)))
    rounds = max(len(column) for column in columns)
    records = np.zeros((rounds, len(columns)), record_dtype(max_sources))
    for block, column in enumerate(columns):
        chosen = tiles[order[column]]
        for name in chosen.dtype.names or ():
            if name == "source":
                records["source"][: len(column), block, 0] = chosen["source"][:, 0]
            else:
                records[name][: len(column), block] = chosen[name]
    return records


def _span_tiles(
    geometry: Geometry, span: SequenceSpan, tile_m: int, tile_n: int
) -> NDArray[np.void]:
    """All query tiles of one sequence, heads outermost."""
    start_offset, stop_offset = geometry.offsets(span)
    first, key_first, key_stop = geometry.key_ranges(span, tile_m)
    sees_nothing = key_stop == key_first
    keys = np.where(sees_nothing, 1, key_stop - key_first)
    head = np.arange(geometry.heads_q)[:, None]
    records = np.zeros((geometry.heads_q, len(first)), record_dtype(1))
    records["batch"] = span.batch
    records["head"] = head
    records["row_first"] = span.q_start + first
    records["rows"] = np.minimum(tile_m, span.len_q - first)
    records["tiles"] = -(-keys // tile_n)
    records["sources"] = 1
    records["key_start"] = 0
    records["key_stop"] = span.len_kv
    records["start_offset"] = start_offset + (first if geometry.left is not None else 0)
    records["stop_offset"] = stop_offset + (first if geometry.right is not None else 0)
    source = records["source"][..., 0]
    source["batch"] = span.batch
    source["head"] = head // (geometry.heads_q // geometry.heads_kv)
    # A tile outside the array arrives as zeros without touching memory.
    source["first"] = np.where(sees_nothing, UNLIMITED, span.kv_start + key_first)
    source["keys"] = keys
    source["position"] = key_first
    source["masked"] = 1
    return records.reshape(-1)


def _longest_first(geometry: Geometry, tiles: NDArray[np.void]) -> NDArray[np.int64]:
    """Order by L2 section, then by falling cost; equal tiles of a head stay neighbours."""
    longest = max((span.len_kv for span in geometry.spans), default=1)
    head_bytes = 2 * max(longest, 1) * (geometry.dim_qk + geometry.dim_v)
    heads_per_section = max(1, _L2_SECTION_BYTES // head_bytes)
    source = tiles["source"][:, 0]
    kv_head = source["batch"].astype(np.int64) * geometry.heads_kv + source["head"]
    section = kv_head // heads_per_section
    return np.lexsort((np.arange(len(tiles)), -tiles["tiles"], section)).astype(np.int64)


def _deal(costs: NDArray[np.float64], blocks: int) -> list[list[int]]:
    """Give each cost, in order, to the block with the least so far."""
    if np.all(costs == costs[0]):
        return [list(range(block, len(costs), blocks)) for block in range(blocks)]
    columns: list[list[int]] = [[] for _ in range(blocks)]
    load = [(0.0, block) for block in range(blocks)]
    for index, cost in enumerate(costs.tolist()):
        total, block = load[0]
        columns[block].append(index)
        heapq.heapreplace(load, (total + cost, block))
    return columns
