"""What the default policy does to real heads on a CPU: share kept, error, coverage and time.

Every captured layer runs three times in the same process and with the same threads: with the
budget, exactly dense on the same backend, and through PyTorch's own SDPA in float32 (if torch
is there). The clock covers all of a call: probe, plan, run, certificate. The dense run is also
the truth that certificates are held against (its own error is below 1e-5).

    python benchmarks/capture_qkv.py TEXT 8192 OUT/prose 0,1,...,29     # once per text
    python benchmarks/cpu.py OUT/prose OUT/code --markdown docs/benchmarks/cpu.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from adaattn_core import (
    AttentionProblem,
    Dense,
    ErrorBudget,
    FixedPolicy,
    HeadPlan,
    Mask,
    Plan,
    ScoreSkip,
    attention,
    get_backend,
)
from adaattn_core.testing.oracles import relative_frobenius, row_errors, row_quantile

try:
    import torch
except ImportError:  # the comparison with PyTorch is then left out
    torch = None

BUDGET = ErrorBudget(rel=0.1)
NEEDLE_MARGIN = 6.0
"""Logit of a planted needle above the log-sum-exp of its row: about 99.8% of the row's mass."""


def load(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return q, k, v of shape (1, heads, len, dim) and the scale of a captured layer."""
    with np.load(path) as file:
        q, k, v = (file[name].view(ml_dtypes.bfloat16)[None] for name in "qkv")
        return q, k, v, float(file["scale"])


def torch_seconds(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> float:
    """Wall-clock of PyTorch's SDPA in float32 on the same heads, conversion not counted."""
    group = q.shape[1] // k.shape[1]
    arrays = (q, np.repeat(k, group, axis=1), np.repeat(v, group, axis=1))
    tensors = [torch.from_numpy(x.astype(np.float32)) for x in arrays]
    started = time.perf_counter()
    torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True, scale=scale)
    return time.perf_counter() - started


def measure_layer(path: Path, threads: int) -> dict[str, Any]:
    """Run one layer all three ways; errors, shares and seconds."""
    q, k, v, scale = load(path)
    mask = Mask.causal()
    started = time.perf_counter()
    result = attention(q, k, v, mask=mask, scale=scale, budget=BUDGET, backend="numpy")
    ours = time.perf_counter() - started
    started = time.perf_counter()
    dense = attention(
        q, k, v, mask=mask, scale=scale, policy=FixedPolicy(Dense()), backend="numpy"
    )
    seconds = {"adaattn": ours, "dense": time.perf_counter() - started}
    if torch is not None:
        torch.set_num_threads(threads)
        seconds["torch"] = torch_seconds(q, k, v, scale)
    truth = np.asarray(dense.out, np.float32)
    out = np.asarray(result.out, np.float32)
    heads = []
    for (_, head), facts in result.facts.items():
        certificate = result.certificate[0, head]
        got, exact = out[0, head], truth[0, head]
        heads.append(
            {
                "head": head,
                "structure": result.plan[0, head].structure.kind,
                "share": facts.share,
                "frobenius": relative_frobenius(got, exact),
                "upper": certificate.upper,
                "guarantee": certificate.guarantee,
                "true_rows": row_quantile(got, exact, BUDGET.rows),
                "escalations": len(result.provenance["escalated"].get(f"0,{head}", [])),
            }
        )
    return {"file": path.name, "text": path.parent.name, "seconds": seconds, "heads": heads}


