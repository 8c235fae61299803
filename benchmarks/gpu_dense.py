"""Dense forward attention on one GPU: this library, cuDNN, FlashAttention-2 and -3, in one run.

    python benchmarks/gpu_dense.py --out DIR             measure; writes gpu_dense.json and .md
    python benchmarks/gpu_dense.py --render FILE.json    table and plot from an earlier run

16,384 tokens in all, model width 2,048, bf16, random inputs, two sets used in turn. Contenders
take turns in random order, in bursts long enough for the clocks to settle, because these
kernels run at the card's power limit; every figure is a median over all rounds. cuDNN and
FlashAttention-2 are torch's own backends and are timed by CUDA events, as is the `forward` of
this library's backend, allocations included. FlashAttention-3 is the wheel flash_attn3_jax,
where it can be imported: JAX has its own stream, so it is timed by the host clock over a
burst.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaattn_bench.clock import Burst, by_events, by_host_together, in_turn, take_turns
from adaattn_bench.devices import measure_rates
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.backend import CudaBackend

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

TOKENS = 16_384
WIDTH = 2_048
DIMS = (64, 128, 256)
LENGTHS = (1024, 4096, 16_384)
OURS, CUDNN, FA2, FA3 = "adaattn", "cuDNN", "FA2", "FA3"
BARS = (CUDNN, FA3)
AGREEMENT_REL = 0.01
"""Largest relative difference from cuDNN that two bf16 kernels can have on these inputs."""

Cell = tuple[int, int, bool]
"""dim, len, causal"""


def cell_named(text: str) -> Cell:
    """Return the cell of a text like ``128:16384:full``."""
    dim, length, mask = text.split(":")
    return int(dim), int(length), {"full": False, "causal": True}[mask]


def cells() -> Iterator[Cell]:
    """Yield all of them."""
    for dim in DIMS:
        for causal in (False, True):
            for length in LENGTHS:
                yield dim, length, causal


def tflops(dim: int, length: int, causal: bool, milliseconds: float) -> float:
    """4 b h n^2 d floating-point operations, half of them under a causal mask."""
    heads = WIDTH // dim
    return 4 * TOKENS * heads * length * dim / (2 if causal else 1) / milliseconds / 1e9


# --- measuring --------------------------------------------------------------------------------
def torch_bursts(sets: list[list[Any]], causal: bool) -> dict[str, Burst]:
    """Attention of torch's cuDNN and FlashAttention-2 backends."""

    def call(backend: Any, arrays: list[Any]) -> Any:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(*arrays, is_causal=causal)

    found = {}
    for name, backend in (
        (CUDNN, SDPBackend.CUDNN_ATTENTION),
        (FA2, SDPBackend.FLASH_ATTENTION),
    ):
        found[name] = by_events(in_turn([lambda b=backend, x=x: call(b, x) for x in sets]))
    return found


def our_burst(sets: list[list[Any]], causal: bool) -> tuple[Burst, Callable[[], Any]]:
    """Return this library's forward pass on the caller's arrays, and one call to compare."""
    backend, mask = CudaBackend(), Mask.causal() if causal else None

    def compared() -> tuple[Any, str]:
        problem = AttentionProblem.from_arrays(*sets[0], mask=mask)
        plan = Plan.uniform(problem, HeadPlan(qk=problem.dtype, pv=problem.dtype))
        planned = backend.run(problem, plan).out
        out, _ = backend.forward(*sets[0], mask=mask)
        assert torch.equal(out, planned), "both doors start the same kernel"
        return out, backend.provenance()["kernels"]

    calls = [lambda x=x: backend.forward(*x, mask=mask) for x in sets]
    return by_events(in_turn(calls)), compared


