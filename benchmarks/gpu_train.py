"""Train a GPT on one GPU with each attention in turn, and compare curves and speed.

    python benchmarks/gpu_train.py --out DIR               writes gpu_train.json
    python benchmarks/gpu_train.py --render FILE.json      table and plot from an earlier run

Fourteen layers of width 768, twelve heads, context 1,024, bytes as tokens: 100 million
parameters. The text is the Python source of the standard library, the same on every machine
with the same Python. bf16 autocast, AdamW, the same initial weights and batches for every
attention: the two fused ones of PyTorch, this library's exact one, and the same with a budget
of 0.05. How far PyTorch's own two curves lie apart is what counts as noise.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaattn_torch import scaled_dot_product_attention as ours

LAYERS, WIDTH, HEADS, CONTEXT = 14, 768, 12, 1024
BATCH = 16
Attention = Callable[..., torch.Tensor]


class Block(nn.Module):
    """Attention and a feed-forward layer, normalised before."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the residual stream behind the block."""
        batch, length, _ = x.shape
        q, k, v = (
            y.view(batch, length, HEADS, -1).transpose(1, 2)
            for y in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        mixed = self.attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Gpt(nn.Module):
    """A GPT over bytes."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(attention) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.place(places))))


def by(backend: SDPBackend) -> Attention:
    """Return PyTorch's attention by one of its kernels."""

    def attention(*x: torch.Tensor, **given: Any) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*x, **given)

    return attention


def text() -> torch.Tensor:
    """Bytes of the standard library's sources, in the order of their names."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    data = b"\n".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long().cuda()


def train(attention: Attention, data: torch.Tensor, steps: int) -> dict[str, Any]:
    """Train from the same weights; losses, and tokens per second of the second half."""
    torch.manual_seed(0)
    model = Gpt(attention).cuda()
    optimiser = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(1)
    losses, marks = [], []
    for step in range(steps):
        first = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=generator).cuda()
        window = data[first[:, None] + torch.arange(CONTEXT + 1, device="cuda")]
        for group in optimiser.param_groups:
            group["lr"] = 6e-4 * min(1.0, (step + 1) / 50)
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.detach())
        if step in (steps // 2, steps - 1):
            torch.cuda.synchronize()
            marks.append((step, time.perf_counter()))
    (s0, t0), (s1, t1) = marks
    return {
        "losses": [float(x) for x in losses],
        "tokens_per_s": (s1 - s0) * BATCH * CONTEXT / (t1 - t0),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def measure(steps: int, revision: str) -> Iterator[dict[str, Any]]:
    """Train with each attention; the report so far behind every one."""
    data = text()
    contenders: dict[str, Attention] = {
        "PyTorch, cuDNN": by(SDPBackend.CUDNN_ATTENTION),
        "adaattn, exact": ours,
        "PyTorch, FlashAttention-2": by(SDPBackend.FLASH_ATTENTION),
        "adaattn, budget 0.05": lambda *x, **given: ours(*x, **given, budget=0.05),
    }
    runs: dict[str, Any] = {}
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/gpu_train.py",
        "revision": revision,
        "steps": steps,
        "text_bytes": len(data),
        "runs": runs,
    }
    for name, attention in contenders.items():
        train(attention, data, 4)
        runs[name] = train(attention, data, steps)
        end = statistics.fmean(runs[name]["losses"][-20:])
        print(f"{name}: {end:.4f}, {runs[name]['tokens_per_s']:.0f} tokens/s", flush=True)
        yield report


def apart(one: list[float], other: list[float]) -> float:
    """Root-mean-square difference of two curves behind the warm-up."""
    pairs = zip(one[50:], other[50:], strict=True)
    return math.sqrt(statistics.fmean((a - b) ** 2 for a, b in pairs))


def markdown(report: dict[str, Any]) -> str:
    """Table of a report."""
    runs = report["runs"]
    base = next(iter(runs.values()))
    lines = [
        "# Training a GPT",
        "",
        f"{report['device']}, PyTorch {report['torch']}, {report['date']}."
        f" `{report['command']}` at revision {report['revision']}.",
        "",
        f"{base['parameters'] / 1e6:.0f} million parameters, {LAYERS} layers,"
        f" {BATCH} x {CONTEXT} bytes a step, {report['steps']} steps, bf16 autocast. Loss is"
        " the mean of the last 20 steps; the difference is the root mean square of the steps'"
        " losses from the first row's behind step 50; that of PyTorch's other kernel is noise.",
        "",
        "| attention | loss | difference | tokens/s |",
        "|---|---|---|---|",
    ]
    for name, run in runs.items():
        end = statistics.fmean(run["losses"][-20:])
        rate = run["tokens_per_s"]
        lines.append(
            f"| {name} | {end:.4f} | {apart(run['losses'], base['losses']):.4f} | {rate:,.0f} |"
        )
    lines += ["", "![Loss by step](gpu_train.png)", ""]
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Curves of all runs, and below how far each is from the first, in the mean of 20 steps."""
    plt = importlib.import_module("matplotlib.pyplot")
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 5.2), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    base = next(iter(report["runs"].values()))["losses"]
    for name, run in report["runs"].items():
        (line,) = above.plot(run["losses"], label=name, linewidth=0.9)
        off = [a - b for a, b in zip(run["losses"], base, strict=True)]
        means = [statistics.fmean(off[i - 20 : i]) for i in range(20, len(off) + 1)]
        below.plot(range(19, len(off)), means, color=line.get_color(), linewidth=1.2)
    above.set_ylabel("loss, nats a byte")
    above.set_ylim(top=4)
    above.legend(frameon=False, fontsize=8)
    below.set_ylabel("difference,\nmean of 20 steps")
    below.set_xlabel("step")
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train, or render an earlier run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--render", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--revision", default="unknown", help="of this repository, for the record"
    )
    options = parser.parse_args()
    if options.render:
        report = json.loads(options.render.read_text())
        options.render.with_suffix(".md").write_text(markdown(report))
        plot(report, options.render.with_suffix(".png"))
        return
    for report in measure(options.steps, options.revision):
        (options.out / "gpu_train.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
