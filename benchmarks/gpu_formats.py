"""Dense attention by operand formats on one Hopper GPU: speed, quantisation included; error.

    python benchmarks/gpu_formats.py --out DIR      measure; writes gpu_formats.json and .md

bf16 arrays of normal random numbers, 16,384 tokens of width 2,048 in all (65,536 of width 1,024
in the longest cell). Formats and torch's cuDNN backend take turns in random order; figures are
medians of all rounds, by CUDA events. A call quantises, multiplies and writes; memory for codes
is allocated beforehand. Errors are relative Frobenius errors of 256 rows against float64.
``--budgets`` times calls with a budget as well: everything inside, plans and certificates too,
with dense heads in 8 bits first as the default policy has them, and in 16 bits alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaattn_bench.clock import Call, by_events
from adaattn_core import attention
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.policies import BudgetPolicy, DecisionTable
from adaattn_core.policies.base import PolicyContext
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.backend import CudaBackend

ROOMY = 112.0
"""A factor on weights that leaves e4m3 two bits of room above the first maximum seen."""
RECIPES = {
    "bf16/bf16": HeadPlan(qk="bf16", pv="bf16"),
    "i8/bf16": HeadPlan(qk="i8", pv="bf16"),
    "bf16/e4m3": HeadPlan(qk="bf16", pv="e4m3", p_scale=ROOMY),
    "i8/e4m3": HeadPlan(qk="i8", pv="e4m3", p_scale=ROOMY),
    "i8/e4m3, p_scale 448": HeadPlan(qk="i8", pv="e4m3"),
}
CELLS = (
    (64, 1024, False), (64, 4096, False), (64, 16_384, False), (64, 16_384, True),
    (128, 1024, False), (128, 4096, False), (128, 4096, True), (128, 16_384, False),
    (128, 16_384, True), (128, 65_536, True),
)  # fmt: skip
BUDGET_CELLS = (
    (128, 8192, False), (128, 16_384, False), (128, 16_384, True), (128, 32_768, True),
    (128, 65_536, True),
)  # fmt: skip
BUDGETS = (0.05, 0.1)
CUDNN = "cuDNN bf16"
PLOTTED = ("bf16/bf16", "i8/bf16", "bf16/e4m3", "i8/e4m3")
ROWS = 256


def arrays(dim: int, length: int) -> list[Any]:
    """Query, key and value."""
    width = 2048 if length <= 16_384 else 1024
    shape = (max(1, 16_384 // length), width // dim, length, dim)
    return [torch.randn(shape, device="cuda").bfloat16() for _ in range(3)]


def ours(sets: list[Any], causal: bool, recipe: HeadPlan) -> tuple[Call, Any, str]:
    """Return a call of one recipe, its output, and which kernel it is."""
    backend = CudaBackend()
    mask = Mask.causal("top_left") if causal else None
    problem = AttentionProblem.from_arrays(*sets, mask=mask)
    raw = backend.run(problem, Plan.uniform(problem, recipe))
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


@dataclass(frozen=True, slots=True)
class Wide(BudgetPolicy):
    """The default policy without 8 bits."""

    def compile(self, context: PolicyContext) -> DecisionTable | None:
        """Return the default table, whose dense heads run in 16 bits."""
        table = BudgetPolicy.compile(self, context)
        return None if table is None else replace(table, narrow=None)


def budgeted(sets: list[Any], causal: bool, rel: float, policy: BudgetPolicy) -> Call:
    """Return a call with a budget; its certificate is made, and read by nobody."""
    mask = Mask.causal("top_left") if causal else None

    def call() -> Any:
        return attention(*sets, mask=mask, budget=rel, policy=policy, seed=0)

    return call


def measure_budgets(dim: int, length: int, causal: bool, rounds: int) -> dict[str, Any]:
    """Time calls with budgets beside our dense attention."""
    sets = arrays(dim, length)
    dense, _, _ = ours(sets, causal, RECIPES["bf16/bf16"])
    calls: dict[str, Call] = {CUDNN: cudnn(sets, causal), "bf16/bf16": dense}
    found: dict[str, dict[str, Any]] = {name: {} for name in calls}
    for rel in BUDGETS:
        for title, policy in (("", BudgetPolicy()), (", 16 bits", Wide())):
            name = f"budget {rel}{title}"
            calls[name] = call = budgeted(sets, causal, rel, policy)
            result = call()
            heads = Counter(
                f"{p.structure.kind} {p.qk}/{p.pv}" for p in result.plan.heads.values()
            )
            found[name] = {
                "heads": dict(heads), "upper": float(result.certificate.upper.max()),
                "escalated": len(result.provenance["escalated"]),
                "error": error(sets, causal, result.out),
            }  # fmt: skip
    time_in_turns(calls, found, rounds)
    return {"dim": dim, "len": length, "causal": causal, "found": found}


def time_in_turns(
    calls: dict[str, Call], found: dict[str, dict[str, Any]], rounds: int
) -> None:
    """Time calls in random order, round by round; write medians into what was found."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            times[name] += by_events(calls[name])(6)[2:]
    for name, own in times.items():
        found[name]["ms"] = statistics.median(own)


