"""What budgets do to a whole model on a GPU: perplexity and a needle, with 8-bit heads.

    python benchmarks/gpu_quality.py --weights PART ... --tokens prose.npy code.npy --out DIR

SmolLM2-135M-Instruct in float32, without transformers (smollm2_torch.py), every head of every
layer through `adaattn_torch.scaled_dot_product_attention` on bf16 tensors; "torch" is PyTorch's
own attention on the same ones, and windows past the length that the model was trained for are
stretched by YaRN. Tokens come from gpu_tokens.py. Writes quality_gpu.json; ``--render`` makes
page and picture of one.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaattn_core.policies import BudgetPolicy, FixedPolicy
from adaattn_torch import scaled_dot_product_attention
from smollm2_torch import Model

ROOMY = 112.0


UNPRICED = BudgetPolicy(
    worthwhile=1e9, table_worthwhile=1e9, narrow_worthwhile=1e9, narrow_diffuse=0.0
)
"""Takes whatever keeps the budget, as if time were no matter: the most that a budget may do."""
SETTINGS: dict[str, dict[str, Any]] = {
    "torch": {},
    "bf16": {"policy": FixedPolicy(qk="bf16", pv="bf16")},
    "i8/bf16": {"policy": FixedPolicy(qk="i8", pv="bf16")},
    "i8/e4m3": {"policy": FixedPolicy(qk="i8", pv="e4m3", p_scale=ROOMY)},
    "0.05": {"budget": 0.05, "policy": UNPRICED},
    "0.1": {"budget": 0.1, "policy": UNPRICED},
    "0.2": {"budget": 0.2, "policy": UNPRICED},
}
"""PyTorch's attention; all heads in one pair of formats; within a budget."""
BUDGETS = ("0.05", "0.1", "0.2")
WINDOWS = {8192: 4, 32_768: 2}
"""Windows of each text, by their tokens."""
NEEDLES = ((8192, 0.2), (8192, 0.5), (8192, 0.8), (32_768, 0.2), (32_768, 0.5), (32_768, 0.8))
# Token numbers, of SmolLM2's tokenizer, of `adaattn_bench.tasks.NEEDLE`, `QUESTION` and `CODE`.
HIDDEN = (378, 1594, 2909, 282, 260, 5761, 17428, 314, 216, 36, 41, 35, 32, 34, 39, 37, 33, 40,
          38, 38, 36, 30)  # fmt: skip
QUESTION = (198, 198, 17872, 42, 732, 314, 260, 1594, 2909, 282, 260, 5761, 17428, 47, 198,
            21350, 42, 378, 1594, 2909, 282, 260, 5761, 17428, 314)  # fmt: skip
ANSWER = (216, 36, 41, 35, 32, 34, 39, 37, 33, 40, 38, 38, 36)


class Attention:
    """Attention of a model in one setting, and what it says of its heads."""

    def __init__(self, name: str) -> None:
        self.options, self.own = SETTINGS[name], name == "torch"
        self.kinds: Counter[str] = Counter()
        self.shares: list[float] = []
        self.uppers: list[float] = []
        self.escalated = 0

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Attend causally; arrays (heads, len, dim) of any dtype."""
        q, k, v = (x[None].bfloat16() for x in (q, k, v))
        if self.own:
            found = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
            return found[0].float()
        found, info = scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, layer=str(layer), seed=layer,
            strict=True, return_info=True, **self.options,
        )  # fmt: skip
        if "budget" in self.options and info.plan and info.certificate:
            for index, plan in info.plan.heads.items():
                kind = plan.structure.kind
                self.kinds[kind if kind != "dense" else f"{plan.qk}/{plan.pv}"] += 1
                self.shares.append(info.facts[index].share)
            self.uppers.append(float(info.certificate.upper.max()))
            self.escalated += len(info.provenance.get("escalated", {}))
        return found[0].float()

    def said(self) -> dict[str, Any]:
        """Return what heads did, for a report."""
        if not self.uppers:
            return {}
        return {
            "kinds": dict(self.kinds), "share": float(np.mean(self.shares)),
            "upper_max": max(self.uppers), "escalated": self.escalated,
        }  # fmt: skip


def perplexity(model: Model, name: str, windows: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Perplexity of windows, each read without what comes before it."""
    attention, nats = Attention(name), []
    for ids in windows:
        hidden = model.hidden(ids, attention)
        nats.append(torch.cat(list(model.losses(hidden, ids))).double())
    return {"perplexity": float(torch.cat(nats).mean().exp()), **attention.said()}


