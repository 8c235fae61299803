"""Sizes of ``smxx_attn_decode``: warps of a block, column tiles, blocks that share the keys.

Tuning changes speed and the order of summation, never a format.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from adaattn_cuda.jit.spec import KernelSpec, Trait

__all__ = [
    "CHUNK_KEYS",
    "COLUMNS",
    "DIMS",
    "STATS",
    "Specialisation",
    "has_copy_engine",
    "specialise",
    "splits_for",
]

STEM = "smxx_attn_decode"
CHUNK_KEYS = 64
"""Keys that a warp takes at a time."""
COLUMNS = 8
"""Packed query rows of a column tile; a block takes one or two tiles."""
DIMS = (64, 128, 256)
STATS = 3
SLICE_BYTES = 4096
SPLITS_MAX = 256
STAGES_MOST = {False: 5, True: 3}
"""Slots of a warp's ring, without and with a copy engine: more only crowds the memory."""
START_CHUNKS, MERGE_CHUNKS = 3.0, 0.02
"""Time of a block's start, and of merging one more split, in the time that a multiprocessor
takes for 64 keys."""


@dataclass(frozen=True, slots=True)
class Specialisation:
    """Template arguments of ``smxx_attn_decode::Traits``, in their order."""

    input: str
    key_code: str
    value_code: str
    dim: int
    tiles: int
    warps: int
    stages: int
    skip: bool
    bulk: bool

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor holds, 255 registers a thread."""
        return max(8 * 32 // self.threads, 1)

    @property
    def threads(self) -> int:
        """Threads of a block: with a copy engine, one warp more tells it what to copy."""
        return 32 * (self.warps + self.bulk)

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block: the larger of what is read and what is merged."""
        columns = self.tiles * COLUMNS
        slots = self.warps * (self.stages + (self.dim // 32 if self.skip else 0))
        barriers = _round_up(8 * (self.warps * (2 * self.stages + 1) + 1))
        queries = 2 * self.tiles * (self.dim // 8) * 32 * 4 + 3 * columns * 4
        reading = _round_up(barriers + queries) + slots * (SLICE_BYTES + 4 * self.dim)
        merging = barriers + self.warps * columns * (self.dim + STATS) * 4
        of_splits = SPLITS_MAX * columns + -(-columns * STATS // 4) * 4 + 4 * self.threads
        return max(reading, merging, barriers + 4 * of_splits)

    def spec(self, arch: str) -> KernelSpec:
        """Return the kernel to build."""
        codes = (f"adaattn::{STEM}::Code::{x}" for x in (self.key_code, self.value_code))
        sizes = (self.dim, self.tiles, self.warps, self.stages, self.skip, self.bulk)
        traits: tuple[Trait, ...] = (f"adaattn::Format::{self.input}", *codes, *sizes)
        return KernelSpec(STEM, traits, self.smem_bytes, arch)


def _round_up(size: int) -> int:
    return -(-size // 128) * 128


@cache
def specialise(
    dtype: str,
    key_code: str,
    value_code: str,
    dim: int,
    packed: int,
    skip: bool,
    smem_bytes: int,
    bulk: bool,
) -> Specialisation:
    """Specialisation for `packed` query rows per key/value head, within a block's memory.

    `bulk`: whether the device has a copy engine (Hopper and newer). Without `skip`, the values
    of a narrow chunk are all in the ring at once.
    """
    tiles = 2 if packed > COLUMNS and dim <= (64 if skip else 128) else 1
    fewest = (1 if skip else dim // 64) + bulk
    # A ninth warp leaves 168 registers a thread, which only the simplest kernels keep to.
    crowded = bulk and (tiles == 2 or skip or dim == 256)
    legal = [
        made
        for warps in ((7, 4, 2) if crowded else (8, 4, 2))
        for stages in range(max(STAGES_MOST[bulk], fewest), fewest - 1, -1)
        if (
            made := Specialisation(
                dtype, key_code, value_code, dim, tiles, warps, stages, skip, bulk
            )
        ).smem_bytes
        <= smem_bytes
    ]
    if bulk and not legal:  # one slot less will do without it
        return specialise(
            dtype, key_code, value_code, dim, packed, skip, smem_bytes, False
        )  # fmt: skip
    return max(legal, key=lambda s: (s.warps * s.stages, s.warps))


def has_copy_engine(arch: str) -> bool:
    """Whether an architecture copies contiguous memory by itself (``cp.async.bulk``)."""
    return int("".join(c for c in arch if c.isdigit())) >= 90


@cache
def splits_for(units: int, chunks: int, slots: int) -> int:
    """Blocks that share the keys of a unit, by the time that they take.

    Parameters
    ----------
    units : int
        Sequences times heads times row tiles.
    chunks : int
        Chunks of 64 keys of the longest sequence.
    slots : int
        Blocks that the device holds at once.
    """

    def cost(splits: int) -> float:
        waves = -(-units * splits // slots)
        return waves * (START_CHUNKS + -(-chunks // splits)) + MERGE_CHUNKS * splits

    return min(range(1, max(1, min(chunks, SPLITS_MAX)) + 1), key=cost)
