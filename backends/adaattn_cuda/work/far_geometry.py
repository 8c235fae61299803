"""Sizes of an adaptive call, and what follows from them alone: groups, tiles, near fields."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaattn_cuda.work.records import L2_SECTION_BYTES

__all__ = ["POOL_KEYS", "TILE", "FarGeometry"]

POOL_KEYS = 64
"""Keys of a pool: kPoolKeys."""
TILE = 128
"""Query rows of a tile, and keys of a tile of the kernels."""


@dataclass(frozen=True, slots=True)
class FarGeometry:
    """Sizes of an adaptive call.

    Attributes
    ----------
    batch, heads_q, heads_kv, len_q, len_kv, dim_qk, dim_v : int
    causal : bool
        Row r sees keys up to r + offset; otherwise every key.
    offset : int
        At least 0.
    group, band, samples, drawn : int
        Query rows of a group; keys of the near field before a tile; sampled rows of a group;
        rows of a head that certify.
    """

    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    len_kv: int
    dim_qk: int
    dim_v: int
    causal: bool
    offset: int
    group: int
    band: int
    samples: int
    drawn: int

    @property
    def heads(self) -> int:
        """Query heads of all sequences."""
        return self.batch * self.heads_q

    @property
    def ratio(self) -> int:
        """Query heads of a key head."""
        return self.heads_q // self.heads_kv

    @property
    def tiles(self) -> int:
        """Query tiles of a head."""
        return -(-self.len_q // TILE)

    @property
    def tiles_per_group(self) -> int:
        """Query tiles of a group."""
        return self.group // TILE

    @property
    def groups(self) -> int:
        """Groups of a head."""
        return -(-self.tiles // self.tiles_per_group)

    @property
    def chunk_heads(self) -> int:
        """Query heads that one probe takes together: at most 128 columns of sampled rows."""
        most = max(1, 128 // self.samples)
        return max(h for h in range(1, most + 1) if self.ratio % h == 0)

    @property
    def units(self) -> int:
        """Probes of a group: chunks of query heads of all key heads."""
        return self.heads // self.chunk_heads

    @property
    def section_heads(self) -> int:
        """Key heads whose keys and values L2 holds together."""
        head_bytes = 2 * max(self.len_kv, 1) * (self.dim_qk + self.dim_v)
        return max(1, L2_SECTION_BYTES // head_bytes)

    @property
    def code_stride(self) -> int:
        """Bytes from one group's codes to the next."""
        return -(-self.len_kv // TILE) * TILE

    def near_first(self, tile: NDArray[np.int64]) -> NDArray[np.int64]:
        """First key of a tile's near field."""
        if not self.causal:
            return np.full_like(tile, self.len_kv // POOL_KEYS * POOL_KEYS)
        first = tile * TILE + self.offset - self.band
        return np.maximum(first, 0) // POOL_KEYS * POOL_KEYS

    def near_stop(self, tile: NDArray[np.int64]) -> NDArray[np.int64]:
        """End of a tile's near field."""
        if not self.causal:
            return np.full_like(tile, self.len_kv)
        return np.minimum(tile * TILE + TILE + self.offset, self.len_kv)

    def visible(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """Keys that a row sees."""
        if not self.causal:
            return np.full_like(row, self.len_kv)
        return np.minimum(row + self.offset + 1, self.len_kv)
