"""Backward pass of dense attention on one GPU: this library, cuDNN, FlashAttention-2 and -3.

    python benchmarks/gpu_backward.py --out DIR           measure; writes gpu_backward.json, .md
    python benchmarks/gpu_backward.py --render FILE.json  table and plot from an earlier run

16,384 tokens in all, model width 2,048, bf16, random inputs, two sets used in turn, contenders
in turn as in gpu_dense.py. A call is given the output and its lse and returns three gradients,
allocations included. cuDNN and FlashAttention-2 are torch's own backends through autograd;
FlashAttention-3 is the wheel flash_attn3_jax, where it can be imported, timed by the host clock
over a burst.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import platform
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaattn_bench.clock import Burst, by_events, by_host_together, in_turn
from adaattn_core.mask import Mask
from adaattn_cuda.backend import CudaBackend
from gpu_dense import (
    CUDNN,
    FA2,
    FA3,
    OURS,
    TOKENS,
    WIDTH,
    Cell,
    ceilings,
    cell_named,
    side_by_side,
)

FIXED = "adaattn, deterministic"
BARS = (CUDNN, FA3)
CELLS: tuple[Cell, ...] = tuple(
    (dim, length, causal)
    for dim in (64, 128)
    for causal in (False, True)
    for length in (1024, 4096, 16_384)
)
AGREEMENT_REL = 0.02
"""Largest relative difference from cuDNN that two bf16 backward passes can have here."""


def tflops(dim: int, length: int, causal: bool, milliseconds: float) -> float:
    """Five products of 2 b h n^2 d operations, half of them under a causal mask."""
    products = 10 * TOKENS * (WIDTH // dim) * length * dim
    return products / (2 if causal else 1) / milliseconds / 1e9


def our_bursts(sets: list[list[Any]], causal: bool) -> dict[str, Burst]:
    """Time our own backward pass, and the same with its additions in one order."""
    backend, mask = CudaBackend(), Mask.causal() if causal else None
    saved = [backend.forward(*x[:3], mask=mask) for x in sets]

    def call(x: list[Any], kept: tuple[Any, Any], fixed: bool) -> Any:
        out, lse = kept
        return backend.backward(*x, out=out, lse=lse, mask=mask, deterministic=fixed)

    pairs = list(zip(sets, saved, strict=True))
    return {
        name: by_events(in_turn([
            lambda x=x, kept=kept, fixed=fixed: call(x, kept, fixed) for x, kept in pairs
        ]))
        for name, fixed in ((OURS, False), (FIXED, True))
    }  # fmt: skip


def torch_bursts(
    sets: list[list[Any]], causal: bool
) -> tuple[dict[str, Burst], list[torch.Tensor]]:
    """Time backward passes of cuDNN and FlashAttention-2; return cuDNN's gradients too."""
    found: dict[str, Burst] = {}
    gradients: list[torch.Tensor] = []
    for name, backend in (
        (FA2, SDPBackend.FLASH_ATTENTION),
        (CUDNN, SDPBackend.CUDNN_ATTENTION),
    ):
        graphs = []
        for *inputs, grad in sets:
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            with sdpa_kernel(backend):
                out = torch.nn.functional.scaled_dot_product_attention(
                    *leaves, is_causal=causal
                )
            graphs.append((out, leaves, grad))

        def call(out: Any, leaves: Any, grad: Any) -> Any:
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

        found[name] = by_events(in_turn([lambda g=g, call=call: call(*g) for g in graphs]))
        gradients = list(call(*graphs[0]))
    return found, gradients


