"""The backend ``torch`` beside PyTorch's own attention on a CPU: real heads, and a model.

    python benchmarks/capture_qkv.py TEXT.txt --out OUT/prose        # once per text
    python benchmarks/cpu_torch.py OUT/prose OUT/code --markdown docs/benchmarks/cpu.md

With ``--model-text TEXT.txt`` SmolLM2 continues 1,800 tokens of a text by 24, the three ways.

Every layer runs three ways in turn, in float32 and with the same threads: PyTorch's function,
AdaAttn's without a budget, and AdaAttn's with ``budget=0.1`` (measuring, planning and the
certificate included). Figures are medians over repeats of ratios to PyTorch's time of the same
round. On a machine with other work ``--undisturbed`` (Linux) repeats a call while which other
processes took 5% of a core, and ``--clock process --threads 1`` counts the process's own time.
The page's section of that name is replaced; the rest of the page stays.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 -- its usual name

import adaattn_torch
from adaattn_bench import models
from adaattn_core import Mask, attention
from adaattn_torch.entries.transformers import budgets, register_transformers

TITLE = "## The backend torch beside PyTorch's own attention"
WAYS = ("no budget", "budget 0.1")
HEADS = ("share", "held", "covered")
SHORT = (1, 128, 512, 2048)
"""Lengths at which the function without a budget is timed as well."""
PROMPT, GENERATED = 1800, 24
"""Tokens that a model reads, and makes."""


def load(path: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Return q, k, v of shape (1, heads, len, dim) in float32 and the scale of a layer."""
    with np.load(path) as file:
        q, k, v = (file[n].view(ml_dtypes.bfloat16)[None].astype(np.float32) for n in "qkv")
        return (
            torch.from_numpy(q),
            torch.from_numpy(k),
            torch.from_numpy(v),
            float(file["scale"]),
        )


