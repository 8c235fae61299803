"""Decode steps over pages on a GPU, against PyTorch's flash attention and the copy rate.

    python benchmarks/gpu_decode.py --out docs/benchmarks [--heads DIR]

One row of 32 query heads over 8 key/value heads of dim 128: 16-bit pages, 8-bit pages. With
`--heads` (files of gpu_capture.py) also real caches of SmolLM2, with values skipped at the
threshold of a budget of 0.1. Everything in one run. As in a model, whose layers follow each
other, a time is that of one of many calls in a row, each over another cache of the same size:
no cache is in L2, the code is, and the host is ahead.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- its usual name
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaattn_core.decoding import DevicePages
from adaattn_core.plugins.registry import get_backend
from adaattn_cuda.tuning.smxx_attn_decode import CHUNK_KEYS as CHUNK
from adaattn_torch.cache.rounding import quantise

HEADS_Q, HEADS_KV, DIM, PAGE = 32, 8, 128, 128
SIZES = tuple((b, n) for b in (1, 16) for n in (8192, 32_768, 131_072) if b * n <= 2**20)
BUDGET = 0.1
CALLS = 12
WAIT_CYCLES = 1_500_000
"""About 0.8 ms: longer than so many calls keep the host."""
COLD_BYTES = 240_000_000
Pair = tuple[torch.Tensor, torch.Tensor]
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


def device_us(calls: Sequence[Callable[[], Any]], repeats: int = 9) -> float:
    """Median device time of a call, of calls in turn."""
    rounds = max(1, -(-CALLS // len(calls)))
    for call in calls:
        call()
    times = []
    for _ in range(repeats):
        torch.cuda._sleep(WAIT_CYCLES)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(rounds):
            for call in calls:
                call()
        events[1].record()
        times.append(events)
    torch.cuda.synchronize()
    spent = statistics.median(a.elapsed_time(b) for a, b in times)
    return 1e3 * spent / (rounds * len(calls))


def copies(size: int) -> int:
    """Return how many caches of `size` bytes do not fit into L2 together."""
    return max(2, -(-COLD_BYTES // size))


def host_us(call: Callable[[], Any], repeats: int = 300) -> float:
    """Mean host time of a call that waits for nothing."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    spent = time.perf_counter() - started
    torch.cuda.synchronize()
    return 1e6 * spent / repeats


def copy_rate() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / (1e-6 * device_us([lambda: target.copy_(source)]))


