"""What budgets do to a whole model: perplexity, a needle, greedy text (SmolLM2-135M, CPU).

    python benchmarks/quality.py TEXT.txt TEXT.txt TEXT.txt --out docs/benchmarks

Every layer and head runs through ``model.set_attn_implementation("adaattn")``. "sdpa" is
PyTorch's own attention with the same weights; "exact" is AdaAttn without a budget. The tasks
are those of ``adaattn eval`` (`adaattn_bench.tasks`); columns and page are this script's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from adaattn_bench import models, tasks
from adaattn_bench.tasks import CODE, NEEDLE, QUESTION

__all__ = ["CODE", "NEEDLE", "QUESTION"]

BUDGETS: dict[str, models.Setting] = {
    "sdpa": models.Setting(models.TORCH),
    "exact": models.Setting(models.EXACT),
    **{name: models.Setting(name, float(name)) for name in ("0.02", "0.05", "0.1", "0.2")},
}
NEEDLE_BUDGETS = ("sdpa", "0.1", "0.2")
DEPTHS = (0.2, 0.5, 0.8)
PARTS = ("perplexity", "needle", "greedy")
PROMPT = "The history of the lighthouse began when"


def greedy(model: models.Model, ids: torch.Tensor, count: int) -> dict[str, dict[str, Any]]:
    """Continue a prompt greedily at every budget, and compare with PyTorch's continuation."""
    rows: dict[str, dict[str, Any]] = {}
    reference: list[int] = []
    for name, setting in BUDGETS.items():  # "sdpa" is the first
        row = tasks.greedy(model, setting, ids, count, reference)
        reference = reference or row["tokens"]
        rows[name] = {
            "agreement": row["agreement"],
            "first_difference": row["first_difference"],
            "prefill_share": row.get("share", 1.0),
        }
        print("greedy", len(ids), name, rows[name], flush=True)
    return rows


def plot(report: dict[str, Any], path: Path) -> None:
    """Perplexity against the budget, and the scores that it took."""
    import matplotlib as mpl  # noqa: PLC0415 -- only for the figure

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    names = [name for name in BUDGETS if name not in ("sdpa", "exact")]
    for text, rows in report["perplexity"].items():
        base = rows["sdpa"]["perplexity"]
        change = [100 * (rows[n]["perplexity"] / base - 1) for n in names]
        left.plot(names, change, marker="o", label=text)
        right.plot(names, [rows[n]["share"] for n in names], marker="o", label=text)
    left.axhline(0, color="0.6", lw=0.8)
    left.axhline(0.5, color="0.6", lw=0.8, ls=":")
    left.set(xlabel="error budget", ylabel="change of perplexity, %")
    right.set(xlabel="error budget", ylabel="share of scores kept", ylim=(0, 1.05))
    left.legend(frameon=False)
    figure.savefig(path, dpi=140)


def markdown(report: dict[str, Any]) -> str:
    """Render the report as a documentation page."""
    texts = list(report["perplexity"])
    length = report["tokens"]
    lines = [
        "# A whole model under a budget",
        "",
        "SmolLM2-135M-Instruct (4-bit weights dequantised to float32, so no figure of"
        " SmolLM2's own), every layer and head through"
        ' `model.set_attn_implementation("adaattn")` on the CPU backend; sampled guarantee,'
        " 95% of the rows, confidence 0.95. Plans are chosen as if measuring and"
        " certifying cost nothing: with their cost counted, a CPU runs windows this short"
        " dense at any budget. [The same on a GPU, with heads in 8 bits](quality_gpu.md).",
        "",
        f"{report['machine']}, {_dates(report)}, PyTorch {report['torch']},"
        f" transformers {report['transformers']}. Command: `python benchmarks/quality.py"
        " TEXT.txt TEXT.txt TEXT.txt --out docs/benchmarks`.",
        "",
        f"## Perplexity of the first {length:,} tokens",
        "",
        "| budget | " + " | ".join(texts) + " | largest change | share kept | largest upper |",
        "|---|" + "---|" * (len(texts) + 3),
    ]
    for name in BUDGETS:
        rows = [report["perplexity"][text][name] for text in texts]
        bases = [report["perplexity"][text]["sdpa"]["perplexity"] for text in texts]
        changes = [r["perplexity"] / b - 1 for r, b in zip(rows, bases, strict=True)]
        change = max(changes, key=abs)
        share = np.mean([r["share"] for r in rows])
        upper = max(r["upper_max"] for r in rows)
        lines.append(
            f"| {name} | "
            + " | ".join(f"{r['perplexity']:.4f}" for r in rows)
            + (" | | | |" if name == "sdpa" else f" | {change:+.2e} | {share:.2f} |")
            + ("" if name == "sdpa" else f" {upper:.3g} |")
        )
    lines += [
        "",
        "![Change of perplexity and share of scores kept, by budget](quality.png)",
        "",
        f"## A 12-digit code in {report['needle_tokens']:,} tokens of prose",
        "",
        "Asked for at the end; mean nats a token of the code, and how many of its tokens are"
        " the most likely ones.",
        "",
        "| budget | " + " | ".join(f"depth {d}" for d in DEPTHS) + " | share kept |",
        "|---|" + "---|" * (len(DEPTHS) + 1),
    ]
    for name, rows in report["needle"].items():
        cells = [f"{r['nats']:.3f}, {r['right']} of {r['tokens']}" for r in rows]
        share = np.mean([r["share"] for r in rows])
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {share:.2f} |")
    lines += greedy_lines(
        report["greedy"],
        f"{report['greedy_tokens']} greedy tokens after a short prompt",
        "With a short prompt and one row at a time every head ran dense: these rows show that"
        " the path is exact, not what a budget does.",
    )
    if "greedy_long" in report:
        lines += greedy_lines(
            report["greedy_long"],
            f"{report['greedy_tokens']} greedy tokens after {report['prompt_tokens']:,}"
            " tokens of prose",
            "The prompt is computed within the budget, and every later token attends to what"
            " it left in the cache; one row at a time runs dense.",
        )
    return "\n".join(lines) + "\n"


