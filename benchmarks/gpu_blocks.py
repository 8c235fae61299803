"""Given block masks on one NVIDIA GPU: time against the share kept, beside FlexAttention.

    python benchmarks/gpu_blocks.py --out DIR       measure; writes gpu_blocks.json and .md

bf16 arrays of normal random numbers, 16,384 tokens, 8 heads; random key blocks for tiles of 128
queries, the diagonal kept. Dense, ours at every share and FlexAttention (compiled, the same
lists) take turns; figures are medians of all rounds, by CUDA events, of the kernels alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.backend import CudaBackend

LENGTH, HEADS, TILE = 16_384, 8, 128
CELLS = ((128, False), (128, True), (64, False), (64, True))
SIZES = (128, 64)
SHARES = (1.0, 0.5, 0.25, 0.1, 0.03)
Call = Callable[[], Any]


def kept_blocks(size: int, share: float, causal: bool) -> np.ndarray:
    """Random key blocks of each query tile, and those on the diagonal."""
    tiles, ratio = LENGTH // TILE, TILE // size
    kept = np.random.default_rng(0).random((tiles, LENGTH // size)) < share
    own = np.arange(LENGTH // size)[None] // ratio == np.arange(tiles)[:, None]
    kept |= own
    if causal:
        kept &= np.arange(LENGTH // size)[None] // ratio <= np.arange(tiles)[:, None]
    return np.asarray(kept)


def ours(problem: AttentionProblem, plan: Plan) -> tuple[Call, Any, float]:
    """Return a call of the kernel alone, its output, and the share of scores computed."""
    backend = CudaBackend()
    raw = backend.run(problem, plan)
    (launch,) = backend.last_launches()
    arrays = problem.query, problem.key, problem.value, raw.out, raw.lse
    pointers = (*(x.data_ptr() for x in arrays), 0, 0)
    stream = torch.cuda.current_stream().cuda_stream
    return lambda: launch.start(pointers, 0, stream), raw.out, raw.facts[0, 0].share


def flex(problem: AttentionProblem, kept: np.ndarray, causal: bool) -> Call:
    """Return a call of FlexAttention over the same blocks of 128 keys."""
    listed = torch.from_numpy(kept).cuda()
    cut = torch.eye(len(kept), dtype=torch.bool, device="cuda") & causal
    lists = []
    for part in (listed & cut, listed & ~cut):
        order = torch.argsort(~part, dim=-1, stable=True)
        lists += [part.sum(-1).int()[None, None], order.int()[None, None]]
    mask = BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=(TILE, TILE), seq_lengths=(LENGTH, LENGTH),
        mask_mod=(lambda b, h, q, k: q >= k) if causal else None,
    )  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(problem.query, problem.key, problem.value, block_mask=mask)


def milliseconds(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Return medians of bursts, the calls taking turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                call()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end) / 10)
    return {name: statistics.median(times) for name, times in found.items()}


def measure(rounds: int) -> list[dict[str, Any]]:
    """Return a row for every cell, size of blocks and share."""
    rows = []
    head = HeadPlan(qk="bf16", pv="bf16")
    for dim, causal in CELLS:
        q, k, v = (torch.randn(1, HEADS, LENGTH, dim, device="cuda").bfloat16() for _ in "qkv")
        mask = Mask.causal("top_left") if causal else None
        problem = AttentionProblem.from_arrays(q, k, v, mask=mask)
        dense, _, _ = ours(problem, Plan.uniform(problem, head))
        for size in SIZES:
            for share in SHARES:
                kept = kept_blocks(size, share, causal)
                plan = Plan.block_sparse(problem, kept, tile_q=TILE, tile_kv=size, head=head)
                call, out, computed = ours(problem, plan)
                calls = {"dense": dense, "ours": call}
                if size == TILE:
                    calls["flex"] = flex(problem, kept, causal)
                    away = (calls["flex"]().float() - out.float()).abs().max()
                    assert away <= 2.0**-6 * out.float().abs().max(), float(away)
                cell = {"dim": dim, "causal": causal, "block": size, "share": computed}
                rows.append(cell | milliseconds(calls, rounds))
                print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]], device: str) -> str:
    """Return the rows as a page."""
    lines = [
        f"# Block masks on {device}", "",
        "| dim | mask | block | share kept | ms | of dense | FlexAttention |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        theirs = f"{r['flex']:.3f}" if "flex" in r else "-"
        lines.append(
            f"| {r['dim']} | {'causal' if r['causal'] else 'full'} | {r['block']} |"
            f" {r['share']:.3f} | {r['ours']:.3f} | {r['ours'] / r['dense']:.3f} | {theirs} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows = measure(options.rounds)
    device = torch.cuda.get_device_name()
    (options.out / "gpu_blocks.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.out / "gpu_blocks.md").write_text(table(rows, device))


if __name__ == "__main__":
    main()
