"""Tile choice of ``sm90_attn_fwd_f16``: candidates -> legal -> cost -> choose.

The candidates and their rates were measured on an H200 (docs/kernels/sm90_attn_fwd_f16.md);
everything else is arithmetic on the problem's shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from adaattn_cuda.jit.spec import SINKS, SOFTCAP, KernelSpec
from adaattn_cuda.work.geometry import Geometry
from adaattn_cuda.work.records import ITEM, SOURCE

__all__ = [
    "FROM_TABLE",
    "SMEM_LIMIT_BYTES",
    "STEM",
    "Tile",
    "candidates",
    "choose",
    "cost",
    "is_legal",
    "listed",
    "padded_dim",
    "shipped",
]

STEM = "sm90_attn_fwd_f16"
ARCH = "sm_90a"

SMEM_LIMIT_BYTES = 232_448
"""Dynamic shared memory one block may ask for on compute capability 9.0."""

FROM_TABLE = 0
"""Room for sources of a kernel that reads them from the table: ``work::kFromTable``."""

_PANEL_COLUMNS = 64
_ELEMENT_BYTES = 2


def padded_dim(dim: int) -> int:
    """Tile width for a head dim of 1 to 256: the next multiple of 64."""
    return max(1, math.ceil(dim / _PANEL_COLUMNS)) * _PANEL_COLUMNS


@dataclass(frozen=True, slots=True)
class Tile:
    """One specialisation of the kernel; fields but `rule` stand as in the C++ ``Traits``.

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
    role : int
        ``Role`` of sm90_params.cuh: 0 dense, 1 work lists of planning kernels, 2 exact rows.
    max_sources : int
        Most sources of an item; `FROM_TABLE`: any number of runs of its head's own keys.
    skip : bool
        Items may ask for score-then-skip.
    rule : int
        ``ScoreRule`` of softmax/score_rule.cuh: 0 none, 1 softcap, 2 sinks, 3 both.
    """

    dim_qk: int
    dim_v: int
    consumers: int
    tile_n: int
    stages: int = 2
    query_stages: int = 1
    ping_pong: bool = False
    role: int = 0
    max_sources: int = 1
    skip: bool = False
    rule: int = 0

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
        """Size of an item with its sources in shared memory."""
        return ITEM.itemsize + SOURCE.itemsize * max(self.max_sources, 1)

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory: queries, key and value stages, records, barriers."""
        queries = self.query_stages * self.tile_m * self.dim_qk
        keys_and_values = self.stages * self.tile_n * (self.dim_qk + self.dim_v)
        slots = 4 if self.query_stages == 1 else 8
        with_biases = self.role == 1 and self.max_sources > 1
        biases = 4 * self.stages * self.tile_n if with_biases else 0
        barriers = 2 * self.query_stages + 4 * self.stages + 2 * slots
        operands = _ELEMENT_BYTES * (queries + keys_and_values)
        return (
            math.ceil((operands + slots * self.record_bytes + biases + 8 * barriers) / 128)
            * 128
        )

    @property
    def accumulator_registers(self) -> int:
        """Registers of a consumer thread for output, scores and probabilities."""
        return self.dim_v // 2 + self.tile_n // 2 + self.tile_n // 4

    def spec(self, dtype: str) -> KernelSpec:
        """KernelSpec for inputs of format ``bf16`` or ``f16``."""
        return KernelSpec(STEM, self.traits(dtype), self.smem_bytes, ARCH, rule=self.rule)

    def traits(self, dtype: str) -> tuple[str | int, ...]:
        """Template arguments for inputs of format ``bf16`` or ``f16``."""
        return (
            f"adaattn::Format::{dtype}",
            self.dim_qk,
            self.dim_v,
            self.consumers,
            self.tile_n,
            self.stages,
            self.query_stages,
            int(self.ping_pong),
            self.role,
            self.max_sources,
            int(self.skip),
        )


_TUNED = {
    (64, 64): (
        (1.00, Tile(64, 64, 3, 128, query_stages=2)),
        (0.87, Tile(64, 64, 2, 128, query_stages=2)),
    ),
    (128, 128): (
        (1.00, Tile(128, 128, 2, 128)),
        (1.02, Tile(128, 128, 2, 160, query_stages=2)),
    ),
    (256, 256): ((1.00, Tile(256, 256, 2, 80)),),
}
"""Measured candidates of a pair of padded dims; their rates on long sequences, relative."""

_SHIPPED_RULES = ((64, 64, SINKS), (128, 128, SOFTCAP), (256, 256, SOFTCAP))
_SHIPPED_DIMS = ((64, 64), (128, 128), (192, 192), (192, 128), (256, 256))

