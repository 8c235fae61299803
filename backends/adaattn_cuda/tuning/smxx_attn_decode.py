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
HOPPER_SMEM_BYTES = 227 * 1024
SPLITS_MAX = 256
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

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor holds, 255 registers a thread."""
        return max(8 // self.warps, 1)

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block: the larger of what is read and what is merged."""
        columns = self.tiles * COLUMNS
        queries = 2 * self.tiles * (self.dim // 8) * 32 * 4 + 3 * columns * 4
        reading = -(-queries // 128) * 128 + self.warps * self.stages * SLICE_BYTES
        merging = self.warps * columns * (self.dim + STATS) * 4
        return max(reading, merging)

    def spec(self, arch: str) -> KernelSpec:
        """Return the kernel to build."""
        codes = (f"adaattn::{STEM}::Code::{x}" for x in (self.key_code, self.value_code))
        sizes = (self.dim, self.tiles, self.warps, self.stages, self.skip)
        traits: tuple[Trait, ...] = (f"adaattn::Format::{self.input}", *codes, *sizes)
        return KernelSpec(STEM, traits, self.smem_bytes, arch)


@cache
def specialise(
    dtype: str,
    key_code: str,
    value_code: str,
    dim: int,
    packed: int,
    skip: bool,
    smem_bytes: int = HOPPER_SMEM_BYTES,
) -> Specialisation:
    """Specialisation for `packed` query rows per key/value head, within a block's memory.

    Copies run ahead into the next chunk and never beyond it; without `skip`, the values of a
    narrow chunk are all there at once.
    """
    tiles = 2 if packed > COLUMNS and dim <= 128 else 1
    slices = dim // 64
    fewest, most = (2, 1 + slices) if skip else (1 + slices, min(5, 1 + 2 * slices))
    legal = [
        made
        for warps in (8, 4, 2)
        for stages in range(most, fewest - 1, -1)
        if (
            made := Specialisation(dtype, key_code, value_code, dim, tiles, warps, stages, skip)
        ).smem_bytes
        <= smem_bytes
    ]
    return max(legal, key=lambda s: (s.warps * s.stages, s.warps))


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