def needle(
    model: Model, name: str, prose: torch.Tensor, length: int, depth: float
) -> dict[str, Any]:
    """Ask for a code that stands at a depth of a text; count the tokens predicted right."""
    hidden, question, answer = (
        torch.tensor(x, device=prose.device) for x in (HIDDEN, QUESTION, ANSWER)
    )
    room = length - len(hidden) - len(question) - len(answer)
    split = int(depth * room)
    ids = torch.cat([prose[:split], hidden, prose[split:room], question, answer])
    attention = Attention(name)
    states = model.hidden(ids, attention)[-len(answer) - 1 : -1]
    head = model.weights.get("output.weight", model.weights["token_embd.weight"])
    logits = torch.nn.functional.linear(states, head).double()
    nats = torch.nn.functional.cross_entropy(logits, answer)
    return {
        "length": length, "depth": depth, "nats": float(nats), "tokens": len(answer),
        "right": int((logits.argmax(-1) == answer).sum()), **attention.said(),
    }  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything."""
    model = Model.load(options.weights, options.device, torch.float32)
    texts = {
        path.stem: torch.from_numpy(np.load(path)).long().to(options.device)
        for path in options.tokens
    }
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "perplexity": [],
        "needle": {},
    }
    with torch.inference_mode():
        for length, count in WINDOWS.items():
            for text, ids in texts.items():
                step = len(ids) // count
                windows = [ids[n * step : n * step + length] for n in range(count)]
                found = {name: perplexity(model, name, windows) for name in SETTINGS}
                row = {"text": text, "tokens": length, "windows": count, "found": found}
                report["perplexity"].append(row)
                print(text, length, {n: r["perplexity"] for n, r in found.items()}, flush=True)
        prose = next(iter(texts.values()))
        for name in SETTINGS:
            rows = [needle(model, name, prose, *place) for place in NEEDLES]
            report["needle"][name] = rows
            print("needle", name, [(r["right"], round(r["nats"], 3)) for r in rows], flush=True)
    return report


def change(row: dict[str, Any], name: str) -> float:
    """Change of perplexity against PyTorch's attention, in percent."""
    found = row["found"]
    return float(100 * (found[name]["perplexity"] / found["torch"]["perplexity"] - 1))