def fa3_burst(dim: int, length: int, causal: bool) -> Burst | None:
    """FlashAttention-3 through JAX; None where the wheel cannot be imported."""
    try:
        jax = importlib.import_module("jax")
        flash = importlib.import_module("flash_attn3_jax")
    except ImportError:
        return None
    shape = (TOKENS // length, length, WIDTH // dim, dim)
    draw = [
        [jax.random.normal(key, shape, jax.numpy.bfloat16) for key in jax.random.split(seed, 3)]
        for seed in jax.random.split(jax.random.PRNGKey(random.getrandbits(31)), 2)
    ]
    call = jax.jit(lambda q, k, v: flash.flash_mha(q, k, v, is_causal=causal))
    try:
        call(*draw[0]).block_until_ready()
    except Exception as error:  # the wheel holds some head dims only, and says so in many ways
        print("FA3:", dim, str(error)[:200], file=sys.stderr)
        return None

    calls = in_turn([lambda x=x: call(*x) for x in draw])
    return by_host_together(calls, lambda out: out.block_until_ready())


def side_by_side(bursts: dict[str, Burst], rounds: int, burst_ms: float) -> dict[str, float]:
    """Median milliseconds of each contender; whoever fails ends the run."""
    timings = take_turns(bursts, rounds, burst_ms, most=sys.maxsize)
    if timings.failed:
        raise SystemExit(f"failed: {timings.failed}")
    return {name: summary.median for name, summary in timings.summaries().items()}


def ceilings() -> dict[str, float]:
    """Rates of a large bf16 matrix product (TFLOP/s) and of a large copy (TB/s)."""
    rates = measure_rates("cuda", "bfloat16")
    return {"matmul_tflops": rates.matmul / 1e12, "copy_tbps": rates.copy / 1e12}


def measure(rounds: int, burst_ms: float, revision: str, chosen: list[Cell]) -> dict[str, Any]:
    """Run everything."""
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "driver": subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=False,
        ).stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/gpu_dense.py",
        "revision": revision,
        "rounds": rounds,
        "burst_ms": burst_ms,
        "ceilings_before": ceilings(),
        "cells": [],
    }  # fmt: skip
    for dim, length, causal in chosen or cells():
        shape = (TOKENS // length, WIDTH // dim, length, dim)
        sets = [
            [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
            for _ in range(2)
        ]
        bursts = torch_bursts(sets, causal)
        bursts[OURS], ours = our_burst(sets, causal)
        out, kernels = ours()
        reference = torch.nn.functional.scaled_dot_product_attention(*sets[0], is_causal=causal)
        difference = float((out.float() - reference.float()).norm() / reference.float().norm())
        if not difference < AGREEMENT_REL:
            raise SystemExit(f"wrong result at {dim}, {length}, {causal}: {difference}")
        if (fa3 := fa3_burst(dim, length, causal)) is not None:
            bursts[FA3] = fa3
        times = side_by_side(bursts, rounds, burst_ms)
        cell = {
            "dim": dim, "len": length, "causal": causal, "milliseconds": times,
            "tflops": {name: tflops(dim, length, causal, ms) for name, ms in times.items()},
            "ratio": min(times[n] for n in BARS if n in times) / times[OURS],
            "kernel": kernels, "difference": difference,
        }  # fmt: skip
        report["cells"].append(cell)
        rates = {name: round(rate) for name, rate in cell["tflops"].items()}
        print(
            dim,
            length,
            "causal" if causal else "full",
            rates,
            f"{cell['ratio']:.3f}",
            flush=True,
        )
    report["ceilings_after"] = ceilings()
    ratios = [cell["ratio"] for cell in report["cells"]]
    report["geometric_mean"] = math.exp(statistics.fmean(math.log(r) for r in ratios))
    report["worst"] = min(ratios)
    return report


# --- reporting --------------------------------------------------------------------------------
def markdown(report: dict[str, Any]) -> str:
    """Table of a report."""
    before, after = report["ceilings_before"], report["ceilings_after"]
    names = (OURS, CUDNN, FA3, FA2)
    lines = [
        "# Dense forward attention on one GPU",
        "",
        f"{report['device']}, driver {report['driver']}, CUDA {report['cuda']},"
        f" PyTorch {report['torch']}, cuDNN {report['cudnn']}, {report['date']}."
        f" `{report['command']}` at revision {report['revision']}.",
        "",
        f"bf16, {TOKENS:,} tokens in all, model width {WIDTH:,}. TFLOP/s counts 4·b·h·n²·d,"
        f" half for causal; medians of {report['rounds']} rounds of {report['burst_ms']:g} ms"
        " bursts in random order.",
        "Ceilings of the same run, before and after: bf16 matmul 8192³"
        f" {before['matmul_tflops']:.0f} and {after['matmul_tflops']:.0f} TFLOP/s,"
        f" copy {before['copy_tbps']:.2f} and {after['copy_tbps']:.2f} TB/s.",
        "The card is at its power limit throughout, so the rates of all contenders, the matrix"
        " product's included, fall as it warms up: compare within a row.",
        "",
        "| head dim | mask | len | " + " | ".join(names) + " | best other / ours, time |",
        "|---|---|---|" + "---|" * (len(names) + 1),
    ]
    for cell in report["cells"]:
        rates = [f"{cell['tflops'][n]:.0f}" if n in cell["tflops"] else "-" for n in names]
        mask = "causal" if cell["causal"] else "full"
        lines.append(
            f"| {cell['dim']} | {mask} | {cell['len']:,} | "
            + " | ".join(rates)
            + f" | {cell['ratio']:.2f} |"
        )
    lines += [
        "",
        "Geometric mean of time(best of cuDNN, FA3) / time(ours):"
        f" **{report['geometric_mean']:.3f}**, worst cell {report['worst']:.3f}."
        " FA2 and cuDNN are PyTorch's own backends; FA3 is the wheel `flash_attn3_jax`.",
        "",
        "![TFLOP/s by head dim, mask and length](gpu_dense.png)",
        "",
    ]
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of TFLOP/s, one panel for each head dim and mask."""
    plt = importlib.import_module("matplotlib.pyplot")
    names = (OURS, CUDNN, FA3, FA2)
    colours = ("#1b6ca8", "#76b900", "#e07b39", "#b8b8b8")
    figure, axes = plt.subplots(
        2, len(DIMS), figsize=(11, 5.5), sharey=True, layout="constrained"
    )
    for column, dim in enumerate(DIMS):
        for row, causal in enumerate((False, True)):
            axis = axes[row][column]
            for k, (name, colour) in enumerate(zip(names, colours, strict=True)):
                heights = [
                    c["tflops"].get(name, 0.0)
                    for c in report["cells"]
                    if c["dim"] == dim and c["causal"] == causal
                ]
                places = [i + 0.2 * (k - 1.5) for i in range(len(heights))]
                axis.bar(places, heights, 0.19, color=colour, label=name)
            axis.set_xticks(range(len(LENGTHS)), [f"{n // 1024}k" for n in LENGTHS])
            axis.set_title(f"head dim {dim}, {'causal' if causal else 'full'}", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].legend(fontsize=8, frameon=False)
    figure.supylabel("TFLOP/s, bf16 forward")
    figure.suptitle(f"{report['device']}, {report['date']}", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, or render an earlier measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--render", type=Path)
    parser.add_argument(
        "--revision", default="unknown", help="of this repository, for the record"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--burst-ms", type=float, default=40.0)
    parser.add_argument(
        "--cells", nargs="*", type=cell_named, default=[], metavar="DIM:LEN:full|causal",
        help="only these, to stdout: nothing is written",
    )  # fmt: skip
    options = parser.parse_args()
    if options.render:
        report = json.loads(options.render.read_text())
        options.render.with_suffix(".md").write_text(markdown(report))
        plot(report, options.render.with_suffix(".png"))
        return
    report = measure(options.rounds, options.burst_ms, options.revision, options.cells)
    if options.cells:
        print(json.dumps(report, indent=1))
        return
    (options.out / "gpu_dense.json").write_text(json.dumps(report, indent=1))
    (options.out / "gpu_dense.md").write_text(markdown(report))
    print(f"geometric mean {report['geometric_mean']:.3f}, worst {report['worst']:.3f}")
    print({k: report[k] for k in ("ceilings_before", "ceilings_after")})


if __name__ == "__main__":
    main()
