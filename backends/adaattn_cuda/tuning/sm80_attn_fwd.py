"""Tile sizes of the sm80 family: candidates -> legal -> cost -> choose.

Tuning changes speed and the order of summation, never a format. The arithmetic here is the
kernel's own (sm80_tile.cuh, Traits); the compiler checks that both agree on shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from adaattn_core.errors import UnsupportedError
from adaattn_cuda.jit.spec import KernelSpec

__all__ = ["ARCHITECTURES", "DIM_LIMIT", "Specialisation", "shipped", "specialise"]

STEM = "sm80_attn_fwd"
DIM_LIMIT = 256
DIM_STEP = 32
"""Head dimensions are padded to a multiple of this in shared memory."""

ARCHITECTURES = {
    "sm_80": (163, 164),
    "sm_86": (99, 100),
    "sm_87": (163, 164),
    "sm_89": (99, 100),
    "sm_90a": (227, 228),
    "sm_100": (227, 228),
    "sm_103": (227, 228),
    "sm_120": (99, 100),
}
"""Shared memory in KiB: most of one block, and all of one multiprocessor (1 KiB per block is
reserved by the driver). Source: CUDA C++ programming guide, table of technical
specifications."""

SOURCE_BYTES = 128
STORAGE_BYTES = {"bf16": 2, "f16": 2, "tf32": 4, "f32": 4}
ACCUMULATOR_LIMIT = 192
TIGHT_ACCUMULATOR_LIMIT = 160
OUTPUT_LIMIT = 128
SCORE_LIMIT = 96
"""Registers of S and O together, and of each alone, that compile to 255 without a spill.
Array masks (their addresses) and a single stage (its second wait) leave less room."""

LISTED_WIDE_LIMIT = 152
"""The same for 32-bit formats whose items come in tables."""

WIDE_TILE_N = 64
"""Most keys of a tile in 32-bit formats: the tensor core truncates within a tile's partial sum,
so a longer one errs more (measured at dim 64: 0.7e-6 with 64 keys, 1.1e-6 with 128)."""


@dataclass(frozen=True, slots=True)
class Specialisation:
    """Template arguments of ``sm80_attn_fwd::Traits`` in their order, and the score rule.

    `listed`, the last of the arguments, says that items and sources come in tables.
    """

    input: str
    qk: str
    pv: str
    tile_m: int
    tile_n: int
    dim_qk: int
    dim_v: int
    warps: int
    stages: int
    array_mask: bool
    vectorised: bool
    rule: int = 0
    listed: bool = False

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        query = self.tile_m * _pitch_bytes(self.dim_qk, self.qk)
        key = self.tile_n * _pitch_bytes(self.dim_qk, self.qk)
        value = self.tile_n * _pitch_bytes(self.dim_v, self.pv)
        return query + self.stages * (key + value) + SOURCE_BYTES

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def score_registers(self) -> int:
        """Registers per thread that S takes."""
        return self.tile_m // self.warps * self.tile_n // 32

    @property
    def output_registers(self) -> int:
        """Registers per thread that O takes."""
        return self.tile_m // self.warps * self.dim_v // 32

    @property
    def accumulators(self) -> int:
        """Registers per thread of S, O, and the partial sums of 32-bit formats."""
        partial_scores = self.score_registers if STORAGE_BYTES[self.qk] == 4 else 0
        partial_output = self.tile_m // self.warps if STORAGE_BYTES[self.pv] == 4 else 0
        partial = max(partial_scores, partial_output)
        return self.output_registers + self.score_registers + partial

    def blocks_per_multiprocessor(self, arch: str) -> int:
        """How many blocks fit a multiprocessor by shared memory and by registers."""
        by_smem = ARCHITECTURES[arch][1] * 1024 // (self.smem_bytes + 1024)
        by_registers = 65536 // (self.threads * 256)
        return min(by_smem, by_registers)

    def spec(self, arch: str) -> KernelSpec:
        """Return the kernel to build."""
        formats = (f"adaattn::Format::{name}" for name in (self.input, self.qk, self.pv))
        return KernelSpec(
            STEM,
            (
                *formats,
                self.tile_m,
                self.tile_n,
                self.dim_qk,
                self.dim_v,
                self.warps,
                self.stages,
                self.array_mask,
                self.vectorised,
                *((True,) if self.listed else ()),
            ),
            self.smem_bytes,
            arch,
            rule=self.rule,
            params="ListedParams" if self.listed else "",
        )


def _pitch_bytes(dim: int, format_name: str) -> int:
    return -(-dim * STORAGE_BYTES[format_name] // 128) * 128


def _padded(dim: int) -> int:
    return max(DIM_STEP, -(-dim // DIM_STEP) * DIM_STEP)


@cache
def specialise(
    arch: str,
    input_format: str,
    qk: str,
    pv: str,
    dim_qk: int,
    dim_v: int,
    *,
    array_mask: bool = False,
    vectorised: bool = True,
    rule: int = 0,
    listed: bool = False,
) -> Specialisation:
    """Fastest legal specialisation by the cost below.

    `rule` is a ``ScoreRule`` of softmax/score_rule.cuh; it takes no part in the choice.

    Raises
    ------
    UnsupportedError
        If the architecture is older than Ampere or unknown.
    """
    if arch not in ARCHITECTURES:
        raise UnsupportedError(
            got=f"architecture {arch}",
            needed=f"one of {', '.join(ARCHITECTURES)}",
            do='use backend="numpy" on this machine',
            arch=arch,
        )
    candidates = _candidates(
        input_format, qk, pv, _padded(dim_qk), _padded(dim_v), array_mask, vectorised
    )
    # Whether items are listed decides what is legal.
    candidates = (replace(s, listed=listed) for s in candidates)
    legal = [s for s in candidates if _is_legal(s, arch)]
    return replace(min(legal, key=lambda s: _cost(s, arch)), rule=rule)


def _is_legal(s: Specialisation, arch: str) -> bool:
    narrow = STORAGE_BYTES[s.qk] == 2 and STORAGE_BYTES[s.pv] == 2
    tight = s.array_mask or s.stages == 1
    limit = TIGHT_ACCUMULATOR_LIMIT if tight else ACCUMULATOR_LIMIT
    return (
        s.accumulators <= limit
        and s.score_registers <= SCORE_LIMIT
        and s.output_registers <= OUTPUT_LIMIT
        and (narrow or s.tile_n <= WIDE_TILE_N)
        and (not s.listed or _is_lean(s, narrow))
        and s.smem_bytes <= ARCHITECTURES[arch][0] * 1024
        and s.blocks_per_multiprocessor(arch) >= 1
    )


def _is_lean(s: Specialisation, narrow: bool) -> bool:
    """Whether registers are left for the walk over sources, and runs fill the key tiles."""
    fits = s.accumulators <= (TIGHT_ACCUMULATOR_LIMIT if narrow else LISTED_WIDE_LIMIT)
    return s.tile_m // s.warps == 16 and s.tile_n <= (WIDE_TILE_N if narrow else 32) and fits


def _candidates(
    input_format: str,
    qk: str,
    pv: str,
    dim_qk: int,
    dim_v: int,
    array_mask: bool,
    vectorised: bool,
) -> Iterator[Specialisation]:
    narrow = STORAGE_BYTES[qk] == 2 and STORAGE_BYTES[pv] == 2
    simple = vectorised and not array_mask and input_format == qk
    for tile_m, warps in ((128, 4), (128, 8), (64, 4), (32, 2)):
        # 32 rows per warp halve the reads of K and V from shared memory, at twice the
        # registers: worth it, and possible without a spill, in the plain 16-bit kernels only.
        if tile_m // warps == 32 and not (narrow and simple):
            continue
        for tile_n in (128, 96, 64, 32, 16):
            for stages in (2, 1):
                yield Specialisation(
                    input_format, qk, pv, tile_m, tile_n, dim_qk, dim_v, warps, stages,
                    array_mask, vectorised,
                )  # fmt: skip


def _cost(s: Specialisation, arch: str) -> tuple[float, ...]:
    """Relative time per score: shared-memory reads, then what hides latency.

    Per score a warp reads K and V once for its rows; fewer resident warps hide less of the
    softmax behind other warps' products; a single stage waits twice per key tile.
    """
    reads = 1 + 16 / (s.tile_m // s.warps)
    resident_warps = min(s.blocks_per_multiprocessor(arch) * s.warps, 8)
    idle = 8 / resident_warps
    waits = 1.0 + (0.1 if s.stages == 1 else 0.0) + 8 / s.tile_n
    return (reads * idle**0.5 * waits, -s.tile_m, s.smem_bytes)


SHIPPED_DIMS = (64, 128, 256)


def shipped(arch: str) -> list[KernelSpec]:
    """Specialisations that `adaattn warmup` and `adaattn kernels` build for an architecture.

    The plain kernels of the usual head dimensions, and the variants for array masks and for
    rows that are not aligned; anything else is compiled when it is first asked for.
    """
    plain = [("bf16",) * 3, ("f16",) * 3, ("f32",) * 3, ("f32", "tf32", "tf32")]
    chosen = [specialise(arch, *formats, dim, dim) for formats in plain for dim in SHIPPED_DIMS]
    for formats in plain:
        chosen.append(specialise(arch, *formats, 128, 128, array_mask=True))
        chosen.append(specialise(arch, *formats, 128, 128, vectorised=False))
        chosen += [specialise(arch, *formats, dim, dim, listed=True) for dim in SHIPPED_DIMS]
        chosen.append(specialise(arch, *formats, 128, 128, listed=True, array_mask=True))
    return [s.spec(arch) for s in chosen]
