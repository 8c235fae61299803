"""Device memory of an adaptive call: what stays with the result, and what passes through."""

from __future__ import annotations

import numpy as np

from adaattn_core.policies.table import CHOICE, HEAD_MEASURES
from adaattn_cuda.work.far import JUDGE_PARTS, LEVELS_MAX, SLOT, FarTables, probe_splits
from adaattn_cuda.work.far_geometry import TILE, FarGeometry
from adaattn_cuda.work.records import ITEM, SOURCE

__all__ = [
    "CERTIFICATE",
    "DECISION",
    "Layout",
    "kept_layout",
    "scratch_layout",
    "square_stride",
]

_ALIGNMENT = 256

DECISION = np.dtype([("measures", HEAD_MEASURES), ("choice", CHOICE)])
"""``far_decide::Verdict``."""
CERTIFICATE = np.dtype(
    [
        ("upper", "<f4"), ("estimate", "<f4"), ("rms", "<f4"), ("oracle", "<f4"),
        ("rounds", "<i4"), ("nonfinite", "<i4"), ("first_upper", "<f4"), ("proved", "<i4"),
    ]
)  # fmt: skip
"""``far_certify::Verdict``."""
PLACE_BYTES = 16
"""``far::Place``."""


class Layout:
    """Named parts of one allocation.

    Attributes
    ----------
    size : int
        Bytes of the allocation.
    """

    def __init__(self) -> None:
        self.size = 0
        self.parts: dict[str, tuple[int, int]] = {}

    def add(self, name: str, size_bytes: int) -> None:
        """Append a part; parts begin on 256 bytes."""
        self.parts[name] = (self.size, size_bytes)
        self.size += -(-max(size_bytes, 16) // _ALIGNMENT) * _ALIGNMENT

    def at(self, base: int) -> dict[str, int]:
        """Return the address of every part."""
        return {name: base + offset for name, (offset, _) in self.parts.items()}


def square_stride(g: FarGeometry) -> int:
    """Return how many sums of squares a head has, sixteen rows each."""
    return g.tiles * TILE // 16


def kept_layout(g: FarGeometry) -> Layout:
    """Figures that the host may read later."""
    layout = Layout()
    layout.add("certificates", g.heads * CERTIFICATE.itemsize)
    layout.add("decisions", g.heads * DECISION.itemsize)
    layout.add("decision", g.heads * 4)
    layout.add("failed", g.heads * 4)
    layout.add("kept", g.heads * 8)
    layout.add("landmarks", g.heads * g.groups * SLOT.itemsize)  # the slots of the run
    layout.add("selections", g.heads * g.groups * LEVELS_MAX * 8)
    return layout


def _add_list(layout: Layout, stem: str, heads: int, items: int) -> None:
    """Add a work list with as many items, and one that ends it."""
    layout.add(f"{stem}_queue", 16)
    layout.add(f"{stem}_places", heads * PLACE_BYTES)
    layout.add(f"{stem}_items", (items + 1) * ITEM.itemsize)
    layout.add(f"{stem}_sources", 3 * (items + 1) * SOURCE.itemsize)


def scratch_layout(
    g: FarGeometry,
    t: FarTables,
    levels: int,
    landmark_rows: int,
    exact_tiles: int,
    blocks: int,
    narrow: tuple[int, int, int] | None = None,
) -> Layout:
    """Everything else; free for others as soon as the last kernel is done.

    `exact_tiles` is how many items an exact head has; they are dealt to `blocks` blocks, which
    look up to two rounds beyond their last. `narrow`: items of a head in 8 bits, bytes of
    codes, and of their scales, where exact heads run in 8 bits first.
    """
    judges = len(t.judge_tiles)
    columns = g.chunk_heads * g.samples
    cells = g.units * g.groups
    layout = Layout()
    # Zero before every call, in this order, up to `zero_end`.
    layout.add("finished", cells * 4)
    layout.add("norms", 2 * g.batch * g.heads_kv * 4)
    layout.add("query_norms", g.heads * 4)
    layout.add("judged", g.heads * 4)
    layout.add("certified", 4)
    layout.add("asked_queue", 16)
    if not levels and narrow is None:
        layout.add("asked_items", (int(t.first_partial[-1]) + 1) * ITEM.itemsize)
    layout.add("zero_end", 0)
    layout.add("drawn_query", g.heads * t.drawn_rows.shape[1] * g.dim_qk * 2)
    partials = int(t.first_partial[-1])
    layout.add("exact_out", partials * TILE * g.dim_v * 4)
    layout.add("exact_lse", partials * TILE * 4)
    layout.add("exact_rows", t.drawn_rows.size * g.dim_v * 4)
    layout.add("squares", g.heads * square_stride(g) * 4)
    if narrow is not None:
        tiles, codes, scales = narrow
        layout.add("narrow_codes", codes)
        layout.add("narrow_scales", scales)
        if levels:
            _add_list(layout, "narrow", g.heads, g.heads * tiles + 3 * blocks)
    if levels or narrow is not None:  # else the items are constants
        _add_list(layout, "exact", g.heads, g.heads * exact_tiles + 3 * blocks)
    if not levels:
        return layout
    slots = g.heads * judges * levels
    _add_list(layout, "landmark", g.heads, max(g.heads * g.tiles, slots * JUDGE_PARTS))
    splits = max(probe_splits(g, listed, blocks)[1] for listed in (judges, len(t.rest_groups)))
    layout.add("partial", cells * splits * columns * 8)
    layout.add("partial_weighted", cells * splits * columns * 4)
    layout.add("lse_log2", cells * columns * 4)
    layout.add("stats", cells * columns * 16)
    layout.add("codes", g.heads * g.groups * g.code_stride)
    layout.add("tile_counts", g.heads * g.groups * LEVELS_MAX * g.tiles_per_group * 4)
    layout.add("errors", g.heads * (LEVELS_MAX + 1) * 4)
    layout.add("judge_slots", slots * SLOT.itemsize)
    layout.add("judge_parts", slots * 4)
    layout.add("judge_out", slots * JUDGE_PARTS * TILE * g.dim_v * 4)
    layout.add("judge_lse", slots * JUDGE_PARTS * TILE * 4)
    layout.add("landmark_key", landmark_rows * g.dim_qk * 2)
    layout.add("landmark_value", landmark_rows * g.dim_v * 2)
    pools = g.heads * max(t.pool_rows, t.judge_pool_rows) + TILE
    layout.add("pool_key", pools * g.dim_qk * 2)
    layout.add("pool_value", pools * g.dim_v * 2)
    layout.add("pool_mass", pools * 8)
    layout.add("pool_bias", pools * 4)
    return layout
