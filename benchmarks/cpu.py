"""What the default policy does to real heads on a CPU: share kept, error, coverage and time.

Every captured layer runs three times in the same process and with the same threads: with the
budget, exactly dense on the same backend, and through PyTorch's own SDPA in float32 (if torch
is there). The clock covers all of a call: probe, plan, run, certificate. The dense run is also
the truth that certificates are held against (its own error is below 1e-5).

    python benchmarks/capture_qkv.py TEXT.txt --out OUT/prose           # once per text
    python benchmarks/cpu.py OUT/prose OUT/code --markdown docs/benchmarks/cpu.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import adaptive_cases
from adaattn_bench.ablations import Layer, summarise
from adaattn_bench.contenders import PEERS, Given, ours
from adaattn_bench.devices import describe, torch_module
from adaattn_bench.problems import Shape, make_problem, sizes_of
from adaattn_core import AttentionProblem, Dense, FixedPolicy, attention
from adaattn_core.report.summary import HeadRow
from adaptive_peers import Heads

REL = 0.1
NEEDLE_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Measured:
    """One layer: its heads as they are, and seconds of each way."""

    heads: list[HeadRow]
    escalated: int
    seconds: dict[str, float]


def given_of(path: Path, dtype: str) -> Given:
    """Return the heads of a captured layer in a format."""
    heads_q, heads_kv, length, dim = sizes_of(str(path)) or (0, 0, 0, 0)
    shape = Shape(1, heads_q, heads_kv, length, length, dim)
    return Given.on(make_problem(str(path), shape, dtype), "cpu")


def measure_layer(path: Path) -> Measured:
    """Run one layer all three ways, one after the other; the dense run is the truth."""
    given = given_of(path, "bfloat16")
    shared = {"mask": given.mask, "scale": given.scale, "backend": "numpy"}
    ways = {
        "adaattn": ours(given, REL, backend="numpy"),
        "dense": lambda: attention(*given.arrays, policy=FixedPolicy(Dense()), **shared),
    }
    if torch_module() is not None:
        ways["torch"] = PEERS["torch flash"](given_of(path, "float32"))
    results, seconds = {}, {}
    for name, call in ways.items():
        started = time.perf_counter()
        results[name] = call()
        seconds[name] = time.perf_counter() - started
    problem = AttentionProblem.from_arrays(*given.arrays, mask=given.mask, scale=given.scale)
    layer = Layer(path.stem, problem, np.asarray(results["dense"].out, np.float64))
    result = results["adaattn"]
    return Measured(layer.rows(result), len(result.provenance["escalated"]), seconds)


def total(layers: list[Measured]) -> dict[str, Any]:
    """Means over heads and ratios of median layer times."""
    heads = [head for layer in layers for head in layer.heads]
    seconds = {
        name: statistics.median(layer.seconds[name] for layer in layers)
        for name in layers[0].seconds
    }
    return summarise(heads, REL) | {
        "share_median": statistics.median(head.share for head in heads),
        "escalated": sum(layer.escalated for layer in layers) / len(heads),
        "layer_seconds": seconds,
        "speedup": {n: seconds[n] / seconds["adaattn"] for n in seconds if n != "adaattn"},
    }


def needles(paths: list[Path]) -> dict[str, Any]:
    """Plant keys that one row each must find, one a key/value head, and see who finds them."""
    layers = [Heads(*given_of(path, "bfloat16").torch_tensors()) for path in paths]
    return adaptive_cases.needles(layers, REL, NEEDLE_ROWS, seed=0, backend="numpy")


def markdown(report: dict[str, Any]) -> str:
    """Render the report as a documentation page."""
    lines = [
        "# Real heads on a CPU",
        "",
        f"SmolLM2-135M-Instruct, {report['len']:,} tokens, causal, `ErrorBudget(rel=0.1)`: 95%"
        " of the rows, confidence 0.95, sampled. The texts were not tuned on. Times"
        " are medians over layers of one whole call for all the heads of a layer, measured one"
        f" after the other in the same process; {report['threads']} threads.",
        "",
        f"{report['device']}, {report['date']}, NumPy {report['numpy']}"
        + (f", PyTorch {report['torch']}" if report["torch"] else "")
        + ". Command: `python benchmarks/cpu.py DIR ... --markdown docs/benchmarks/cpu.md`.",
        "",
        "| | " + " | ".join(report["texts"]) + " |",
        "|---|" + "---|" * len(report["texts"]),
    ]
    rows = (
        ("heads", lambda s: f"{s['heads']}"),
        ("mean share of causal scores kept", lambda s: f"{s['share']:.3f}"),
        ("median share", lambda s: f"{s['share_median']:.3f}"),
        ("heads run dense", lambda s: f"{s['structures'].get('dense', 0)}"),
        ("heads escalated at least once", lambda s: f"{s['escalated']:.0%}"),
        ("mean relative Frobenius error", lambda s: f"{s['frobenius']:.4f}"),
        ("certificates within the budget", lambda s: f"{s['within']:.1%}"),
        ("coverage (true 95% row error <= upper)", lambda s: f"{s['coverage']:.1%}"),
        ("seconds a layer, AdaAttn", lambda s: f"{s['layer_seconds']['adaattn']:.2f}"),
        (
            "seconds a layer, dense, same backend",
            lambda s: f"{s['layer_seconds']['dense']:.2f}",
        ),
        (
            "seconds a layer, PyTorch SDPA fp32",
            lambda s: f"{s['layer_seconds'].get('torch', float('nan')):.2f}",
        ),
        ("time of dense / time of AdaAttn", lambda s: f"{s['speedup']['dense']:.2f}"),
        (
            "time of PyTorch / time of AdaAttn",
            lambda s: f"{s['speedup'].get('torch', float('nan')):.2f}",
        ),
    )
    summaries = report["texts"].values()
    lines += [
        f"| {name} | " + " | ".join(show(s) for s in summaries) + " |" for name, show in rows
    ]
    lines += [
        "",
        "## Needles",
        "",
        "A key that holds 99.8% of one row's mass, planted at random into every third layer:",
        "",
    ]
    ways = {n: f for n, f in report["needles"].items() if isinstance(f, dict)}
    lines += [f"- {n}: {f['found']} of {f['planted']} retrieved" for n, f in ways.items()]
    false = sum(found.get("false_certificates", 0) for found in ways.values())
    lines += [f"- sampled certificates that were false: {false}", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="captured layers, one text each")
    parser.add_argument("--layers", type=int, default=0, help="at most this many layers a text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if (torch := torch_module()) is not None:
        torch.set_num_threads(args.threads)
    texts: dict[str, Any] = {}
    for folder in args.folders:
        files = sorted(folder.glob("*.npz"))
        if args.layers:
            files = files[:: max(len(files) // args.layers, 1)][: args.layers]
        measure_layer(files[0])  # warm-up
        layers = []
        for file in files:
            layers.append(measure_layer(file))
            shown = {n: round(s, 2) for n, s in layers[-1].seconds.items()}
            print(file.name, shown, flush=True)
        texts[folder.name] = total(layers)
        print(folder.name, json.dumps(texts[folder.name], indent=1), flush=True)
    report = {
        **describe("cpu"),
        "date": datetime.now(UTC).date().isoformat(),
        "threads": args.threads,
        "len": given_of(files[0], "bfloat16").shape.len_kv,
        "texts": texts,
        "needles": needles(files[::3]),
    }
    print(json.dumps(report["needles"]))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    if args.markdown:
        args.markdown.write_text(markdown(report))


if __name__ == "__main__":
    main()
