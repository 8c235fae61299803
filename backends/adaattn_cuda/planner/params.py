"""Parameter blocks of the planning kernels: ctypes twins of the ``Params`` in plan/*.cuh."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from adaattn_core.policies.table import MAX_CANDIDATES, TABLE
from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
from adaattn_cuda.work.far import JUDGES_MAX, LEVELS_MAX
from adaattn_cuda.work.far_geometry import TILE, FarGeometry

__all__ = [
    "Certify",
    "Decide",
    "FarArrays",
    "Fit",
    "Gather",
    "List",
    "ListItems",
    "Merge",
    "Nest",
    "Pool",
    "Prepare",
    "Probe",
    "Prove",
    "Rows",
    "Select",
    "Sizes",
    "Work",
    "sizes_of",
]


@dataclass(frozen=True, slots=True)
class FarArrays:
    """query, key, value, out, lse on the device, unit stride along the last axis."""

    query: sm90.DeviceMatrix
    key: sm90.DeviceMatrix
    value: sm90.DeviceMatrix
    out: sm90.DeviceMatrix
    lse: sm90.DeviceMatrix


_i32, _f32, _ptr = ctypes.c_int32, ctypes.c_float, ctypes.c_uint64


class Sizes(ctypes.Structure):
    """``far::Sizes``."""

    _fields_ = (
        *(
            (name, _i32)
            for name in (
                "batch", "heads_q", "heads_kv", "len_q", "len_kv", "offset", "causal", "dim_qk",
                "dim_v", "tile", "tiles", "band", "groups", "samples", "levels", "judges",
                "code_stride", "pool_rows", "split_keys", "splits",
            )
        ),
        ("scale_log2", _f32),
        ("landmark_rows", _i32),
    )  # fmt: skip


def sizes_of(
    g: FarGeometry, levels: int, judges: int, pool_rows: int, scale_log2: float, room: int
) -> Sizes:
    """Return the sizes of a geometry; `room` is that of the landmark buffer, in rows.

    How keys are split is each probe's own matter.
    """
    return Sizes(
        g.batch, g.heads_q, g.heads_kv, g.len_q, g.len_kv, g.offset, int(g.causal), g.dim_qk,
        g.dim_v, TILE, g.tiles, g.band, g.groups, g.samples, levels, judges,
        g.code_stride, pool_rows, 0, 0, scale_log2, room,
    )  # fmt: skip


class Rows(ctypes.Structure):
    """``far::Rows``; strides in elements."""

    _fields_ = (
        ("data", _ptr),
        *((name, ctypes.c_int64) for name in ("row", "head", "batch")),
    )


class List(ctypes.Structure):
    """``far::List``."""

    _fields_ = (
        *((name, _ptr) for name in ("items", "sources", "queue", "places")),
        *((name, _i32) for name in ("tile", "tile_n", "tiles", "blocks")),
    )


def _block(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields, "__doc__": f"``{name}``."})


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, _ptr) for name in names]


def _ints(*names: str) -> list[tuple[str, Any]]:
    return [(name, _i32) for name in names]


Probe = _block(
    "Probe",
    ("key_map", ctypes.c_ubyte * 128),
    ("sizes", Sizes),
    ("query", Rows),
    *_pointers(
        "groups", "sample_rows", "group_list", "decision", "partial", "partial_weighted",
        "lse_log2", "stats", "finished", "codes",
    ),
    *_ints("listed", "padding"),
    ("rest", ctypes.c_ubyte * 64),  # the tensor map rounds the block up to 64 bytes
)  # fmt: skip
Select = _block(
    "Select",
    ("sizes", Sizes),
    *_pointers("groups", "group_list", "decision", "codes", "selections", "tile_counts"),
    ("tau", _f32 * LEVELS_MAX),
    *_ints("listed", "tile_stride"),
)
Gather = _block(
    "Gather",
    ("sizes", Sizes),
    ("key", Rows),
    ("value", Rows),
    *_pointers("groups", "codes", "selections", "slots", "landmark_key", "landmark_value"),
)
Nest = _block(
    "Nest",
    ("sizes", Sizes),
    ("key", Rows),
    ("value", Rows),
    *_pointers(
        "groups", "judge_tiles", "codes", "selections", "tile_counts", "slots", "landmark_key",
        "landmark_value",
    ),
    *_ints("tile_stride", "padding"),
)  # fmt: skip
Pool = _block(
    "Pool",
    ("sizes", Sizes),
    ("key", Rows),
    ("value", Rows),
    *_pointers(
        "groups", "codes", "selections", "slots", "pool_first", "pool_key", "pool_value",
        "pool_mass",
    ),
    *_ints("slots_per_head", "padding"),
)  # fmt: skip
Fit = _block(
    "Fit",
    ("sizes", Sizes),
    ("query", Rows),
    *_pointers(
        "groups", "sample_rows", "lse_log2", "slots", "pool_first", "pool_key", "pool_value",
        "pool_mass",
        "pool_bias",
    ),
    *_ints("chunk_heads", "splits"),
)  # fmt: skip
Merge = _block(
    "Merge",
    *_pointers("partial_out", "partial_lse", "first_partial", "exact"),
    ("out", Rows),
    ("lse", Rows),
    *_pointers("squares", "failed"),
    *_ints(
        "tiles", "dim_v", "head_tiles", "heads_q", "len_q", "tail_first", "square_stride",
        "padding",
    ),
)  # fmt: skip
Prepare = _block(
    "Prepare",
    ("sizes", Sizes),
    ("query", Rows),
    ("arrays", Rows * 2),
    *_pointers("drawn_rows", "drawn_query", "norms", "query_norms"),
    *_ints("drawn", "copy_blocks", "stretches", "stretch_rows", "queries", "padding"),
)
Work = _block(
    "Work",
    ("sizes", Sizes),
    *_pointers(
        "groups", "judge_tiles", "judge_groups", "selections", "tile_counts", "decision",
        "slots", "pool_first", "parts",
    ),
    ("landmarks", List),
    ("exact", List),
    ("narrow", List),
    *_pointers("kept"),
    *_ints("tile_stride"),
    ("most_landmarks", _f32),
    ("judge_weights", _f32 * JUDGES_MAX),
    *_ints("section_heads", "part_tiles", "padding"),
)  # fmt: skip
ListItems = _block(
    "ListItems",
    ("sizes", Sizes),
    *_pointers("groups", "tile_counts", "slots", "pool_first"),
    ("landmarks", List),
    ("exact", List),
    ("narrow", List),
    *_pointers("kept"),
    *_ints("tile_stride", "tail", "landmark_threads", "exact_threads"),
)
Decide = _block(
    "Decide",
    ("sizes", Sizes),
    *_pointers(
        "groups", "judge_tiles", "judge_groups", "slots", "selections", "exact", "parts",
        "partial_out", "partial_lse", "stats", "sample_rows", "errors", "finished", "decision",
        "verdicts",
    ),
    ("table", ctypes.c_ubyte * TABLE.itemsize),
    ("dense_tiles", _f32),
    ("near_tiles", _f32),
    ("far_tiles", _f32),
    ("judge_weights", _f32 * JUDGES_MAX),
    *_ints("spare_rows", "chunk_heads", "exact_stride"),
    ("narrow_entropy", _f32),
)  # fmt: skip
Certify = _block(
    "Certify",
    ("sizes", Sizes),
    ("out", Rows),
    *_pointers(
        "drawn_rows", "exact", "squares", "norms", "query_norms", "failed", "verdicts"
    ),
    ("budget", _f32),
    ("sum_factor", _f32),
    ("score_factor", _f32),
    *_ints(
        "drawn", "drawn_stride", "drawn_first", "square_stride", "unproved", "order", "second",
        "section_heads",
    ),
    ("again", List),
    *_pointers("finished"),
)  # fmt: skip
Prove = _block(
    "Prove",
    ("sizes", Sizes),
    *_pointers(
        "squares", "norms", "query_norms", "failed", "verdicts", "items", "first_item", "asked",
        "queue",
    ),
    *((name, _f32) for name in ("budget", "value_factor", "score_factor", "lost")),
    *_ints("square_stride", "head_tiles"),
)  # fmt: skip
assert MAX_CANDIDATES >= LEVELS_MAX