def markdown(report: dict[str, Any]) -> str:
    """Render the report as a documentation page."""
    rows = report["perplexity"]
    titles = [f"{row['text']}, {row['windows']} x {row['tokens']:,}" for row in rows]
    lines = [
        "# A whole model under a budget, on a GPU",
        "",
        "SmolLM2-135M-Instruct (4-bit weights dequantised to float32, so no figure of"
        " SmolLM2's own), all 270 heads through"
        " `adaattn_torch.scaled_dot_product_attention` on bf16 tensors; windows of 32,768"
        " tokens stretched by YaRN. Budgets are planned on the device: 95% of the rows,"
        " confidence 0.95. Plans are chosen as if time were no matter: landmarks wherever they"
        " keep the budget, and every other head in 8 bits first (of this head dim, 64, i8 with"
        " 16-bit values is the cheapest pair), again in 16 bits where its certificate missed."
        " So the page shows the most that a budget does to a model. The default policy leaves"
        " dense heads of dim 64 in 16 bits, as 8 bits save no time there.",
        "",
        f"{report['device']}, {report['date']}, PyTorch {report['torch']}. Command:"
        " `python benchmarks/gpu_quality.py --weights model.gguf --tokens prose.npy code.npy"
        " --out DIR`." + "".join(f" {note}" for note in [report.get("note")] if note),
        "",
        "## Perplexity",
        "",
        "Perplexity with PyTorch's attention, and its change, in percent, with ours.",
        "",
        "| attention | " + " | ".join(titles) + " |",
        "|---" * (1 + len(rows)) + "|",
    ]
    for name in SETTINGS:
        cells = [
            f"{row['found'][name]['perplexity']:.4f}"
            if name == "torch"
            else f"{change(row, name):+.3f}"
            for row in rows
        ]
        lines.append(f"| {label(name)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "![Change of perplexity and what heads ran as, by budget](quality_gpu.png)",
        "",
        "What heads ran as, all windows together, and the largest certified error of a layer:",
        "",
        "| budget | landmark | dense in 8 bits | dense in 16 bits | ran again | scores computed"
        " | largest upper |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in BUDGETS:
        found = [row["found"][name] for row in rows]
        kinds = totals(found)
        heads = sum(kinds.values())
        narrow = sum(n for kind, n in kinds.items() if kind.startswith("i8"))
        shares = [kinds["landmark"], narrow, heads - kinds["landmark"] - narrow]
        lines.append(
            f"| {name} | "
            + " | ".join(f"{n / heads:.0%}" for n in shares)
            + f" | {sum(f['escalated'] for f in found) / heads:.1%}"
            + f" | {np.mean([f['share'] for f in found]):.2f}"
            + f" | {max(f['upper_max'] for f in found):.4f} |"
        )
    lines += [
        "",
        f"## A 12-digit code in {' and '.join(f'{n:,}' for n in WINDOWS)} tokens of prose",
        "",
        "Asked for at the end: how many of its tokens are the most likely ones, and mean nats"
        " a token.",
        "",
        "| attention | " + " | ".join(f"{n:,}, depth {d}" for n, d in NEEDLES) + " |",
        "|---" * (1 + len(NEEDLES)) + "|",
    ]
    for name, found in report["needle"].items():
        cells = [f"{r['right']} of {r['tokens']}, {r['nats']:.3f}" for r in found]
        lines.append(f"| {label(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def label(name: str) -> str:
    """Name of a setting in a table."""
    return f"budget {name}" if name in BUDGETS else name if name == "torch" else f"{name} dense"


def totals(found: list[dict[str, Any]]) -> Counter[str]:
    """Heads by what they ran as."""
    kinds: Counter[str] = Counter()
    for one in found:
        kinds.update(one["kinds"])
    return kinds


def plot(report: dict[str, Any], path: Path) -> None:
    """Change of perplexity by budget, and what heads ran as."""
    import matplotlib as mpl  # noqa: PLC0415 -- only for the figure

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    rows = report["perplexity"]
    names = ["bf16", "i8/bf16", "i8/e4m3", *BUDGETS]
    split = len(names) - len(BUDGETS)
    for row in rows:
        values = [change(row, name) for name in names]
        (line,) = left.plot(
            names[:split], values[:split], marker="o", label=f"{row['text']}, {row['tokens']:,}"
        )
        left.plot(names[split:], values[split:], marker="o", color=line.get_color())
    left.axhline(0, color="0.6", lw=0.8)
    left.axhline(0.5, color="0.6", lw=0.8, ls=":")
    left.axvline(split - 0.5, color="0.8", lw=0.8)
    left.set(xlabel="dense in one pair of formats | error budget")
    left.set(ylabel="change of perplexity, %")
    left.legend(frameon=False, fontsize=8)
    bottom = np.zeros(len(BUDGETS))
    counted = [totals([row["found"][name] for row in rows]) for name in BUDGETS]
    kinds = sorted({kind for kinds in counted for kind in kinds})
    for kind in kinds:
        heights = np.array([c[kind] / sum(c.values()) for c in counted])
        right.bar(BUDGETS, heights, bottom=bottom, label=kind, width=0.6)
        bottom += heights
    right.set(xlabel="error budget", ylabel="share of the heads", ylim=(0, 1.25))
    right.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
    figure.savefig(path, dpi=140)


def main() -> None:
    """Measure, or render what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", nargs="+", type=Path)
    parser.add_argument("--tokens", nargs="+", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--render", type=Path, help="render an earlier quality_gpu.json only")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.render:
        report = json.loads(options.render.read_text())
        plot(report, options.out / "quality_gpu.png")
        (options.out / "quality_gpu.md").write_text(markdown(report))
        return
    report = measure(options)
    (options.out / "quality_gpu.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
