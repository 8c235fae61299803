"""Work lists of heads that attend to runs of keys: block masks, and what is made of them.

A head's *runs* say, for every tile of its query rows, which stretches of its sequence's keys
are multiplied. An item visits each run of its tile as a source of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaattn_core.problem import SequenceSpan
from adaattn_core.structure import BlockSparse
from adaattn_cuda.work.geometry import UNLIMITED, Geometry
from adaattn_cuda.work.records import (
    ITEM,
    L2_SECTION_BYTES,
    MASK_INTERVAL,
    NO_BIAS,
    NO_PARTIAL,
    ORIGINAL,
    SOURCE,
    WorkList,
    deal,
)

__all__ = [
    "Runs",
    "block_runs",
    "computed_scores",
    "is_complete",
    "run_list",
    "tile_keys",
    "visible_scores",
]

Ints = NDArray[np.int64]
_SOURCE_OVERHEAD_TILES = 0.1
_ITEM_OVERHEAD_TILES = 1.0
"""Start of a run, and start and end of an item, in units of one key tile."""


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Keys that each tile of query rows multiplies, cut to what some row of it sees.

    Attributes
    ----------
    row_first, rows : ndarray of int64, shape (tiles,)
        Query rows, counted from the sequence's first.
    begin : ndarray of int64, shape (tiles + 1,)
        Where each tile's runs begin.
    first, stop : ndarray of int64, shape (runs,)
        Keys, counted from the sequence's first; rising within a tile, and apart.
    """

    row_first: Ints
    rows: Ints
    begin: Ints
    first: Ints
    stop: Ints

    @property
    def counts(self) -> Ints:
        """Runs of each tile."""
        return np.diff(self.begin)