_LISTED_RATES = ((1.0, 128), (0.88, 64))
"""Relative rates of tiles of so many keys, where runs fill them."""

_TILE_NS = (176, 160, 144, 128, 112, 96, 80, 64)
_ACCUMULATOR_LIMIT = {2: 200, 3: 128, 4: 80}
"""By consumers: accumulator registers that leave enough for the rest without a spill."""

_CAPPED_ACCUMULATOR_LIMIT = {2: 200, 3: 112, 4: 64}
"""The same for kernels with a softcap, whose tanh takes registers of its own."""

_ITEM_OVERHEAD_KEYS = 64
"""Start and end of an item, in units of one key of every row."""


def is_legal(tile: Tile) -> bool:
    """Whether shared memory and registers suffice."""
    limits = _CAPPED_ACCUMULATOR_LIMIT if tile.rule & SOFTCAP else _ACCUMULATOR_LIMIT
    fits = tile.smem_bytes <= SMEM_LIMIT_BYTES
    return fits and tile.accumulator_registers <= limits[tile.consumers]


def candidates(dim_qk: int, dim_v: int, rule: int = 0) -> tuple[tuple[float, Tile], ...]:
    """(relative rate, tile) of the specialisations worth considering for two padded head dims.

    Pairs of dims that nobody measured get the widest legal tile of two consumers.
    """
    if rule:
        plain = ((rate, _ruled(tile, rule)) for rate, tile in candidates(dim_qk, dim_v))
        return tuple(found for found in plain if is_legal(found[1]))
    if (dim_qk, dim_v) in _TUNED:
        return _TUNED[dim_qk, dim_v]
    widest = next(t for n in _TILE_NS if is_legal(t := Tile(dim_qk, dim_v, 2, n)))
    return ((1.00, widest),)


def listed(dim_qk: int, dim_v: int) -> tuple[tuple[float, Tile], ...]:
    """(relative rate, tile) for runs of keys from the table; short tiles waste less."""
    stages = 2 if max(dim_qk, dim_v) <= 64 else 1
    tiles = (
        (rate, Tile(dim_qk, dim_v, 2, n, query_stages=stages, max_sources=FROM_TABLE))
        for rate, n in _LISTED_RATES
    )
    return tuple(rated for rated in tiles if is_legal(rated[1]))


def _ruled(tile: Tile, rule: int) -> Tile:
    """Return a tile under a score rule; a softcap spills where 80 keys fill the registers."""
    tile_n = 64 if rule & SOFTCAP and tile.tile_n == 80 else tile.tile_n
    return replace(tile, rule=rule, tile_n=tile_n)


def cost(geometry: Geometry, tile: Tile, rate: float, blocks: int) -> float:
    """Estimate the time of a tile, in scores of one block, to compare tiles of one geometry.

    The larger of the longest item and the mean load, where the work is uneven; whole rounds,
    where it is even.
    """
    loads = []
    for span in geometry.spans:
        _, first, stop = geometry.key_ranges(span, tile.tile_m)
        tiles = np.maximum(-(-(stop - first) // tile.tile_n), 1)
        item = tile.tile_m * (tiles * tile.tile_n + _ITEM_OVERHEAD_KEYS) / rate
        loads.append(np.repeat(item, len(geometry.heads_of(span))))
    items = np.concatenate(loads) if loads else np.zeros(0)
    if not len(items):
        return 0.0
    if items.min() == items.max():
        return float(math.ceil(len(items) / blocks) * items[0])
    return float(max(items.max(), items.sum() / blocks))


def choose(geometry: Geometry, blocks: int, rule: int = 0) -> Tile:
    """Return the cheapest candidate for a geometry.

    Parameters
    ----------
    geometry : Geometry
        Head dims from 1 to 256.
    blocks : int
        Multiprocessors of the device.
    rule : int
        The score rule that the kernel must know.
    """
    found = candidates(padded_dim(geometry.dim_qk), padded_dim(geometry.dim_v), rule)
    return min(found, key=lambda c: cost(geometry, c[1], c[0], blocks))[1]


def shipped() -> list[KernelSpec]:
    """Specialisations to compile ahead, for both input formats.

    Those of the head dims that models have, and of gpt-oss and Gemma-2 with their score rules;
    other pairs compile on first use.
    """
    tiles = [tile for dims in _SHIPPED_DIMS for _, tile in candidates(*dims)]
    tiles += [tile for args in _SHIPPED_RULES for _, tile in candidates(*args)]
    tiles += [tile for dims in _SHIPPED_DIMS for _, tile in listed(*dims)]
    return [tile.spec(dtype) for tile in tiles for dtype in ("bf16", "f16")]
