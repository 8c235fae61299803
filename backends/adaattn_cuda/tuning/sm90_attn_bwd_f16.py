"""Tiles of ``sm90_attn_bwd_f16``: one shape for each pair of padded head dimensions."""

from __future__ import annotations

from dataclasses import dataclass

from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import ARCH

__all__ = ["MAX_DIM", "Tile", "choose", "shipped"]

STEM, FINISH_STEM = "sm90_attn_bwd_f16", "smxx_attn_bwd_finish"
MAX_DIM = 128
CONSUMERS, STAGES, SUM_STAGES = 2, 2, 2
_BARRIERS = 1 + 8 * STAGES
_WORK_BYTES = 128


@dataclass(frozen=True, slots=True)
class Tile:
    """Template arguments of ``sm90_attn_bwd_f16::Traits``, and what follows from them.

    `tile_m` is the queries of a tile; `in_order` makes every start give the same bits.
    """

    dtype: str
    dim_qk: int
    dim_v: int
    tile_m: int
    in_order: bool = False

    tile_n = 128
    """Keys that a block owns."""
    threads = 128 * (CONSUMERS + 1)
    finish_threads = 256

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block; the header's table names the parts."""
        keys = self.tile_n * (self.dim_qk + self.dim_v) * 2
        queries = STAGES * self.tile_m * (self.dim_qk + self.dim_v) * 2
        ds = 2 * self.tile_m * self.tile_n * 2
        sums = SUM_STAGES * self.tile_m * self.dim_qk * 4
        rows = STAGES * 2 * self.tile_m * 4
        barriers = -(-8 * _BARRIERS // 16) * 16
        return -(-(keys + queries + ds + sums + rows + barriers + _WORK_BYTES) // 128) * 128

    @property
    def spec(self) -> KernelSpec:
        """Return the kernel to build."""
        traits = (
            f"adaattn::Format::{self.dtype}",
            self.dim_qk,
            self.dim_v,
            self.tile_m,
            int(self.in_order),
        )
        return KernelSpec(STEM, traits, self.smem_bytes, ARCH)

    @property
    def finish(self) -> KernelSpec:
        """Return the kernel that turns sums into the queries' gradient."""
        return KernelSpec(FINISH_STEM, (f"adaattn::Format::{self.dtype}", self.dim_qk), 0, ARCH)

    @property
    def finish_rows(self) -> int:
        """Rows of one block of `finish`."""
        return self.finish_threads // (self.dim_qk // 8)


def choose(dtype: str, dim_qk: int, dim_v: int, in_order: bool = False) -> Tile:
    """Return the tile of head dimensions up to `MAX_DIM`, additions in one order or any."""
    first, second = (64 if dim <= 64 else 128 for dim in (dim_qk, dim_v))
    # Short rows leave registers for more queries at a time, and fewer waits.
    tile_m = 128 if first == second == 64 else 64
    return Tile(dtype, first, second, tile_m, in_order)


def shipped() -> list[KernelSpec]:
    """Specialisations that `adaattn warmup` and `adaattn kernels` build."""
    tiles = [
        choose(dtype, dim, dim, in_order)
        for dtype in ("bf16", "f16")
        for dim in (64, 128)
        for in_order in (False, True)
    ]
    return list(dict.fromkeys(spec for tile in tiles for spec in (tile.spec, tile.finish)))
