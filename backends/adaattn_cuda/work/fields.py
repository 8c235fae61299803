"""Work lists of heads with landmarks and pools, from what was chosen on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaattn_core.choosing import Fields
from adaattn_core.problem import SequenceSpan
from adaattn_cuda.work.choosing import Far, row_intervals
from adaattn_cuda.work.geometry import UNLIMITED, Geometry
from adaattn_cuda.work.records import (
    GATHERED,
    ITEM,
    MASK_INTERVAL,
    MASK_NONE,
    NO_BIAS,
    NO_PARTIAL,
    ORIGINAL,
    POOLED,
    SOURCE,
    WorkList,
    deal,
)

__all__ = ["FarHead", "far_list"]

_ITEM_OVERHEAD_TILES = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class FarHead:
    """A head whose far field was chosen.

    Attributes
    ----------
    span : SequenceSpan
    head : int
    fields : Fields
    far : tuple of Far
        Of each group.
    landmark_first, pool_first : tuple of int
        Row of each group's first landmark, and first pool, among all that were made.
    """

    span: SequenceSpan
    head: int
    fields: Fields
    far: tuple[Far, ...]
    landmark_first: tuple[int, ...]
    pool_first: tuple[int, ...]

    def tiles(self) -> list[tuple[int, int, int]]:
        """Group, first row, and end of every tile before the tail."""
        size = self.fields.structure.tile
        return [
            (number, row, min(row + size, group.stop))
            for number, group in enumerate(self.fields.groups())
            for row in range(group.start, group.stop, size)
        ]

    def columns(self, group: int, row: int) -> tuple[int, int, int, int, int, int]:
        """Near keys, landmarks before and from, pools before and from, of the tile at a row."""
        fields, far = self.fields, self.far[group]
        start, stop = (int(x) for x in fields.near(np.array(row)))
        pools = len(far.filled)
        size = max(fields.structure.pool, 1)
        before = int(np.searchsorted(far.landmarks, start))
        behind, behind_pool = len(far.landmarks), pools
        if not fields.causal:
            behind = int(np.searchsorted(far.landmarks, stop))
            behind_pool = min(-(-stop // size), pools)
        return start, stop, before, behind, min(start // size, pools), behind_pool

    def computed(self, geometry: Geometry) -> int:
        """Count the scores that enter softmaxes, pools with keys included."""
        _, stop = row_intervals(geometry, self.span)
        total = 0
        for group, row, end in self.tiles():
            near, near_stop, before, behind, pool, behind_pool = self.columns(group, row)
            far = self.far[group]
            seen = np.clip(np.minimum(stop[row:end], near_stop) - near, 0, None)
            filled = int(far.filled[:pool].sum() + far.filled[behind_pool:].sum())
            total += int(seen.sum())
            total += (end - row) * (before + len(far.landmarks) - behind + filled)
        start, stop = row_intervals(geometry, self.span)
        tail = self.fields.tail
        return total + int((stop[tail] - start[tail]).sum())

    def is_complete(self, geometry: Geometry) -> bool:
        """Whether every row before the tail finds all that it may see in its near field."""
        _, stop = row_intervals(geometry, self.span)
        return self.fields.near_holds_all(stop)

    def rank(self) -> int:
        """Columns that stand for the far field, on average over the groups."""
        columns = [len(far.landmarks) + len(far.filled) for far in self.far]
        return round(sum(columns) / max(len(columns), 1))


def far_list(
    geometry: Geometry, heads: Sequence[FarHead], tile_m: int, tile_n: int, blocks: int | None
) -> WorkList:
    """List the work of heads: pools, landmarks and near field of every tile, and the tails.

    Parameters
    ----------
    geometry : Geometry
    heads : sequence of FarHead
    tile_m, tile_n : int
        Query rows and keys of a tile of the kernel.
    blocks : int or None
        Items are dealt to as many blocks, at most; None: every item is a block, longest first.
    """
    items: list[tuple[int, ...]] = []
    sources: list[tuple[int, ...]] = []
    ratio = geometry.heads_q // geometry.heads_kv
    for head in heads:
        span, place = head.span, (head.span.batch, head.head // ratio)
        start_offset, stop_offset = geometry.offsets(span)
        start, stop = row_intervals(geometry, span)

        for group, row, end in (*head.tiles(), (-1, head.fields.tail.start, span.len_q)):
            for first in range(row, end, tile_m):
                rows = min(tile_m, end - first)
                if group < 0:
                    part = slice(first, first + rows)
                    low, high = int(start[part].min()), int(stop[part].max())
                    own = [_keys(span, place, low, high)] if low < high else []
                else:
                    own = _far_sources(head, group, row, place)
                own = own or [(ORIGINAL, *place, UNLIMITED, 1, 0, MASK_INTERVAL, NO_BIAS)]
                tiles = sum(-(-source[4] // tile_n) for source in own)
                nothing = own[0][3] == UNLIMITED
                items.append(
                    (span.batch, head.head, span.q_start + first, rows, len(sources), len(own),
                     tiles, NO_PARTIAL, 0, 0 if nothing else span.len_kv,
                     start_offset + first, stop_offset + first, 1)
                )  # fmt: skip
                sources += own
    if not items:
        return WorkList(np.empty((0, 0), ITEM), np.empty(0, SOURCE))
    every = np.zeros(len(items), ITEM)
    table = np.zeros(len(sources), SOURCE)
    for record, found in ((every, items), (table, sources)):
        columns = np.array(found, np.int64).reshape(len(found), -1)
        for name, column in zip(record.dtype.names or (), columns.T, strict=False):
            record[name] = column
    every = every[np.argsort(-every["tiles"], kind="stable")]
    if blocks is None:
        return WorkList(every[None], table)
    shared = deal(every["tiles"] + _ITEM_OVERHEAD_TILES, min(blocks, len(every)))
    dealt = np.zeros((max(map(len, shared)), len(shared)), ITEM)
    for block, mine in enumerate(shared):
        dealt[: len(mine), block] = every[mine]
    return WorkList(dealt, table)


def _keys(span: SequenceSpan, place: tuple[int, int], low: int, high: int) -> tuple[int, ...]:
    """Return a source of the keys themselves."""
    first = span.kv_start + low
    return (ORIGINAL, *place, first, high - low, low, MASK_INTERVAL, NO_BIAS)


def _further(tensor: int, first: int, low: int, high: int) -> tuple[int, ...]:
    """Return a source of gathered or pooled columns, which every row sees."""
    place = first + low
    bias = place if tensor == POOLED else NO_BIAS
    return (tensor, 0, 0, place, high - low, 0, MASK_NONE, bias)


def _far_sources(
    head: FarHead, group: int, row: int, place: tuple[int, int]
) -> list[tuple[int, ...]]:
    """Pools, landmarks and near field of a tile; summed from the last to the first."""
    far = head.far[group]
    start, stop, before, behind, pool, behind_pool = head.columns(group, row)
    pools, landmarks = head.pool_first[group], head.landmark_first[group]
    own = [
        _further(tensor, first, low, high)
        for tensor, first, low, high in (
            (POOLED, pools, 0, pool),
            (POOLED, pools, behind_pool, len(far.filled)),
            (GATHERED, landmarks, 0, before),
            (GATHERED, landmarks, behind, len(far.landmarks)),
        )
        if low < high
    ]
    if start < stop:
        own.append(_keys(head.span, place, start, stop))
    return own