def fa3_burst(dim: int, length: int, causal: bool) -> Burst | None:
    """FlashAttention-3's backward pass through JAX; None where the wheel is missing."""
    try:
        jax = importlib.import_module("jax")
        flash = importlib.import_module("flash_attn3_jax")
    except ImportError:
        return None
    shape = (TOKENS // length, length, WIDTH // dim, dim)
    keys = jax.random.split(jax.random.PRNGKey(random.getrandbits(31)), 4)
    q, k, v, g = (jax.random.normal(key, shape, jax.numpy.bfloat16) for key in keys)
    try:
        _, pull = jax.vjp(lambda q, k, v: flash.flash_mha(q, k, v, is_causal=causal), q, k, v)
        call = jax.jit(lambda pull, g: pull(g))
        call(pull, g)[0].block_until_ready()
    except Exception as error:  # the wheel holds some head dims only, and says so in many ways
        print("FA3:", dim, str(error)[:200], file=sys.stderr)
        return None

    return by_host_together(lambda: call(pull, g), lambda found: found[0].block_until_ready())


def measure(rounds: int, burst_ms: float, revision: str, chosen: list[Cell]) -> dict[str, Any]:
    """Run everything."""
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/gpu_backward.py",
        "revision": revision,
        "rounds": rounds,
        "burst_ms": burst_ms,
        "ceilings_before": ceilings(),
        "cells": [],
    }
    for dim, length, causal in chosen or CELLS:
        shape = (TOKENS // length, WIDTH // dim, length, dim)
        sets = [
            [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
            for _ in range(2)
        ]
        bursts, reference = torch_bursts(sets, causal)
        bursts |= our_bursts(sets, causal)
        mask = Mask.causal() if causal else None
        ours = CudaBackend().backward(*sets[0], mask=mask)
        difference = max(
            float((a.float() - b.float()).norm() / b.float().norm())
            for a, b in zip(ours[:3], reference, strict=True)
        )
        if not difference < AGREEMENT_REL:
            raise SystemExit(f"wrong result at {dim}, {length}, {causal}: {difference}")
        if (fa3 := fa3_burst(dim, length, causal)) is not None:
            bursts[FA3] = fa3
        times = side_by_side(bursts, rounds, burst_ms)
        cell = {
            "dim": dim, "len": length, "causal": causal, "milliseconds": times,
            "tflops": {name: tflops(dim, length, causal, ms) for name, ms in times.items()},
            "ratio": min(times[n] for n in BARS if n in times) / times[OURS],
            "difference": difference,
        }  # fmt: skip
        report["cells"].append(cell)
        rates = {name: round(rate) for name, rate in cell["tflops"].items()}
        kind = "causal" if causal else "full"
        print(dim, length, kind, rates, f"{cell['ratio']:.3f}", flush=True)
    report["ceilings_after"] = ceilings()
    return report


def markdown(report: dict[str, Any]) -> str:
    """Table of a report."""
    before, after = report["ceilings_before"], report["ceilings_after"]
    names = (OURS, FIXED, CUDNN, FA3, FA2)
    lines = [
        "# Backward pass of dense attention on one GPU",
        "",
        f"{report['device']}, CUDA {report['cuda']}, PyTorch {report['torch']}, cuDNN"
        f" {report['cudnn']}, {report['date']}. `{report['command']}` at revision"
        f" {report['revision']}.",
        "",
        f"bf16, {TOKENS:,} tokens in all, model width {WIDTH:,}. TFLOP/s counts 10·b·h·n²·d,"
        f" half for causal; medians of {report['rounds']} rounds of {report['burst_ms']:g} ms"
        " bursts in random order, of calls that are given the output and return three"
        " gradients.",
        "Ceilings of the same run, before and after: bf16 matmul 8192³"
        f" {before['matmul_tflops']:.0f} and {after['matmul_tflops']:.0f} TFLOP/s,"
        f" copy {before['copy_tbps']:.2f} and {after['copy_tbps']:.2f} TB/s.",
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
        "The best other is the better of cuDNN and FA3. FA2 and cuDNN are PyTorch's own"
        " backends; FA3 is the wheel `flash_attn3_jax`, `-` where it was not installed or does"
        " not take the head dim.",
        "",
        "![TFLOP/s by head dim, mask and length](gpu_backward.png)",
        "",
    ]
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of TFLOP/s, one panel for each head dim and mask."""
    plt = importlib.import_module("matplotlib.pyplot")
    names = (OURS, FIXED, CUDNN, FA3, FA2)
    colours = ("#1b6ca8", "#8fbbdb", "#76b900", "#e07b39", "#b8b8b8")
    panels = list(dict.fromkeys((c["dim"], c["causal"]) for c in report["cells"]))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.9 * len(panels), 3.2), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axis, (dim, causal) in zip(axes[0], panels, strict=True):
        found = [c for c in report["cells"] if (c["dim"], c["causal"]) == (dim, causal)]
        for k, (name, colour) in enumerate(zip(names, colours, strict=True)):
            heights = [c["tflops"].get(name, 0.0) for c in found]
            places = [i + 0.17 * (k - 2) for i in range(len(found))]
            axis.bar(places, heights, 0.16, color=colour, label=name)
        axis.set_xticks(range(len(found)), [f"{c['len'] // 1024}k" for c in found])
        axis.set_title(f"head dim {dim}, {'causal' if causal else 'full'}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.supylabel("TFLOP/s, bf16 backward")
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--burst-ms", type=float, default=40.0)
    parser.add_argument(
        "--cells", nargs="*", type=cell_named, default=[], metavar="DIM:LEN:full|causal"
    )
    options = parser.parse_args()
    if options.render:
        report = json.loads(options.render.read_text())
        options.render.with_suffix(".md").write_text(markdown(report))
        plot(report, options.render.with_suffix(".png"))
        return
    report = measure(options.rounds, options.burst_ms, options.revision, options.cells)
    (options.out / "gpu_backward.json").write_text(json.dumps(report, indent=1))
    (options.out / "gpu_backward.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