def calls(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> dict[str, Callable[[], object]]:
    """Return the three ways."""
    shared = {"is_causal": True, "scale": scale, "enable_gqa": True}
    ours = adaattn_torch.scaled_dot_product_attention
    return {
        "PyTorch": lambda: F.scaled_dot_product_attention(q, k, v, **shared),
        "no budget": lambda: ours(q, k, v, **shared),
        "budget 0.1": lambda: ours(q, k, v, budget=0.1, **shared),
    }


CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
clock = CLOCKS["wall"]


undisturbed = False
DISTURBED, SPARE_SECONDS, TRIES = 0.05, 0.01, 40


def others() -> float:
    """Seconds that cores gave to other processes, the host's among them, since some moment."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    user, nice, system, _, _, irq, softirq, steal = fields
    mine = os.times()
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - mine.user - mine.system


def seconds(call: Callable[[], object]) -> float:
    """Time a call, again while others disturb it, if that is asked for."""
    for _ in range(TRIES if undisturbed else 1):
        before = others() if undisturbed else 0.0
        started = clock()
        call()
        taken = clock() - started
        if not undisturbed or others() - before <= DISTURBED * taken + SPARE_SECONDS:
            break
        time.sleep(0.3)
    return taken


def rounds(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, taken in turn; the first round is not kept."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for number in range(repeats + 1):
            for name, call in ways.items():
                taken = seconds(call)
                if number:
                    times[name].append(taken)
    return times


def ratio(times: dict[str, list[float]], name: str) -> float:
    """Median over rounds of a way's time over PyTorch's."""
    return statistics.median(
        mine / theirs for mine, theirs in zip(times[name], times["PyTorch"], strict=True)
    )


def heads_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> list[tuple[float, float, float]]:
    """Share kept, certified error and true error of every head under the budget."""
    exact = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=True
    )
    result = attention(q, k, v, mask=Mask.causal(), scale=scale, budget=0.1, backend="torch")
    missed = torch.linalg.vector_norm((result.out - exact).double(), dim=3)
    sizes = torch.linalg.vector_norm(result.out.double(), dim=3).square().mean(dim=2).sqrt()
    true = torch.quantile(missed, 0.95, dim=2) / sizes
    return [
        (facts.share, result.certificate[index].upper, float(true[index]))
        for index, facts in result.facts.items()
    ]


def measure(folder: Path, step: int, repeats: int) -> dict[str, list[float]]:
    """Ratios of every `step`-th layer of a text, PyTorch's seconds, and facts of the heads."""
    found: dict[str, list[float]] = {name: [] for name in (*WAYS, "seconds", *HEADS)}
    for path in sorted(folder.glob("*.npz"))[::step]:
        times = rounds(calls(*load(path)), repeats)
        for name in WAYS:
            found[name].append(ratio(times, name))
        found["seconds"].append(statistics.median(times["PyTorch"]))
        for share, upper, true in heads_of(*load(path)):
            found["share"].append(share)
            found["held"].append(upper <= 0.1)
            found["covered"].append(true <= upper)
        print(path.name, {n: round(x[-1], 3) for n, x in found.items()}, flush=True)
    return found


def short(folder: Path) -> dict[int, tuple[float, float]]:
    """Microseconds of PyTorch and of AdaAttn without a budget at short lengths, by length."""
    q, k, v, scale = load(min(folder.glob("*.npz")))
    found = {}
    for length in SHORT:
        parts = (x[:, :, :length].contiguous() for x in (q, k, v))
        ways = calls(*parts, scale)
        ways.pop("budget 0.1")
        times = rounds(ways, 400 if length < 512 else 25)
        theirs = statistics.median(times["PyTorch"])
        found[length] = (1e6 * theirs, 1e6 * theirs * ratio(times, "no budget"))
        print(length, found[length], flush=True)
    return found


def generated(text: Path, repeats: int) -> dict[str, float]:
    """Seconds of `generate` by PyTorch's attention, and ratios to them; nobody listens."""
    model = models.load(models.SMOLLM2)
    ids = model.encode(text.read_text(errors="ignore"), PROMPT)[None]
    ours = register_transformers()
    ways = {"PyTorch": ("sdpa", None), "no budget": (ours, None), "budget 0.1": (ours, 0.1)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[int]] = {}

    def answer(name: str) -> None:
        made = model.network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=GENERATED,
            min_new_tokens=GENERATED, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        tokens[name] = made[0, PROMPT:].tolist()

    for number in range(repeats + 1):
        for name, (attention_name, budget) in ways.items():
            model.network.set_attn_implementation(attention_name)
            with torch.no_grad(), budgets(budget):
                taken = seconds(partial(answer, name))
            if number:
                times[name].append(taken)
    same = {name: found == tokens["PyTorch"] for name, found in tokens.items()}
    theirs = statistics.median(times["PyTorch"])
    found = {"PyTorch": theirs, **{name: ratio(times, name) for name in WAYS}}
    print("generate", found, "same tokens", same, flush=True)
    return found


def section(
    texts: dict[str, dict[str, list[float]]],
    lengths: dict[int, tuple[float, float]],
    threads: int,
    clock_name: str,
    model: dict[str, float] | None,
) -> str:
    """Render the section."""
    lines = [
        TITLE, "",
        f"{platform.machine()}, {threads} thread(s), {clock_name} time,"
        f" PyTorch {torch.__version__},"
        f" {datetime.date.today().isoformat()}, SmolLM2-135M-Instruct, 8,192 tokens, causal,"
        " float32. Command: `python benchmarks/cpu_torch.py DIR ... --markdown"
        " docs/benchmarks/cpu.md`. Times over PyTorch's `scaled_dot_product_attention` of the"
        " same round; below 1 is faster.", "",
        "| | " + " | ".join(texts) + " |", "|---|" + "---|" * len(texts),
        "| layers | " + " | ".join(str(len(t["seconds"])) for t in texts.values()) + " |",
        "| PyTorch, seconds a layer (median) | "
        + " | ".join(f"{statistics.median(t['seconds']):.2f}" for t in texts.values()) + " |",
    ]  # fmt: skip
    for way in WAYS:
        for what, over in (("mean over layers", statistics.mean), ("worst layer", max)):
            cells = " | ".join(f"{over(t[way]):.3f}" for t in texts.values())
            lines.append(f"| {way}, {what} | {cells} |")
    shares = [t["share"] for t in texts.values()]
    for what, cells in (
        ("heads", [str(len(x)) for x in shares]),
        ("mean share of causal scores kept", [f"{statistics.mean(x):.3f}" for x in shares]),
        ("median share", [f"{statistics.median(x):.3f}" for x in shares]),
        ("heads run dense", [str(sum(share == 1 for share in x)) for x in shares]),
        (
            "certificates within the budget",
            [f"{statistics.mean(t['held']):.1%}" for t in texts.values()],
        ),
        (
            "coverage (true 95% row error <= upper)",
            [f"{statistics.mean(t['covered']):.1%}" for t in texts.values()],
        ),
    ):
        lines.append(f"| {what} | {' | '.join(cells)} |")
    lines += ["", "| tokens | PyTorch, µs | without a budget, µs |", "|---|---|---|"]
    lines += [f"| {n:,} | {a:,.0f} | {b:,.0f} |" for n, (a, b) in lengths.items()]
    if model is not None:
        lines += [
            "",
            f"SmolLM2 continues {PROMPT:,} tokens by {GENERATED} in {model['PyTorch']:.2f} s by"
            f" PyTorch's attention, in {model['no budget']:.3f} of that without a budget, in"
            f" {model['budget 0.1']:.3f} of it with 0.1.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the section if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="captured layers, one text each")
    parser.add_argument("--step", type=int, default=1, help="every so many layers")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--undisturbed", action="store_true")
    parser.add_argument("--model-text", type=Path, help="also time `generate` on it")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    global clock, undisturbed
    clock = CLOCKS[args.clock]
    torch.set_num_threads(args.threads)
    lengths = short(args.folders[0])  # looking at others would empty caches between them
    undisturbed = args.undisturbed
    texts = {f.name: measure(f, args.step, args.repeats) for f in args.folders}
    model = generated(args.model_text, 3) if args.model_text else None
    new = section(texts, lengths, args.threads, args.clock, model)
    print(new)
    if args.markdown:
        old = args.markdown.read_text() if args.markdown.exists() else ""
        parts = [p for p in re.split(r"^(?=## )", old, flags=re.M) if not p.startswith(TITLE)]
        place = 1 + next((i for i, p in enumerate(parts) if p.startswith("## Needles")), 0)
        parts.insert(place, new + "\n")
        args.markdown.write_text("".join(parts))


if __name__ == "__main__":
    main()
