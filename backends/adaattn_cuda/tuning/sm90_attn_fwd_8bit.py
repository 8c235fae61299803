"""Tile choice of ``sm90_attn_fwd_8bit``: one for each pair of formats and dims."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import ARCH, SMEM_LIMIT_BYTES, padded_dim
from adaattn_cuda.work.records import ITEM, SOURCE

__all__ = ["MAX_DIM", "STEM", "TILE_KEYS", "TILE_SCALES", "Tile", "choose", "shipped"]

STEM = "sm90_attn_fwd_8bit"
MAX_DIM = 128
"""Largest head dim: output, one piece of its product, and scores fill the registers."""
TILE_KEYS = 256
"""Keys of a tile of the quantiser; kTileKeys in quant/scale_tile.cuh."""
TILE_SCALES = 20
"""Floats of such a tile's record of scales; kTileScales there."""

_PANEL_BYTES = 128


@dataclass(frozen=True, slots=True)
class Tile:
    """One specialisation of the kernel; fields stand as in the C++ ``Traits``.

    Attributes
    ----------
    qk, pv : str
        ``i8`` and ``e4m3``, or the format of the arrays.
    dim_qk, dim_v : int
        Padded head dims: 64 or 128.
    consumers, tile_n, stages, query_stages, ping_pong, role, max_sources
        As in `adaattn_cuda.tuning.sm90_attn_fwd_f16.Tile`.
    """

    qk: str
    pv: str
    dim_qk: int
    dim_v: int
    consumers: int = 2
    tile_n: int = 256
    stages: int = 2
    query_stages: int = 2
    ping_pong: bool = True
    role: int = 0
    max_sources: int = 1

    @property
    def tile_m(self) -> int:
        """Query rows of a tile."""
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        """Threads of a block: the producer's warpgroup and the consumers'."""
        return 128 * (self.consumers + 1)

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory: queries, key and value stages, records, scales, barriers."""
        row = self.dim_qk * (1 if self.qk == "i8" else 2)
        row = math.ceil(row / _PANEL_BYTES) * _PANEL_BYTES
        values = self.tile_n * self.dim_v * (1 if self.pv == "e4m3" else 2)
        slots = 4 if self.query_stages == 1 else 8
        records = slots * (ITEM.itemsize + SOURCE.itemsize * self.max_sources)
        scales = self.stages * 4 * TILE_SCALES
        barriers = 8 * (2 * self.query_stages + 4 * self.stages + 2 * slots)
        queries = self.query_stages * self.tile_m * row
        tiles = self.stages * (self.tile_n * row + values)
        return math.ceil((queries + tiles + records + scales + barriers) / 128) * 128

    def spec(self, dtype: str) -> KernelSpec:
        """KernelSpec for arrays of format ``bf16`` or ``f16``."""
        return KernelSpec(STEM, self.traits(dtype), self.smem_bytes, ARCH)

    def traits(self, dtype: str) -> tuple[str | int, ...]:
        """Template arguments for arrays of format ``bf16`` or ``f16``."""
        return (
            *(f"adaattn::Format::{name}" for name in (dtype, self.qk, self.pv)),
            self.dim_qk,
            self.dim_v,
            self.consumers,
            self.tile_n,
            self.stages,
            self.query_stages,
            int(self.ping_pong),
            self.role,
            self.max_sources,
        )


def is_legal(tile: Tile) -> bool:
    """Whether shared memory suffices."""
    return tile.smem_bytes <= SMEM_LIMIT_BYTES


def choose(qk: str, pv: str, dim_qk: int, dim_v: int) -> Tile:
    """Return the specialisation for head dims up to `MAX_DIM`, measured on an H100.

    A consumer's products follow each other, and run under the weights of the others: of one
    other with tiles of 256 keys, of two with half of them, where registers allow a third.
    """
    dims = padded_dim(dim_qk), padded_dim(dim_v)
    if max(dims) > 64:
        tiles = [Tile(qk, pv, *dims, query_stages=count) for count in (2, 1)]
    else:
        tiles = [Tile(qk, pv, *dims, 3, 128, stages) for stages in (4, 2)]
    return next(filter(is_legal, tiles))


def shipped() -> list[KernelSpec]:
    """Specialisations to compile ahead: both products in 8 bits; others on first use."""
    return [
        choose("i8", "e4m3", dim, dim).spec(dtype)
        for dtype in ("bf16", "f16")
        for dim in (64, 128)
    ]