def _dates(report: dict[str, Any]) -> str:
    dates = report.get("dates") or {"all": report["date"]}
    if len(set(dates.values())) == 1:
        return str(next(iter(dates.values())))
    return ", ".join(f"{part} {date}" for part, date in dates.items())


def greedy_lines(rows: dict[str, dict[str, Any]], title: str, remark: str) -> list[str]:
    """Render one table of continuations."""
    lines = [
        "",
        f"## {title}",
        "",
        "| budget | same tokens as sdpa | first difference | share kept in the prompt |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        first = row["first_difference"]
        cells = [name, f"{row['agreement']:.0%}", "none" if first is None else f"token {first}"]
        share = row.get("prefill_share")
        cells.append("" if name == "sdpa" or share is None else f"{share:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", remark]


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--needle-tokens", type=int, default=4096)
    parser.add_argument("--greedy-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--only", choices=PARTS, help="measure this part, keep the others")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--render", type=Path, help="render an earlier quality.json only")
    args = parser.parse_args()
    if args.render:
        report = json.loads(args.render.read_text())
    else:
        kept: dict[str, Any] = {}
        if args.only is not None:
            kept = json.loads((args.out / "quality.json").read_text())
        report = measure(args)
        known = kept.get("dates") or dict.fromkeys(PARTS, kept.get("date"))
        report = kept | report | {"dates": known | report["dates"]}
        (args.out / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(report, args.out / "quality.png")
    (args.out / "quality.md").write_text(markdown(report))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything."""
    model = models.load(models.SMOLLM2)

    def window(path: Path, count: int) -> torch.Tensor:
        return model.encode(path.read_text(errors="ignore"), count)

    wanted = PARTS if args.only is None else (args.only,)
    report: dict[str, Any] = {
        "dates": dict.fromkeys(wanted, datetime.date.today().isoformat()),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if "perplexity" in wanted:
        report |= {"tokens": args.tokens, "perplexity": {}}
    for path in args.texts if "perplexity" in wanted else ():
        ids = window(path, args.tokens)
        rows = report["perplexity"][path.stem] = {}
        for name, setting in BUDGETS.items():
            row = tasks.perplexity(model, setting, [ids])
            rows[name] = {"share": 1.0, "upper_max": float("nan")} | row
            print(path.stem, name, rows[name], flush=True)
    if "greedy" in wanted:
        short, long = model.encode(PROMPT), window(args.texts[0], args.prompt_tokens)
        report |= {"greedy_tokens": args.greedy_tokens, "prompt_tokens": args.prompt_tokens}
        report["greedy"] = greedy(model, short, args.greedy_tokens)
        report["greedy_long"] = greedy(model, long, args.greedy_tokens)
    if "needle" in wanted:
        report |= {"needle_tokens": args.needle_tokens, "needle": {}}
        prose = window(args.texts[0], args.needle_tokens)
    for name in NEEDLE_BUDGETS if "needle" in wanted else ():
        found = [
            tasks.needle(model, BUDGETS[name], prose, args.needle_tokens, depth)
            for depth in DEPTHS
        ]
        report["needle"][name] = [{"share": 1.0} | row for row in found]
        print("needle", name, report["needle"][name], flush=True)
    return report


if __name__ == "__main__":
    main()
