"""Tile sizes of ``sm80_attn_bwd``: candidates -> legal -> cost -> choose.

Tuning changes speed and the order of summation, never a format. The arithmetic here is the
kernel's own (Traits); the compiler checks that both agree on shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from adaattn_core.errors import UnsupportedError
from adaattn_cuda.jit.spec import SOFTCAP, KernelSpec
from adaattn_cuda.tuning.sm80_attn_fwd import (
    ARCHITECTURES,
    DIM_STEP,
    STORAGE_BYTES,
    WIDE_TILE_N,
)

__all__ = ["Specialisation", "outputs", "rows_spec", "shipped", "specialise"]

STEM = "sm80_attn_bwd"
ROWS_STEM = "smxx_attn_bwd_rows"
ROWS_THREADS, ROWS_PER_BLOCK = 256, 32

RECORD_BYTES = 16
REST_BYTES = 64
ACCUMULATOR_LIMIT = 176
UNALIGNED_ACCUMULATOR_LIMIT = 152
"""Registers of gradients, s and dp that compile to 255 without a spill. The addresses of rows
that are not aligned leave less room."""
GRADIENT_LIMITS = {2: 128, 4: 64}
"""Most registers of gradients of keys and values together, by the operand's bytes: where they
need more, each gets a launch of its own."""

OUTPUTS = ("query", "key_value", "key", "value", "statistics")


@dataclass(frozen=True, slots=True)
class Specialisation:
    """Template arguments of ``sm80_attn_bwd::Traits``, in their order.

    `output` is a name out of `OUTPUTS`; `multiply` is the operand format; `rule` is
    `SOFTCAP` under one, else 0.
    """

    input: str
    multiply: str
    output: str
    rows: int
    columns: int
    dim_qk: int
    dim_v: int
    warps: int
    stages: int
    array_mask: bool
    vectorised: bool
    rule: int = 0

    @property
    def owns_keys(self) -> bool:
        """Whether a block holds keys and values, and streams queries."""
        return self.output in ("key_value", "key", "value")

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        first, second = (_pitch(dim, self.multiply) for dim in (self.dim_qk, self.dim_v))
        own = self.rows * (first + second * (self.output not in ("value", "statistics")))
        streamed = self.columns * (first + second * (self.output != "statistics"))
        records = self.columns * RECORD_BYTES * self.owns_keys
        return own + self.stages * (streamed + records) + REST_BYTES

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def gradients(self) -> int:
        """Registers per thread of the gradients that are summed up."""
        dims = {
            "query": self.dim_qk,
            "key": self.dim_qk,
            "value": self.dim_v,
            "key_value": self.dim_qk + self.dim_v,
            "statistics": 0,
        }
        return self.rows // self.warps * dims[self.output] // 32

    @property
    def accumulators(self) -> int:
        """Registers per thread of gradients, s, dp, and the partial sums of 32-bit formats."""
        scores = self.rows // self.warps * self.columns // 32
        tiles = 1 if self.output in ("value", "statistics") else 2
        partial = 0
        if STORAGE_BYTES[self.multiply] == 4:
            # Split weights stand beside the partial sums of the products with them.
            partial = max(scores, self.rows // self.warps + scores)
        return self.gradients + tiles * scores + partial

    def blocks_per_multiprocessor(self, arch: str) -> int:
        """How many blocks fit a multiprocessor by shared memory and by registers."""
        by_smem = ARCHITECTURES[arch][1] * 1024 // (self.smem_bytes + 1024)
        return min(by_smem, 65536 // (self.threads * 256))

    def spec(self, arch: str) -> KernelSpec:
        """Return the kernel to build."""
        return KernelSpec(
            STEM,
            (
                f"adaattn::Format::{self.input}",
                f"adaattn::Format::{self.multiply}",
                OUTPUTS.index(self.output),
                self.rows,
                self.columns,
                self.dim_qk,
                self.dim_v,
                self.warps,
                self.stages,
                self.array_mask,
                self.vectorised,
            ),
            self.smem_bytes,
            arch,
            rule=self.rule,
        )


def _pitch(dim: int, format_name: str) -> int:
    return -(-dim * STORAGE_BYTES[format_name] // 128) * 128


def _padded(dim: int) -> int:
    return max(DIM_STEP, -(-dim // DIM_STEP) * DIM_STEP)


def outputs(multiply: str, dim_qk: int, dim_v: int) -> tuple[str, ...]:
    """Return the launches of a backward pass in an operand format, in their order."""
    both = 16 * (_padded(dim_qk) + _padded(dim_v)) // 32
    fits = both <= GRADIENT_LIMITS[STORAGE_BYTES[multiply]]
    rest = ("key_value",) if fits else ("key", "value")
    return ("statistics", "query", *rest)


@cache
def specialise(
    arch: str,
    input_format: str,
    multiply: str,
    output: str,
    dim_qk: int,
    dim_v: int,
    *,
    array_mask: bool = False,
    vectorised: bool = True,
    rule: int = 0,
) -> Specialisation:
    """Fastest legal specialisation by the cost below.

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
    legal = [
        s
        for s in _candidates(
            input_format, multiply, output, _padded(dim_qk), _padded(dim_v), array_mask,
            vectorised,
        )
        if _is_legal(s, arch)
    ]  # fmt: skip
    return replace(min(legal, key=lambda s: _cost(s, arch)), rule=rule)