def measure_cell(dim: int, length: int, causal: bool, rounds: int) -> dict[str, Any]:
    """Time one cell."""
    sets = arrays(dim, length)
    batch, heads = sets[0].shape[:2]
    work = 4 * batch * heads * length**2 * dim / (2 if causal else 1)
    calls: dict[str, Call] = {CUDNN: cudnn(sets, causal)}
    found: dict[str, dict[str, Any]] = {CUDNN: {}}
    for name, recipe in RECIPES.items():
        calls[name], out, kernel = ours(sets, causal, recipe)
        found[name] = {"error": error(sets, causal, out), "kernel": kernel}
    time_in_turns(calls, found, rounds)
    for own in found.values():
        own["tflops"] = work / own["ms"] / 1e9
    return {"dim": dim, "len": length, "causal": causal, "found": found}


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of a result."""
    names = list(RECIPES)
    lines = [
        "# Attention by operand formats on Hopper",
        "",
        f"{result['device']}, {result['date']}: `python benchmarks/gpu_formats.py --out DIR`."
        " bf16 arrays of normal random numbers, 16,384 tokens of width 2,048 in all (65,536 of"
        " width 1,024 in the longest cell). TFLOP/s with quantisation, in brackets times"
        " cuDNN's in bf16; relative error against float64. Formats take turns in random order,"
        " on a card at its power limit: figures of two runs differ by up to 5%. Where it says"
        " nothing, weights are scaled by 112 before they become e4m3.",
        "",
        "![Speed against error, one line a shape](gpu_formats.png)",
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
    if result.get("budgets"):
        lines += budget_table(result["budgets"])
    return "\n".join(lines) + "\n"


def budget_table(cells: list[dict[str, Any]]) -> list[str]:
    """Return the lines about calls with budgets."""
    names = [name for name in cells[0]["found"] if name != CUDNN]
    lines = [
        "",
        "Calls with a budget, all inside: times over cuDNN's (above 1: faster), what heads ran"
        " as, the largest certified error.",
        "",
        "| head dim, len, mask | " + " | ".join(names) + " |",
        "|---" * (1 + len(names)) + "|",
    ]
    for cell in cells:
        found = cell["found"]
        mask = "causal" if cell["causal"] else "full"
        row = [f"{cell['dim']}, {cell['len']:,}, {mask}"]
        for name in names:
            own = found[name]
            text = f"{found[CUDNN]['ms'] / own['ms']:.2f}"
            if "heads" in own:
                heads = ", ".join(f"{n} {kind}" for kind, n in own["heads"].items())
                text += f"; {heads}; {own['upper']:.3f}"
            row.append(text)
        lines.append("| " + " | ".join(row) + " |")
    return lines


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed against error: one mark for each recipe and cell."""
    import matplotlib as mpl  # noqa: PLC0415 -- only for the figure

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    for axis, dim in zip(axes, (64, 128), strict=True):
        cells = [cell for cell in result["cells"] if cell["dim"] == dim]
        errors = {
            name: statistics.median(cell["found"][name]["error"] for cell in cells)
            for name in PLOTTED
        }
        order = sorted(PLOTTED, key=lambda name: errors[name])
        for cell in cells:
            found, mask = cell["found"], "causal" if cell["causal"] else "full"
            speeds = [found[CUDNN]["ms"] / found[name]["ms"] for name in order]
            axis.plot(speeds, marker="o", lw=0.8, label=f"{cell['len']:,} {mask}")
        axis.axhline(1, color="0.6", lw=0.8, ls=":")
        axis.set_xticks(range(len(order)), [f"{n}\n{errors[n]:.4f}" for n in order])
        axis.set(xlabel="formats, and relative error on N(0, 1)", title=f"head dim {dim}")
        axis.legend(frameon=False, fontsize=7)
    axes[0].set_ylabel("times as fast as cuDNN in bf16")
    figure.savefig(path, dpi=140)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, nargs="*", help="numbers of cells; default all")
    parser.add_argument("--budgets", action="store_true", help="time calls with budgets too")
    parser.add_argument("--render", type=Path, help="page and picture of an earlier .json only")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.render:
        result = json.loads(options.render.read_text())
        (options.out / "gpu_formats.md").write_text(table(result))
        plot(result, options.out / "gpu_formats.png")
        return
    chosen = [CELLS[i] for i in options.cells] if options.cells else CELLS
    result = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "cells": [measure_cell(*cell, options.rounds) for cell in chosen],
    }
    if options.budgets:
        result["budgets"] = [measure_budgets(*cell, options.rounds) for cell in BUDGET_CELLS]
    (options.out / "gpu_formats.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "gpu_formats.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
