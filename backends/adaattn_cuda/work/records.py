"""Work lists: which block computes which query tile over which keys.

An item is a query tile of one head; the keys that it visits are entries of a table of sources.
Items are dealt to the blocks beforehand, longest first and always to the block with the least
work, so a kernel needs no counter and the same problem always runs in the same order. The
layouts are the twins of ``work/work_item.cuh``, byte for byte.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaattn_core.problem import SequenceSpan
from adaattn_cuda.work.geometry import UNLIMITED, Geometry

__all__ = [
    "GATHERED",
    "ITEM",
    "L2_SECTION_BYTES",
    "MASK_INTERVAL",
    "MASK_NONE",
    "NO_BIAS",
    "NO_PARTIAL",
    "ORIGINAL",
    "POOLED",
    "SOURCE",
    "TENSORS",
    "WorkList",
    "deal",
    "work_list",
]

ITEM = np.dtype(
    [
        (name, "<f4" if name == "skip_log2" else "<i4")
        for name in (
            "batch", "head", "row_first", "rows", "first_source", "sources", "tiles", "partial",
            "key_start", "key_stop", "start_offset", "stop_offset", "heads",
            "row_stops", "skip_log2", "code_shift",
        )
    ]
)  # fmt: skip
"""``WorkItem``: 64 bytes; the header says what the fields mean."""

SOURCE = np.dtype(
    [
        (name, "<i4")
        for name in (
            "tensor", "batch", "head", "first_key", "keys", "position", "mask", "first_bias",
        )
    ]
)  # fmt: skip
"""``Source``: 32 bytes."""

TENSORS = ORIGINAL, GATHERED, POOLED = 0, 1, 2
"""``Tensor``: which pair of key and value arrays a source reads."""

MASK_NONE, MASK_INTERVAL = 0, 1
NO_PARTIAL = NO_BIAS = -1

L2_SECTION_BYTES = 32 << 20
"""Keys and values that neighbouring blocks should find in L2: about half of an H100's."""

_ITEM_OVERHEAD_TILES = 1.0
"""Start and end of an item, in units of one key tile."""


@dataclass(frozen=True, slots=True, eq=False)
class WorkList:
    """Two tables that a kernel walks.

    Attributes
    ----------
    items : ndarray of ITEM, shape (rounds, grid)
        Block b takes column b from the top and stops at the first item without rows. (0, 0) if
        there is nothing to do.
    sources : ndarray of SOURCE, shape (count,)
        An item visits `sources` entries from `first_source` on.
    """

    items: NDArray[np.void]
    sources: NDArray[np.void]

    @property
    def grid(self) -> int:
        """Blocks of the launch."""
        return int(self.items.shape[1])

    @property
    def rounds(self) -> int:
        """Items per block, at most."""
        return int(self.items.shape[0])

    @property
    def max_sources(self) -> int:
        """Most sources of one item."""
        return int(self.items["sources"].max(initial=0))

    def tobytes(self) -> bytes:
        """Both tables as a kernel reads them, items first."""
        return self.items.tobytes() + self.sources.tobytes()

    def addresses(self, base: int) -> tuple[int, int]:
        """Return where items and sources are once `tobytes` lies at `base`."""
        return base, base + self.items.nbytes


def work_list(
    geometry: Geometry,
    tile_m: int,
    tile_n: int,
    blocks: int,
    *,
    key_step: int = 1,
    places: Sequence[int] | None = None,
) -> WorkList:
    """List the work of exact heads: one source for each item.

    Parameters
    ----------
    geometry : Geometry
    tile_m, tile_n : int
        Query rows and keys of a tile.
    blocks : int
        Upper limit of the grid, at least 1: the multiprocessors of a persistent launch.
    key_step : int
        Sources begin on multiples of it, counted from a sequence's first key.
    places : sequence of int, optional
        Row of each sequence's first key among a quantiser's codes.
    """
    firsts = [span.kv_start for span in geometry.spans] if places is None else places
    parts = [
        _span_tiles(geometry, span, tile_m, tile_n, key_step, place - span.kv_start)
        for span, place in zip(geometry.spans, firsts, strict=True)
    ]
    if not sum(len(items) for items, _ in parts):
        return WorkList(np.empty((0, 0), ITEM), np.empty(0, SOURCE))
    items = np.concatenate([part[0] for part in parts])
    sources = np.concatenate([part[1] for part in parts])
    order = _longest_first(geometry, items, sources)
    columns = deal(items["tiles"][order] + _ITEM_OVERHEAD_TILES, min(blocks, len(items)))
    rounds = max(len(column) for column in columns)
    dealt = np.zeros((rounds, len(columns)), ITEM)
    # An item's source stands where the item stands: blocks that run together read neighbours.
    table = np.zeros((rounds, len(columns)), SOURCE)
    for block, column in enumerate(columns):
        chosen = order[column]
        dealt[: len(column), block] = items[chosen]
        table[: len(column), block] = sources[chosen]
    dealt["first_source"] = np.arange(dealt.size).reshape(dealt.shape)
    return WorkList(dealt, table.reshape(-1))


def _span_tiles(
    geometry: Geometry,
    span: SequenceSpan,
    tile_m: int,
    tile_n: int,
    key_step: int,
    code_shift: int,
) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """All query tiles of one sequence and their sources, heads outermost."""
    start_offset, stop_offset = geometry.offsets(span)
    first, key_first, key_stop = geometry.key_ranges(span, tile_m)
    key_first = np.where(key_stop == key_first, key_first, key_first - key_first % key_step)
    sees_nothing = key_stop == key_first
    keys = np.where(sees_nothing, 1, key_stop - key_first)
    head = geometry.heads_of(span)[:, None]
    items = np.zeros((len(head), len(first)), ITEM)
    items["batch"] = span.batch
    items["head"] = head
    items["row_first"] = span.q_start + first
    items["rows"] = np.minimum(tile_m, span.len_q - first)
    items["sources"] = 1
    items["tiles"] = -(-keys // tile_n)
    items["partial"] = NO_PARTIAL
    items["key_stop"] = span.len_kv
    items["start_offset"] = start_offset + first
    items["stop_offset"] = stop_offset + first
    items["heads"] = 1
    items["code_shift"] = code_shift
    sources = np.zeros(items.shape, SOURCE)
    sources["tensor"] = ORIGINAL
    sources["batch"] = span.batch
    sources["head"] = head // (geometry.heads_q // geometry.heads_kv)
    # A tile outside the array arrives as zeros without touching memory.
    sources["first_key"] = np.where(sees_nothing, UNLIMITED, span.kv_start + key_first)
    sources["keys"] = keys
    sources["position"] = key_first
    sources["mask"] = MASK_INTERVAL
    sources["first_bias"] = NO_BIAS
    return items.reshape(-1), sources.reshape(-1)


def _longest_first(
    geometry: Geometry, items: NDArray[np.void], sources: NDArray[np.void]
) -> NDArray[np.int64]:
    """Order by L2 section, then by falling cost; equal tiles of a head stay neighbours."""
    longest = max((span.len_kv for span in geometry.spans), default=1)
    head_bytes = 2 * max(longest, 1) * (geometry.dim_qk + geometry.dim_v)
    heads_per_section = max(1, L2_SECTION_BYTES // head_bytes)
    kv_head = sources["batch"].astype(np.int64) * geometry.heads_kv + sources["head"]
    section = kv_head // heads_per_section
    return np.lexsort((np.arange(len(items)), -items["tiles"], section)).astype(np.int64)


def deal(costs: NDArray[np.float64], blocks: int) -> list[list[int]]:
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