def block_runs(
    blocks: Sequence[Sequence[int]],
    structure: BlockSparse,
    geometry: Geometry,
    span: SequenceSpan,
    tile_m: int,
) -> Runs:
    """Return the runs of a block mask, neighbouring blocks joined.

    Parameters
    ----------
    blocks : sequence of sequence of int
        Rising key blocks of every query tile.
    structure : BlockSparse
        Its block size.
    geometry : Geometry
        The interval mask.
    span : SequenceSpan
    tile_m : int
        Query rows of the kernel's tile: longer query tiles are cut, shorter ones with the same
        blocks are joined.
    """
    size, length = structure.tile_q, structure.tile_kv
    tiles = -(-span.len_q // size)
    lists = blocks[:tiles]
    count = np.fromiter(map(len, lists), np.int64, tiles)
    flat = np.fromiter(itertools.chain.from_iterable(lists), np.int64, int(count.sum()))
    # Runs of each query tile: a new one begins where a tile does, or a block is left out.
    opens = np.ones(len(flat), bool)
    opens[1:] = np.diff(flat) != 1
    edges = np.cumsum(count) - count
    opens[edges[count > 0]] = True
    first_at = np.flatnonzero(opens)
    last_at = np.append(first_at, len(flat))[1:] - 1
    per_tile = np.add.reduceat(np.append(opens, 0), edges) if tiles else edges
    per_tile = np.where(count > 0, per_tile, 0)
    begin = np.concatenate([[0], np.cumsum(per_tile)]).astype(np.int64)
    first, stop = flat[first_at] * length, (flat[last_at] + 1) * length
    row_first, rows, chosen = _pieces(lists, size, span.len_q, tile_m)
    number = per_tile[chosen]
    at = np.repeat(begin[chosen], number) + _within(number)
    low, high = _visible(geometry, span, row_first, rows)
    of = np.repeat(np.arange(len(chosen)), number)
    cut_first = np.maximum(first[at], low[of])
    cut_stop = np.minimum(stop[at], high[of])
    kept = cut_first < cut_stop
    counts = np.bincount(of[kept], minlength=len(chosen))
    return Runs(
        row_first,
        rows,
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        cut_first[kept],
        cut_stop[kept],
    )


def _pieces(
    lists: Sequence[Sequence[int]], size: int, len_q: int, tile_m: int
) -> tuple[Ints, Ints, Ints]:
    """First row, rows, and query tile of every piece of at most `tile_m` rows."""
    found: list[tuple[int, int, int]] = []
    tile = 0
    while tile < len(lists):
        alike = 1
        while (
            (alike + 1) * size <= tile_m
            and tile + alike < len(lists)
            and lists[tile + alike] == lists[tile]
        ):
            alike += 1
        stop = min((tile + alike) * size, len_q)
        for row in range(tile * size, stop, tile_m):
            found.append((row, min(tile_m, stop - row), tile))
        tile += alike
    table = np.array(found, np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def _within(counts: Ints) -> Ints:
    """0 .. n - 1 for every n, one after the other."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def _visible(
    geometry: Geometry, span: SequenceSpan, row_first: Ints, rows: Ints
) -> tuple[Ints, Ints]:
    """Keys [low, high) that some of these rows may see."""
    start, stop = geometry.offsets(span)
    low = np.clip(start + row_first, 0, span.len_kv)
    return low, np.maximum(np.clip(stop + row_first + rows - 1, 0, span.len_kv), low)


def is_complete(runs: Runs, geometry: Geometry, span: SequenceSpan) -> bool:
    """Whether every tile multiplies all keys that some row of it may see."""
    low, high = _visible(geometry, span, runs.row_first, runs.rows)
    of = np.repeat(np.arange(len(runs.rows)), runs.counts)
    held = np.bincount(of, runs.stop - runs.first, len(runs.rows))
    return bool((held == high - low).all())


def computed_scores(runs: Runs, geometry: Geometry, span: SequenceSpan) -> int:
    """Count the scores within the runs that the interval mask shows."""
    start, stop = geometry.offsets(span)
    total = 0
    of = np.repeat(np.arange(len(runs.rows)), runs.counts)
    longest = int(runs.rows.max(initial=0))
    step = max(1, (1 << 22) // max(longest, 1))
    for begin in range(0, len(of), step):
        part = slice(begin, begin + step)
        row = np.arange(longest)
        exists = row < runs.rows[of[part]][:, None]
        row = row + runs.row_first[of[part]][:, None]
        low = np.maximum(runs.first[part][:, None], start + row)
        high = np.minimum(runs.stop[part][:, None], stop + row)
        total += int(np.where(exists, np.maximum(high - low, 0), 0).sum())
    return total


def visible_scores(geometry: Geometry, span: SequenceSpan) -> int:
    """Count the scores of a head that the interval mask shows."""
    row = np.arange(span.len_q)
    low, high = _visible(geometry, span, row, np.ones_like(row))
    return int((high - low).sum())


def tile_keys(runs: Runs, tile_n: int) -> int:
    """Count the keys that tiles of `tile_n` multiply in one head, past the runs' ends too."""
    return int((-(-(runs.stop - runs.first) // tile_n)).sum()) * tile_n


def run_list(
    geometry: Geometry,
    heads: Iterable[tuple[SequenceSpan, int, Runs]],
    tile_n: int,
    blocks: int | None,
) -> WorkList:
    """List the work of heads.

    Parameters
    ----------
    geometry : Geometry
    heads : iterable of (SequenceSpan, int, Runs)
        Sequence and query head; heads that share runs hold the same object.
    tile_n : int
        Keys of a tile of the kernel.
    blocks : int or None
        Items are dealt to as many blocks, at most; None: every item is a block, longest first.
    """
    ratio = geometry.heads_q // geometry.heads_kv
    made: dict[tuple[int, int, int], tuple[NDArray[np.void], int]] = {}
    items: list[NDArray[np.void]] = []
    sources: list[NDArray[np.void]] = []
    placed = 0
    for span, head, runs in heads:
        key = span.index, head // ratio, id(runs)
        if key not in made:
            item, source = _items(geometry, span, head // ratio, runs, tile_n)
            item["first_source"] += placed
            placed += len(source)
            sources.append(source)
            made[key] = item, placed
        item = made[key][0].copy()
        item["head"] = head
        items.append(item)
    if not sum(map(len, items)):
        return WorkList(np.empty((0, 0), ITEM), np.empty(0, SOURCE))
    every, table = np.concatenate(items), np.concatenate(sources)
    order = _longest_first(geometry, every)
    every = every[order]
    if blocks is None:
        return WorkList(every[None], table)
    costs = every["tiles"] + _ITEM_OVERHEAD_TILES + _SOURCE_OVERHEAD_TILES * every["sources"]
    columns = deal(costs, min(blocks, len(every)))
    dealt = np.zeros((max(map(len, columns)), len(columns)), ITEM)
    for block, column in enumerate(columns):
        dealt[: len(column), block] = every[column]
    return WorkList(dealt, table)


def _items(
    geometry: Geometry, span: SequenceSpan, head_kv: int, runs: Runs, tile_n: int
) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Items of a head and their sources; a tile without a run has one that no row sees."""
    start_offset, stop_offset = geometry.offsets(span)
    nothing = runs.counts == 0
    number = np.where(nothing, 1, runs.counts)
    begin = np.cumsum(number) - number
    sources = np.zeros(int(number.sum()), SOURCE)
    sources["tensor"], sources["batch"], sources["head"] = ORIGINAL, span.batch, head_kv
    sources["mask"], sources["first_bias"] = MASK_INTERVAL, NO_BIAS
    # A tile outside the array arrives as zeros without touching memory.
    sources["first_key"], sources["keys"] = UNLIMITED, 1
    held = np.repeat(begin, runs.counts) + _within(runs.counts)
    sources["first_key"][held] = span.kv_start + runs.first
    sources["position"][held] = runs.first
    sources["keys"][held] = runs.stop - runs.first
    items = np.zeros(len(runs.rows), ITEM)
    items["batch"] = span.batch
    items["row_first"] = span.q_start + runs.row_first
    items["rows"] = runs.rows
    items["first_source"], items["sources"] = begin, number
    items["tiles"] = np.add.reduceat(-(-sources["keys"] // tile_n), begin) if len(begin) else 0
    items["partial"] = NO_PARTIAL
    items["key_stop"] = np.where(nothing, 0, span.len_kv)
    items["start_offset"] = start_offset + runs.row_first
    items["stop_offset"] = stop_offset + runs.row_first
    items["heads"] = 1
    return items, sources


def _longest_first(geometry: Geometry, items: NDArray[np.void]) -> Ints:
    """Order by L2 section, then by falling cost; equal tiles of a head stay neighbours."""
    longest = max((span.len_kv for span in geometry.spans), default=1)
    head_bytes = 2 * max(longest, 1) * (geometry.dim_qk + geometry.dim_v)
    ratio = geometry.heads_q // geometry.heads_kv
    kv_head = items["batch"].astype(np.int64) * geometry.heads_kv + items["head"] // ratio
    section = kv_head // max(1, L2_SECTION_BYTES // head_bytes)
    return np.lexsort((np.arange(len(items)), -items["tiles"], section)).astype(np.int64)
