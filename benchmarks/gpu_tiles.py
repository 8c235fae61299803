"""Tiles of the attention kernels beside torch's SDPA: which specialisation is fastest where.

    python benchmarks/gpu_tiles.py [--family sm80 sm90] [--dims 64 128 256] [--out FILE]

What `adaattn_cuda.tuning` chooses from was measured so. Every contender of a cell takes its
turn in random order, in bursts long enough for the clocks to settle; 16,384 tokens, heads of
one model width. The tests hold every specialisation to float64 first (`tests/cuda`). Needs
torch with CUDA.

    python benchmarks/gpu_tiles.py --profile 128x160 --length 4096 [--causal]

launches one variant a few times, for a profiler to watch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaattn_bench.clock import Call, by_events, in_turn, take_turns
from adaattn_bench.devices import measure_rates
from adaattn_core.errors import AdaAttnError
from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.device import driver
from adaattn_cuda.device.views import view
from adaattn_cuda.kernels import sm80_attn_fwd as sm80
from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
from adaattn_cuda.kernels.task import Task, addresses
from adaattn_cuda.tuning import sm80_attn_fwd as tuning80
from adaattn_cuda.tuning import sm90_attn_fwd_f16 as tuning90

TOKENS, WIDTH = 16_384, 2_048
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
CELLS = [(length, causal) for length in (1024, 4096, 16_384) for causal in (False, True)]
BURST_MS, ROUNDS = 40.0, 4

SM80 = {
    ("bf16", 64): [(128, 96, 4, 2), (128, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 2)],
    ("bf16", 128): [(128, 64, 4, 2), (128, 64, 4, 1), (128, 64, 8, 2), (128, 128, 8, 2),
                    (128, 32, 4, 2), (64, 64, 4, 2), (64, 64, 2, 2)],
    ("bf16", 256): [(128, 64, 8, 1), (128, 64, 8, 2), (64, 64, 4, 1), (128, 32, 8, 2)],
    ("f32", 64): [(128, 64, 8, 2), (64, 64, 4, 2), (128, 128, 8, 1), (128, 64, 8, 1)],
    ("f32", 128): [(128, 64, 8, 2), (64, 64, 4, 1), (128, 64, 8, 1), (64, 64, 4, 2)],
    ("f32", 256): [],
}  # fmt: skip
"""Variants beside the chosen one: tile_m, tile_n, warps, stages."""


def contenders(
    family: str, dtype: str, length: int, dim: int, causal: bool
) -> Iterator[tuple[str, Call]]:
    """Name and call of everything that is timed in a cell."""
    shape = (TOKENS // length, WIDTH // dim, length, dim)
    sets = [
        [torch.randn(shape, device="cuda").to(DTYPES[dtype]) for _ in range(3)]
        for _ in range(2)
    ]
    kinds = (
        [SDPBackend.EFFICIENT_ATTENTION]
        if dtype == "f32"
        else [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    )
    for kind in kinds:
        yield kind.name.lower(), in_turn([torch_call(kind, three, causal) for three in sets])
    variants = sm90_variants(dim) if family == "sm90" else sm80_variants(dtype, dim)
    for name, chosen in variants:
        try:
            calls = [own_call(family, three, causal, chosen) for three in sets]
        except AdaAttnError as error:
            print(f"left out: {name}: {error.got}", file=sys.stderr)
            continue
        yield name, in_turn(calls)


def torch_call(kind: SDPBackend, three: list[torch.Tensor], causal: bool) -> Call:
    """Torch's own attention on one of its backends."""

    def call() -> torch.Tensor:
        with sdpa_kernel(kind):
            return torch.nn.functional.scaled_dot_product_attention(*three, is_causal=causal)

    return call


def own_call(family: str, three: list[torch.Tensor], causal: bool, chosen: Any) -> Call:
    """One specialisation, ready to be started again."""
    mask = Mask.causal("top_left") if causal else None
    problem = AttentionProblem.from_arrays(*three, mask=mask)
    out = torch.empty_like(three[0])
    lse = torch.empty(three[0].shape[:3], device="cuda")
    arrays = (*(view(x) for x in (*three, out, lse)), None, None)
    task = Task.of(problem, arrays, (problem.dtype, problem.dtype), None)
    stream = torch.cuda.current_stream().cuda_stream
    launch = (
        sm90.launch(task, stream, chosen)
        if family == "sm90"
        else sm80.Sm80Launch(task, stream, chosen)
    )
    where = addresses(arrays)
    keep = (three, out, lse)  # the launch holds addresses only
    return lambda: (launch.start(where, 0, stream), keep)


def sm90_variants(dim: int) -> list[tuple[str, tuning90.Tile]]:
    """Return the measured candidates, and one with turns at the matrix unit."""
    tiles = [tile for _, tile in tuning90.candidates(dim, dim)]
    tiles.append(replace(tiles[0], ping_pong=True))
    return [
        (f"{t.tile_m}x{t.tile_n} q{t.query_stages}{' turns' * t.ping_pong}", t) for t in tiles
    ]


def sm80_variants(dtype: str, dim: int) -> list[tuple[str, tuning80.Specialisation]]:
    """Return the chosen one, then variants of it."""
    arch = driver.device_facts(0).arch
    base = tuning80.specialise(arch, dtype, dtype, dtype, dim, dim)
    made = [
        replace(base, tile_m=m, tile_n=n, warps=w, stages=s) for m, n, w, s in SM80[dtype, dim]
    ]
    return [
        (f"{s.tile_m}x{s.tile_n} w{s.warps} s{s.stages}", s)
        for s in dict.fromkeys([base, *made])
    ]


def side_by_side(calls: dict[str, Call]) -> dict[str, float]:
    """Median milliseconds of every contender."""
    bursts = {name: by_events(call) for name, call in calls.items()}
    timings = take_turns(bursts, ROUNDS, BURST_MS, most=sys.maxsize)
    for name, why in timings.failed.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    return {name: summary.median for name, summary in timings.summaries().items()}


def main() -> None:
    """Time, and print one JSON line per contender and cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", nargs="*", choices=["sm80", "sm90"], default=["sm90"])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--dims", type=int, nargs="*", default=[128, 64, 256])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", help="part of a variant's name")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--causal", action="store_true")
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def say(**row: Any) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    for family, dim in itertools.product(chosen.family, chosen.dims):
        if chosen.profile:
            for name, call in contenders(
                family, chosen.dtype, chosen.length, dim, chosen.causal
            ):
                if chosen.profile in name:
                    by_events(call)(4)
            continue
        say(
            device=torch.cuda.get_device_name(),
            matmul_tflops=round(measure_rates("cuda", "bfloat16").matmul / 1e12),
        )
        for length, causal in CELLS:
            found = side_by_side(dict(contenders(family, chosen.dtype, length, dim, causal)))
            flops = 4 * TOKENS * length * WIDTH / (2 if causal else 1)
            for name, ms in found.items():
                say(
                    family=family, dtype=chosen.dtype, dim=dim, length=length, causal=causal,
                    what=name, ms=round(ms, 4), tflops=round(flops / ms / 1e9, 1),
                )  # fmt: skip
    if chosen.out:
        chosen.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
