"""Specialisations of the kernels that one adaptive call runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.tuning.sm90_attn_fwd_8bit import Tile as NarrowTile
from adaattn_cuda.tuning.sm90_attn_fwd_8bit import choose as choose_narrow
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import Tile, candidates, padded_dim
from adaattn_cuda.work.far_geometry import TILE, FarGeometry

__all__ = [
    "GATHER_KEYS",
    "LIST_THREADS",
    "attend_tile",
    "dense_tile",
    "exact_tile",
    "kernel_specs",
    "narrow_tile",
    "pool_shape",
]

_ARCH = "sm_90a"
_SELECT_THREADS = _GATHER_THREADS = _DECIDE_THREADS = 256
LIST_THREADS = 256
ROWS_MAX = 512
"""Drawn rows of a head at most: ``kRowsMax`` of far_certify.cuh."""
GATHER_KEYS = 16 * _GATHER_THREADS
"""Keys that one block looks for landmarks in: ``kStretch`` of far_gather.cuh, far_nest.cuh."""
_PROBES = {"probe_stats": (0, 1), "probe_lse": (0, 0), "probe_mass": (1, 0)}
"""Pass and statistics of each specialisation of the probe."""


def kernel_specs(
    g: FarGeometry, dtype: str, levels: int, narrow: tuple[str, str] | None = None
) -> dict[str, tuple[KernelSpec, int]]:
    """Kernels of a geometry, with their threads; `narrow`: formats of exact heads at first."""
    kind = f"adaattn::Format::{dtype}"
    dim_qk, dim_v = padded_dim(g.dim_qk), padded_dim(g.dim_v)

    def plan(stem: str, *traits: Any, smem: int = 0) -> KernelSpec:
        return KernelSpec(stem, traits, smem, _ARCH, folder="plan")

    attend = attend_tile(dim_qk, dim_v)
    dense = dense_tile(dim_qk, dim_v)
    exact = exact_tile(dim_qk, dim_v)
    found = {
        "prepare": (plan("far_prepare", kind, row_dim(dim_qk, dim_v), 256), 256),
        "merge": (plan("far_merge", kind, 16), 512),
        "attend_exact": (dense.spec(dtype), dense.threads),
        "exact": (exact.spec(dtype), exact.threads),
        "certify": (plan("far_certify", kind, ROWS_MAX), ROWS_MAX),
        "prove": (plan("far_prove", ROWS_MAX), ROWS_MAX),
        "work_attend": (plan("far_work", 1), 1024),
        "list": (plan("far_list", LIST_THREADS), LIST_THREADS),
    }
    if narrow is not None:
        first = narrow_tile(*narrow, dim_qk, dim_v)
        found["attend_narrow"] = (first.spec(dtype), first.threads)
    if levels:
        columns = (dim_qk, g.samples, g.chunk_heads)
        pool_dim = max(dim_qk, dim_v)
        pool_blocks = pool_shape(pool_dim)
        found |= {
            name: (
                plan("sm90_probe", kind, *columns, *what, smem=probe_smem(*columns, *what)),
                256,
            )
            for name, what in _PROBES.items()
        }
        fit_smem = g.samples * (2 * dim_qk + 24)
        pool_smem = 256 * pool_blocks * pool_dim
        found |= {
            "attend": (attend.spec(dtype), attend.threads),
            "select": (plan("far_select", _SELECT_THREADS), _SELECT_THREADS),
            "gather": (plan("far_gather", _GATHER_THREADS), _GATHER_THREADS),
            "nest": (plan("far_nest", _GATHER_THREADS), _GATHER_THREADS),
            "pool": (plan("far_pool", kind, pool_dim, pool_blocks, smem=pool_smem), 256),
            "fit": (plan("far_fit", kind, dim_qk, g.samples, smem=fit_smem), 128),
            "work_judge": (plan("far_work", 0), 1024),
            "decide": (plan("far_decide", kind, _DECIDE_THREADS), _DECIDE_THREADS),
        }
    return found


def attend_tile(dim_qk: int, dim_v: int) -> Tile:
    """Specialisation that runs landmark heads."""
    tile_n = TILE if max(dim_qk, dim_v) <= 128 else 64
    query_stages = 2 if max(dim_qk, dim_v) <= 64 else 1
    return Tile(dim_qk, dim_v, 2, tile_n, query_stages=query_stages, role=1, max_sources=3)


def dense_tile(dim_qk: int, dim_v: int) -> Tile:
    """Specialisation that runs exact heads: the best for dense, from a list of the device."""
    if max(dim_qk, dim_v) > 192:
        return Tile(dim_qk, dim_v, 2, 64, role=1)
    _, fastest = max(candidates(dim_qk, dim_v), key=lambda candidate: candidate[0])
    return replace(fastest, role=1)


def narrow_tile(qk: str, pv: str, dim_qk: int, dim_v: int) -> NarrowTile:
    """Specialisation that runs exact heads in 8 bits first, from a list of the device."""
    return replace(choose_narrow(qk, pv, dim_qk, dim_v), role=1)


def exact_tile(dim_qk: int, dim_v: int) -> Tile:
    """Specialisation that computes drawn rows."""
    tile_n = TILE if max(dim_qk, dim_v) <= 128 else 64
    return Tile(dim_qk, dim_v, 2, tile_n, role=2)


def probe_smem(dim: int, samples: int, heads: int, kind: int, stats: int) -> int:
    """Shared memory of a probe; the kernel asserts it."""
    panels, columns = dim // 64, samples * heads
    stages = 2 if dim > 64 else 4 if kind == 0 else 3
    barrier = -(-panels * columns * 128 // 1024) * 1024 + stages * panels * TILE * 128
    merge = barrier + -(-16 * stages // 128) * 128 + 12 * columns
    floats = (3 if stats else 2) if kind == 0 else 0
    return -(-(merge + 32 * columns * floats + 16) // 128) * 128


def row_dim(dim_qk: int, dim_v: int) -> int:
    """Return the padded dim of rows that are read eight elements a lane: a power of two."""
    return 1 << (max(dim_qk, dim_v) - 1).bit_length()


def pool_shape(dim: int) -> int:
    """Blocks of keys that a pooling block holds: so few that three share a multiprocessor."""
    return {64: 4, 128: 2}.get(dim, 1)