def _candidates(
    input_format: str,
    multiply: str,
    output: str,
    dim_qk: int,
    dim_v: int,
    array_mask: bool,
    vectorised: bool,
) -> Iterator[Specialisation]:
    for rows, warps in ((128, 8), (64, 4), (32, 2), (16, 1)):
        for columns in (64, 32, 16):
            for stages in (2, 1):
                yield Specialisation(
                    input_format, multiply, output, rows, columns, dim_qk, dim_v, warps, stages,
                    array_mask, vectorised,
                )  # fmt: skip


def _is_legal(s: Specialisation, arch: str) -> bool:
    limit = ACCUMULATOR_LIMIT if s.vectorised else UNALIGNED_ACCUMULATOR_LIMIT
    return (
        s.accumulators <= limit
        and (STORAGE_BYTES[s.multiply] == 2 or s.columns <= WIDE_TILE_N)
        and s.smem_bytes <= ARCHITECTURES[arch][0] * 1024
        and s.blocks_per_multiprocessor(arch) >= 1
    )


def _cost(s: Specialisation, arch: str) -> tuple[float, ...]:
    """Relative time per score: what hides latency, then waits; see sm80_attn_fwd."""
    resident_warps = min(s.blocks_per_multiprocessor(arch) * s.warps, 8)
    waits = 1.0 + (0.2 if s.stages == 1 else 0.0) + 8 / s.columns + 8 / s.rows
    return ((8 / resident_warps) ** 0.5 * waits, -s.rows, s.smem_bytes)


def rows_spec(input_format: str, vectorised: bool, arch: str) -> KernelSpec:
    """Return the kernel that makes the rows' records."""
    return KernelSpec(ROWS_STEM, (f"adaattn::Format::{input_format}", vectorised), 0, arch)


SHIPPED_DIMS = {"bf16": (64, 128, 256), "f16": (64, 128, 256), "f32": (64, 128, 192)}


def shipped(arch: str) -> list[KernelSpec]:
    """Specialisations that `adaattn warmup` and `adaattn kernels` build for an architecture."""
    found = []
    for name, dims in SHIPPED_DIMS.items():
        found += [rows_spec(name, aligned, arch) for aligned in (True, False)]
        for dim in dims:
            for output in outputs(name, dim, dim):
                found.append(specialise(arch, name, name, output, dim, dim).spec(arch))
        for output in outputs(name, 128, 128):
            for more in ({"array_mask": True}, {"vectorised": False}):
                found.append(specialise(arch, name, name, output, 128, 128, **more).spec(arch))
    for output in outputs("bf16", 256, 256):  # Gemma-2's
        capped = specialise(arch, "bf16", "bf16", output, 256, 256, rule=SOFTCAP)
        found.append(capped.spec(arch))
    return found
