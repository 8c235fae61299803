"""What budgets do to a whole model: perplexity, a needle, greedy text (SmolLM2-135M, CPU).

    python benchmarks/quality.py TEXT.txt TEXT.txt TEXT.txt --out docs/benchmarks

Every layer and head runs through ``model.set_attn_implementation("adaattn")``. "sdpa" is
PyTorch's own attention with the same weights; "exact" is AdaAttn without a budget. See
smollm2.py for the model.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import adaattn_torch
import smollm2
from adaattn_core.plan import HeadPlan
from adaattn_core.policies.base import PolicyContext
from adaattn_core.policies.budget import BudgetPolicy
from adaattn_core.stats import HeadStats, MeasureRequest
from adaattn_torch.entries.transformers import KEY, budgets, register_transformers

BUDGETS: dict[str, float | None] = {
    "sdpa": None,
    "exact": None,
    "0.02": 0.02,
    "0.05": 0.05,
    "0.1": 0.1,
    "0.2": 0.2,
}
NEEDLE_BUDGETS = ("sdpa", "0.1", "0.2")
DEPTHS = (0.2, 0.5, 0.8)
CODE = "493027518664"
NEEDLE = f" The access code of the northern archive is {CODE}."
QUESTION = (
    "\n\nQuestion: what is the access code of the northern archive?"
    "\nAnswer: The access code of the northern archive is"
)
PARTS = ("perplexity", "needle", "greedy")
PROMPT = "The history of the lighthouse began when"


class Unhurried(BudgetPolicy):
    """The default policy, as if measuring and certifying took no time.

    At a few thousand tokens they take longer than a dense head on a CPU, so the default policy
    runs everything dense there and a budget changes nothing. What is asked here is what a plan
    within the budget does to the model.
    """

    def request(self, context: PolicyContext) -> MeasureRequest | None:
        """Ask for all structures."""
        return super().request(_free(context))

    def decide_head(self, stats: HeadStats, context: PolicyContext) -> HeadPlan:
        """Choose by the scores computed."""
        return super().decide_head(stats, _free(context))

    def escalate(
        self, plan: HeadPlan, upper: float, stats: HeadStats, context: PolicyContext
    ) -> HeadPlan | None:
        """Climb the same way."""
        return super().escalate(plan, upper, stats, _free(context))


def settings(name: str) -> Any:
    """Budget and policy of a column; without a budget both are exact."""
    budget = BUDGETS[name]
    return budgets(budget, policy=None if budget is None else Unhurried())


def _free(context: PolicyContext) -> PolicyContext:
    rates = {**context.costs.efficiency, "rows": 1e9, "landmark": 1.0, "score_skip": 1.0}
    return replace(context, costs=replace(context.costs, head_seconds=0.0, efficiency=rates))


def run(model: Any, name: str, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Logits of one forward pass, and what the heads did."""
    model.set_attn_implementation("sdpa" if name == "sdpa" else KEY)
    seen: list[adaattn_torch.AttentionInfo] = []
    started = time.perf_counter()
    with torch.no_grad(), adaattn_torch.listening(seen), settings(name):
        logits = model(ids).logits[0]
    assert all(info.fell_back is None for info in seen)
    shares = [facts.share for info in seen for facts in info.facts.values()]
    uppers = [float(np.max(info.certificate.upper)) for info in seen]
    return logits, {
        "seconds": time.perf_counter() - started,
        "share": float(np.mean(shares)) if shares else 1.0,
        "upper_max": max(uppers, default=float("nan")),
    }


def perplexity(model: Any, name: str, ids: torch.Tensor) -> dict[str, float]:
    """Perplexity of one window."""
    logits, facts = run(model, name, ids)
    loss = torch.nn.functional.cross_entropy(logits[:-1].double(), ids[0, 1:])
    return {"perplexity": float(loss.exp()), **facts}


def needle(
    model: Any, tokenizer: Any, name: str, prose: torch.Tensor, depth: float
) -> dict[str, Any]:
    """Nats of the code's tokens, and whether each is the most likely one."""

    def encode(text: str) -> torch.Tensor:
        return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]

    hidden, question, answer = encode(NEEDLE), encode(QUESTION), encode(f" {CODE}")
    room = len(prose) - len(hidden) - len(question) - len(answer)
    split = int(depth * room)
    ids = torch.cat([prose[:split], hidden, prose[split:room], question, answer])
    logits, facts = run(model, name, ids[None])
    first = len(ids) - len(answer)
    predicted = logits[first - 1 : -1].double()
    nats = torch.nn.functional.cross_entropy(predicted, answer)
    right = int((predicted.argmax(-1) == answer).sum())
    return {"nats": float(nats), "right": right, "tokens": len(answer), **facts}


def greedy(model: Any, ids: torch.Tensor, count: int) -> dict[str, dict[str, Any]]:
    """Continue a prompt greedily at every budget, and compare with PyTorch's continuation."""
    rows: dict[str, dict[str, Any]] = {}
    reference: list[int] = []
    for name in BUDGETS:  # "sdpa" is the first
        model.set_attn_implementation("sdpa" if name == "sdpa" else KEY)
        seen: list[adaattn_torch.AttentionInfo] = []
        with torch.no_grad(), settings(name), adaattn_torch.listening(seen):
            made = model.generate(
                ids, max_new_tokens=count, min_new_tokens=count, do_sample=False
            )
        tokens = list(map(int, made[0, ids.shape[1] :]))
        reference = reference or tokens
        same = [a == b for a, b in zip(tokens, reference, strict=True)]
        prefill = seen[: model.config.num_hidden_layers]  # the prompt comes first
        shares = [facts.share for info in prefill for facts in info.facts.values()]
        rows[name] = {
            "agreement": float(np.mean(same)),
            "first_difference": None if all(same) else same.index(False),
            "prefill_share": float(np.mean(shares)) if shares else 1.0,
        }
        print("greedy", ids.shape[1], name, rows[name], flush=True)
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
        " dense at any budget.",
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
    register_transformers()
    tokenizer, model = smollm2.load()

    def window(path: Path, count: int) -> torch.Tensor:
        text = path.read_text(errors="ignore")[: count * 8]
        return tokenizer(text, return_tensors="pt")["input_ids"][:, :count]

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
        for name in BUDGETS:
            rows[name] = perplexity(model, name, ids)
            print(path.stem, name, rows[name], flush=True)
    if "greedy" in wanted:
        short = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        long = window(args.texts[0], args.prompt_tokens)
        report |= {"greedy_tokens": args.greedy_tokens, "prompt_tokens": args.prompt_tokens}
        report["greedy"] = greedy(model, short, args.greedy_tokens)
        report["greedy_long"] = greedy(model, long, args.greedy_tokens)
    if "needle" in wanted:
        report |= {"needle_tokens": args.needle_tokens, "needle": {}}
        prose = window(args.texts[0], args.needle_tokens)[0]
    names = [name for name in NEEDLE_BUDGETS if name in BUDGETS]
    for name in names if "needle" in wanted else ():
        report["needle"][name] = [
            needle(model, tokenizer, name, prose, depth) for depth in DEPTHS
        ]
        print("needle", name, report["needle"][name], flush=True)
    return report


if __name__ == "__main__":
    main()
