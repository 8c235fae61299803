"""Tile choice of ``sm90_attn_fwd_f16``: candidates, which are legal, what they cost, the choice.

The candidates and their rates were measured on an H200 (docs/kernels/sm90_attn_fwd_f16.md); everything else is arithmetic on the
problem's shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["SMEM_LIMIT_BYTES", "Tile", "candidates", "choose", "padded_dim"]

SMEM_LIMIT_BYTES = 232_448
"""Dynamic shared memory one block may ask for on compute capability 9.0."""

_PANEL_COLUMNS = 64
_ELEMENT_BYTES = 2
_WORK_ITEM_BYTES = 48
_SOURCE_BYTES = 32


def padded_dim(dim: int) -> int:
    """Tile width for a head dim of 1 to 256: the next multiple of 64."""
    return max(1, math.ceil(dim / _PANEL_COLUMNS)) * _PANEL_COLUMNS


@dataclass(frozen=True, slots=True)
class Tile:
    """One specialisation of the kernel; the order of fields is that of the C++ ``Traits``.

    Attributes
    ----------
    dim_qk, dim_v : int
        Padded head dims: 64, 128, 192 or 256.
    consumers : int
        Warpgroups of 64 query rows: 2, 3 or 4.
    tile_n : int
        Keys of a tile, a multiple of 16.
    stages : int
        Buffers of key tiles, and as many of value tiles; a power of two.
    query_stages : int
        Buffers of query tiles: with 2, the next item's queries arrive during this item.
    ping_pong : bool
        Consumers take turns at the matrix unit.
    bias : bool
        Per-key addends to the scores.
    max_sources : int
        Sources that a work record has room for.
    """

    dim_qk: int
    dim_v: int
    consumers: int
    tile_n: int
    stages: int = 2
    query_stages: int = 1
    ping_pong: bool = False
    bias: bool = False
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
    def record_bytes(self) -> int:
        """Size of one work record."""
        return _WORK_ITEM_BYTES + _SOURCE_BYTES * self.max_sources

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory: queries, key and value stages, records, barriers."""
        queries = self.query_stages * self.tile_m * self.dim_qk
        keys_and_values = self.stages * self.tile_n * (self.dim_qk + self.dim_v)
        slots = 4 if self.query_stages == 1 else 8
        barriers = 2 * self.query_stages + 4 * self.stages + slots
        total = _ELEMENT_BYTES * (queries + keys_and_values) + slots * self.record_bytes + 8 * barriers
        return math.ceil(total / 128) * 128

    @property
    def accumulator_registers(self) -> int:
        """Registers a consumer thread keeps over the main loop: output, scores, probabilities."""
        return self.dim_v // 2 + self.tile_n // 2 + self.tile_n // 4

    def traits(self, dtype: str) -> tuple[str | int, ...]:
        """Template arguments for inputs of format ``bf16`` or ``f16``."""
        element = {"bf16": "adaattn::Bf16", "f16": "adaattn::F16"}[dtype]
        return (
            element,
            self.dim_qk,
            self.dim_v,
            self.consumers,
            self.tile_n,
            self.stages,
            self.query_stages,
            int(self.ping_pong),
            int(self.bias),
            self.max_sources,
        )


def candidates(dim_qk: int, dim_v: int) -> Iterator[Tile]:
    """Specialisations worth considering for padded head dims, legal or not."""
    for consumers, tile_n in ((2, 176), (2, 128), (2, 80), (3, 128)):
        yield Tile(dim_qk, dim_v, consumers, tile_n)


def choose(geometry: object, blocks: int) -> Tile:
    """Placeholder."""
    raise NotImplementedError
