"""Dense attention by operand formats on one Hopper GPU: speed, quantisation included; error.

    python benchmarks/gpu_formats.py --out DIR      measure; writes gpu_formats.json and .md

bf16 arrays of normal random numbers, 16,384 tokens of width 2,048 in all (65,536 of width 1,024
in the longest cell). Formats and torch's cuDNN backend take turns in random order; figures are
medians of all rounds, by CUDA events. A call quantises, multiplies and writes; memory for codes
is allocated beforehand. Errors are relative Frobenius errors of 256 rows against float64.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaattn_bench.clock import Call, by_events
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.backend import CudaBackend

PAIRS = (("bf16", "bf16"), ("i8", "bf16"), ("bf16", "e4m3"), ("i8", "e4m3"))
CELLS = (
    (64, 1024, False), (64, 4096, False), (64, 16_384, False), (64, 16_384, True),
    (128, 1024, False), (128, 4096, False), (128, 4096, True), (128, 16_384, False),
    (128, 16_384, True), (128, 65_536, True),
)  # fmt: skip
CUDNN = "cuDNN bf16"
ROWS = 256


def arrays(dim: int, length: int) -> list[Any]:
    """Query, key and value."""
    width = 2048 if length <= 16_384 else 1024
    shape = (max(1, 16_384 // length), width // dim, length, dim)
    return [torch.randn(shape, device="cuda").bfloat16() for _ in range(3)]


def ours(sets: list[Any], causal: bool, pair: tuple[str, str]) -> tuple[Call, Any, str]:
    """Return a call of one pair of formats, its output, and which kernel it is."""
    backend = CudaBackend()
    mask = Mask.causal("top_left") if causal else None
    problem = AttentionProblem.from_arrays(*sets, mask=mask)
    raw = backend.run(problem, Plan.uniform(problem, HeadPlan(qk=pair[0], pv=pair[1])))
    (launch,) = backend.last_launches()
    scratch = [
        torch.empty(size, dtype=torch.uint8, device="cuda") for size in launch.scratch_bytes
    ]
    pointers = tuple(x.data_ptr() for x in (*sets, raw.out, raw.lse))
    pointers += (0, 0, *(x.data_ptr() for x in scratch))
    stream = torch.cuda.current_stream().cuda_stream

    def call() -> tuple[Any, Any]:
        launch.start(pointers, 0, stream)
        return raw, scratch

    return call, raw.out, launch.name


def cudnn(sets: list[Any], causal: bool) -> Call:
    """Return a call of torch's cuDNN backend."""

    def call() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(*sets, is_causal=causal)

    return call


def error(sets: list[Any], causal: bool, out: Any) -> float:
    """Return the relative Frobenius error of the last rows of the first head."""
    query, key, value = (x[0, 0].double() for x in sets)
    length = len(key)
    rows = torch.arange(length - min(ROWS, length), length, device="cuda")
    scores = query[rows] @ key.T / query.shape[1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.arange(length, device="cuda") > rows[:, None], -1e300)
    truth = torch.softmax(scores, -1) @ value
    return float((out[0, 0, rows].double() - truth).norm() / truth.norm())


def measure_cell(dim: int, length: int, causal: bool, rounds: int) -> dict[str, Any]:
    """Time one cell."""
    sets = arrays(dim, length)
    batch, heads = sets[0].shape[:2]
    work = 4 * batch * heads * length**2 * dim / (2 if causal else 1)
    calls: dict[str, Call] = {CUDNN: cudnn(sets, causal)}
    found: dict[str, dict[str, Any]] = {CUDNN: {}}
    for pair in PAIRS:
        name = "/".join(pair)
        calls[name], out, kernel = ours(sets, causal, pair)
        found[name] = {"error": error(sets, causal, out), "kernel": kernel}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            times[name] += by_events(calls[name])(6)[2:]
    for name, own in times.items():
        found[name]["ms"] = statistics.median(own)
        found[name]["tflops"] = work / found[name]["ms"] / 1e9
    return {"dim": dim, "len": length, "causal": causal, "found": found}


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of a result."""
    names = ["/".join(pair) for pair in PAIRS]
    lines = [
        f"{result['device']}, {result['date']}; TFLOP/s with quantisation (and times cuDNN's in"
        " bf16), relative error.",
        "",
        "| head dim, len, mask | cuDNN bf16 | " + " | ".join(names) + " |",
        "|---" * (2 + len(names)) + "|",
    ]
    for cell in result["cells"]:
        found = cell["found"]
        base = found[CUDNN]["tflops"]
        mask = "causal" if cell["causal"] else "full"
        row = [f"{cell['dim']}, {cell['len']:,}, {mask}", f"{base:.0f}"]
        for name in names:
            rate = found[name]["tflops"]
            row.append(f"{rate:.0f} ({rate / base:.2f}), {found[name]['error']:.4f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, nargs="*", help="numbers of cells; default all")
    options = parser.parse_args()
    chosen = [CELLS[i] for i in options.cells] if options.cells else CELLS
    result = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "cells": [measure_cell(*cell, options.rounds) for cell in chosen],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_formats.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "gpu_formats.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