def plant_needles(path: Path, count: int, seed: int) -> dict[str, Any]:
    """Plant keys that one row each must find, and see who finds them."""
    rng = np.random.default_rng(seed)
    q, k, v, scale = load(path)
    backend = get_backend("numpy")
    found = {"budget, last tile": 0, "score-then-skip, anywhere": 0}
    false_certificates = 0
    for number in range(count):
        head = int(rng.integers(q.shape[1]))
        queries = q[:, head : head + 1].astype(np.float32)
        shared = head // (q.shape[1] // k.shape[1])
        keys = k[:, shared : shared + 1].astype(np.float32)
        values = v[:, shared : shared + 1].astype(np.float32)
        length = queries.shape[2]
        last = number % 2 == 0
        row = length - 1 - int(rng.integers(32)) if last else int(rng.integers(1024, length))
        depth = int(rng.integers(64, row - 512))
        query = queries[0, 0, row]
        scores = keys[0, 0, : row + 1] @ query * scale
        log_sum = float(np.logaddexp.reduce(scores))
        keys[0, 0, depth] = query * ((log_sum + NEEDLE_MARGIN) / (scale * query @ query))
        values[0, 0, depth] = rng.standard_normal(values.shape[3]) * 3
        problem = AttentionProblem.from_arrays(
            queries, keys, values, mask=Mask.causal(), scale=scale
        )
        exact = backend.run(problem, Plan.uniform(problem, HeadPlan())).out[0, 0]
        if last:
            result = attention(
                queries, keys, values, mask=Mask.causal(), scale=scale, budget=BUDGET
            )
            out, certificate = result.out[0, 0], result.certificate[0, 0]
            false_certificates += row_quantile(out, exact, BUDGET.rows) > certificate.upper
            name = "budget, last tile"
        else:
            structure = ScoreSkip(lam=1e-3, tile_kv=1)
            plan = Plan.uniform(problem, HeadPlan(structure=structure))
            out, name = backend.run(problem, plan).out[0, 0], "score-then-skip, anywhere"
        rms = float(np.sqrt(np.mean(np.sum(exact**2, axis=1))))
        found[name] += bool(row_errors(out[row : row + 1], exact[row : row + 1])[0] < 0.1 * rms)
    return {
        "planted": {name: (count + 1 - i) // 2 for i, name in enumerate(found)},
        "found": found,
        "false_certificates": int(false_certificates),
    }


def summarise(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over heads and ratios of median layer times."""
    heads = [head for layer in layers for head in layer["heads"]]
    seconds = {
        name: float(np.median([layer["seconds"][name] for layer in layers]))
        for name in layers[0]["seconds"]
    }
    return {
        "heads": len(heads),
        "share": float(np.mean([h["share"] for h in heads])),
        "share_median": float(np.median([h["share"] for h in heads])),
        "dense_heads": sum(h["structure"] == "dense" for h in heads),
        "frobenius": float(np.mean([h["frobenius"] for h in heads])),
        "upper_max": float(max(h["upper"] for h in heads)),
        "coverage": float(np.mean([h["true_rows"] <= h["upper"] for h in heads])),
        "within_budget": float(np.mean([h["upper"] <= BUDGET.rel for h in heads])),
        "escalated": float(np.mean([h["escalations"] > 0 for h in heads])),
        "layer_seconds": seconds,
        "speedup": {n: seconds[n] / seconds["adaattn"] for n in seconds if n != "adaattn"},
    }


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
        f"{report['machine']}, {report['date']}, NumPy {report['numpy']}"
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
        ("heads run dense", lambda s: f"{s['dense_heads']}"),
        ("heads escalated at least once", lambda s: f"{s['escalated']:.0%}"),
        ("mean relative Frobenius error", lambda s: f"{s['frobenius']:.4f}"),
        ("certificates within the budget", lambda s: f"{s['within_budget']:.1%}"),
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
    needles = report["needles"]
    lines += [
        "",
        "## Needles",
        "",
        "A key that holds 99.8% of one row's mass, planted at random:",
        "",
    ]
    lines += [
        f"- {name}: {needles['found'][name]} of {needles['planted'][name]} retrieved"
        for name in needles["found"]
    ]
    lines += [f"- sampled certificates that were false: {needles['false_certificates']}", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="captured layers, one text each")
    parser.add_argument("--layers", type=int, default=0, help="at most this many layers a text")
    parser.add_argument("--needles", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    texts: dict[str, Any] = {}
    length = 0
    for folder in args.folders:
        files = sorted(folder.glob("*.npz"))
        if args.layers:
            files = files[:: max(len(files) // args.layers, 1)][: args.layers]
        measure_layer(files[0], args.threads)  # warm-up
        layers = []
        for file in files:
            layers.append(measure_layer(file, args.threads))
            print(
                file.name,
                {n: round(s, 2) for n, s in layers[-1]["seconds"].items()},
                flush=True,
            )
        length = load(files[0])[0].shape[2]
        texts[folder.name] = summarise(layers) | {"layers": layers}
        shown = {n: x for n, x in texts[folder.name].items() if n != "layers"}
        print(folder.name, json.dumps(shown, indent=1), flush=True)
    middle = sorted(args.folders[0].glob("*.npz"))
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {args.threads} cores",
        "numpy": np.__version__,
        "torch": torch.__version__ if torch is not None else "",
        "threads": args.threads,
        "len": length,
        "texts": texts,
        "needles": plant_needles(middle[len(middle) // 2], args.needles, seed=0),
    }
    print(json.dumps(report["needles"]))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    if args.markdown:
        args.markdown.write_text(markdown(report))


if __name__ == "__main__":
    main()