def on_pages(key: torch.Tensor, value: torch.Tensor, narrow: str) -> DevicePages:
    """Put (batch, heads, len, dim) keys and values on pages; `narrow`: ``""``, i8 or e4m3."""
    batch, heads, length, dim = key.shape
    wide = [x.reshape(-1, PAGE, dim) for x in (key, value)]
    table = torch.arange(batch * heads * length // PAGE, device="cuda", dtype=torch.int32)
    table = table.reshape(batch, heads, -1)
    codes: list[Any] = [None, None]
    if narrow:
        codes = [tuple(quantise(x, narrow)[:4]) for x in wide]
    else:
        table = -1 - table
    lengths = torch.full((batch,), length, device="cuda", dtype=torch.int32)
    return DevicePages(wide[0], wide[1], codes[0], codes[1], narrow or "i8", table.contiguous(),
                       lengths, torch.zeros_like(lengths), length)  # fmt: skip


def peers_us(query: torch.Tensor, caches: list[Pair]) -> dict[str, float]:
    """Time PyTorch's own attention, by backend."""
    found = {}
    for name, peer in PEERS.items():
        with sdpa_kernel([peer]):
            attend = partial(F.scaled_dot_product_attention, query, enable_gqa=True)
            calls = [partial(attend, key, value) for key, value in caches]
            found[f"{name}_us"] = device_us(calls)
    return found


def steps(
    backend: Any, query: torch.Tensor, caches: list[Pair], narrow: str, **how: float
) -> list[Callable[[], Any]]:
    """Decode steps over the caches, on pages; narrow ones are fewer bytes, so twice each."""
    pages = [on_pages(*cache, narrow) for cache in caches * (2 if narrow else 1)]
    return [partial(backend.decode, query, each, **how) for each in pages]


def synthetic(backend: Any, rate: float) -> list[dict[str, Any]]:
    """Time normally distributed caches of every size."""
    rows = []
    for batch, length in SIZES:
        query = torch.randn(batch, HEADS_Q, 1, DIM, device="cuda", dtype=torch.bfloat16)
        shape = (batch, HEADS_KV, length, DIM)
        moved = 4 * batch * HEADS_KV * length * DIM
        caches = [
            (torch.randn(shape, device="cuda", dtype=torch.bfloat16),
             torch.randn(shape, device="cuda", dtype=torch.bfloat16))
            for _ in range(copies(moved))
        ]  # fmt: skip
        row: dict[str, Any] = {"batch": batch, "len": length, "copy_us": 1e6 * moved / rate}
        row |= peers_us(query, caches)
        for name, narrow in (("wide", ""), ("i8", "i8"), ("e4m3", "e4m3")):
            calls = steps(backend, query, caches, narrow, scale=DIM**-0.5)
            row[f"{name}_us"] = device_us(calls)
            if name == "i8":
                row["host_us"] = host_us(calls[0])
            del calls
        rows.append(row)
        print(row, flush=True)
    return rows


def real(backend: Any, folder: Path) -> list[dict[str, Any]]:
    """Time captured caches, the layers side by side as a batch, the last row of each."""
    rows = []
    for path in sorted(folder.glob("qkv-*.pt")):
        saved = torch.load(path)
        layers = saved["layers"].values()
        query = torch.stack([x["q"][:, -1:] for x in layers]).cuda()
        key, value = (torch.stack([x[n] for x in layers]).cuda() for n in "kv")
        length = key.shape[2] // PAGE * PAGE
        key, value = (x[:, :, :length].contiguous() for x in (key, value))
        caches = [(key, value)]
        while len(caches) < copies(4 * key.numel()):
            caches.append((key.clone(), value.clone()))
        scale, group = key.shape[3] ** -0.5, query.shape[1] // key.shape[1]
        scores = query.double() @ key.double().repeat_interleave(group, 1).mT * scale
        exact = scores.softmax(-1) @ value.double().repeat_interleave(group, 1)
        lam = BUDGET / length
        weights = (scores - scores.logsumexp(-1, keepdim=True)).squeeze(2)
        runs = weights.reshape(*key.shape[:2], group, -1, CHUNK).amax((2, 4))
        unread = float((runs < math.log(lam)).double().mean())
        row: dict[str, Any] = {"file": path.stem, "len": length, "unread_at_most": unread}
        row |= peers_us(query, caches)
        for name, narrow, least in (
            ("wide", "", 0.0), ("i8", "i8", 0.0), ("wide_skip", "", lam), ("i8_skip", "i8", lam)
        ):  # fmt: skip
            calls = steps(backend, query, caches, narrow, scale=scale, lam=least)
            out, _, dropped = calls[0]()
            error = (out.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
            row[f"{name}_us"] = device_us(calls)
            row[f"{name}_error"] = float(error.median()), float(error.max())
            row[f"{name}_dropped"] = float(dropped.max())
            del calls
        rows.append(row)
        print(row, flush=True)
    return rows


def markdown(report: dict[str, Any]) -> str:
    """Render the tables."""
    lines = [
        "# Decode steps over pages",
        "",
        f"{report['device']}, PyTorch {report['torch']}; copy rate {report['copy'] / 1e12:.2f}"
        " TB/s in the same run. Command: `python benchmarks/gpu_decode.py --heads DIR --out"
        " docs/benchmarks`. Microseconds of device time, of calls in a row over"
        " different caches; host: what a step keeps the host, 300 in a row.",
        "",
        f"One row, {HEADS_Q} query heads over {HEADS_KV} key/value heads of dim {DIM}, bf16:",
        "",
        "| batch | keys | at copy rate | cuDNN | FlashAttention-2 | 16-bit pages | i8 pages |"
        " e4m3 pages | cuDNN over i8 | host |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in report["synthetic"]:
        lines.append(
            f"| {r['batch']} | {r['len'] // 1024}k | {r['copy_us']:.0f} | {r['cudnn_us']:.0f} |"
            f" {r['fa2_us']:.0f} | {r['wide_us']:.0f} | {r['i8_us']:.0f} | {r['e4m3_us']:.0f} |"
            f" {r['cudnn_us'] / r['i8_us']:.2f} | {r['host_us']:.0f} |"
        )
    if report["real"]:
        lines += [
            "",
            "SmolLM2-135M, 8 layers side by side, 9 query heads over 3 key/value heads of dim"
            " 64 (captured by `benchmarks/gpu_capture.py`); values skipped at the threshold of"
            f" a budget of {BUDGET} (`lam` = {BUDGET} / keys). Errors are those of a row,"
            " median and worst of 72 heads, against float64; dropped is the largest share of a"
            " row's mass whose values were not read. The last column: share of runs of 64 keys"
            " that weigh so little, by the exact scores.",
            "",
            "| cache | cuDNN | FlashAttention-2 | 16-bit | i8 | 16-bit, skipping |"
            " i8, skipping | cuDNN over it | dropped | error i8 | error i8, skipping |"
            " need not be read |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
    for r in report["real"]:
        lines.append(
            f"| {r['file']} | {r['cudnn_us']:.0f} | {r['fa2_us']:.0f} | {r['wide_us']:.0f} |"
            f" {r['i8_us']:.0f} | {r['wide_skip_us']:.0f} | {r['i8_skip_us']:.0f} |"
            f" {r['cudnn_us'] / r['i8_skip_us']:.2f} | {r['i8_skip_dropped']:.1e} |"
            f" {r['i8_error'][0]:.1e}, {r['i8_error'][1]:.1e} |"
            f" {r['i8_skip_error'][0]:.1e}, {r['i8_skip_error'][1]:.1e} |"
            f" {r['unread_at_most']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", type=Path, help="folder of gpu_capture.py's files")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    backend, rate = get_backend("cuda"), copy_rate()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy": rate,
        "synthetic": synthetic(backend, rate),
        "real": real(backend, options.heads) if options.heads else [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_decode.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "gpu_decode.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
