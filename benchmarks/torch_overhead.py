"""Host time of one call of the PyTorch adapter beside PyTorch's own, eager and compiled.

    python benchmarks/torch_overhead.py --markdown docs/benchmarks/torch_overhead.md

Small shapes, where the host decides. A call is timed from its start to its return: on a CPU
that holds the arithmetic too, on a GPU the device works behind it. The calls take turns, since
a host's own pace varies; figures are medians. The page keeps one section for the CPU and one
for the GPU: a run replaces that of its own kind.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- its usual name

import adaattn_torch
from adaattn_bench.clock import until_return
from adaattn_core.backend import Backend
from adaattn_core.plugins.registry import get_backend

DIM = 64
SHAPES: dict[str, tuple[int, int, int]] = {
    "1 head, 1 token": (1, 1, 1),
    "1 head, 16 tokens": (1, 16, 16),
    "1 head, 128 tokens": (1, 128, 128),
    "8 heads, 128 tokens": (8, 128, 128),
    "8 heads, 1 token, 128 keys": (8, 1, 128),
}
CALLS = {
    "torch": "PyTorch's function",
    "exact": "AdaAttn's function",
    "mode": "PyTorch's under `enable()`",
    "info": "AdaAttn's with `return_info=True`",
    "budget": "AdaAttn's with `budget=0.1`",
    "torch compiled": "PyTorch's, compiled",
    "exact compiled": "AdaAttn's, compiled",
}
INTRODUCTION = """# Host time of a call from PyTorch

`python benchmarks/torch_overhead.py --markdown docs/benchmarks/torch_overhead.md`. Medians in
microseconds from the start of a call to its return, batch 1, head dim 64, no mask; the calls
take turns, so compare within a column. "Compiled" is `torch.compile(fullgraph=True)` of that
call alone. Under `enable()`, with `return_info=True` or a budget, every call has a plan and a
certificate; AdaAttn's function alone has none where the backend offers that.
"""


def calls(shape: tuple[int, int, int], device: str) -> dict[str, Callable[[], Any]]:
    """Every way to compute one attention."""
    heads, len_q, len_kv = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (
        torch.randn(1, heads, n, DIM, device=device, dtype=dtype)
        for n in (len_q, len_kv, len_kv)
    )
    ours, theirs = adaattn_torch.scaled_dot_product_attention, F.scaled_dot_product_attention
    torch._dynamo.reset()
    compiled = {
        "torch compiled": torch.compile(lambda q, k, v: theirs(q, k, v), fullgraph=True),
        "exact compiled": torch.compile(lambda q, k, v: ours(q, k, v), fullgraph=True),
    }
    mode = adaattn_torch.enable()

    def under_mode() -> torch.Tensor:
        with mode:
            return theirs(q, k, v)

    return {
        "torch": lambda: theirs(q, k, v),
        "exact": lambda: ours(q, k, v),
        "mode": under_mode,
        "info": lambda: ours(q, k, v, return_info=True),
        "budget": lambda: ours(q, k, v, budget=0.1),
        "torch compiled": lambda: compiled["torch compiled"](q, k, v),
        "exact compiled": lambda: compiled["exact compiled"](q, k, v),
    }


def microseconds(
    ways: dict[str, Callable[[], Any]], rounds: int, repeats: int
) -> dict[str, float]:
    """Median time until each call returns, warm and without a graph."""
    with torch.no_grad():
        for call in ways.values():
            for _ in range(3):  # compiles, loads, fills caches
                call()
        return until_return(ways, rounds, repeats)


def section(rows: dict[str, dict[str, float]], device: str, threads: int) -> str:
    """Render one device's table."""
    backend: Backend = get_backend("auto", device)
    short = "offers" if hasattr(backend, "forward") else "does not offer"
    what = (
        f"{torch.cuda.get_device_name()}, bf16"
        if device == "cuda"
        else f"{platform.machine()}, {threads} thread{'s' * (threads != 1)}, f32"
    )
    lines = [
        f"## {'GPU' if device == 'cuda' else 'CPU'}",
        "",
        f"{what}, PyTorch {torch.__version__}, {datetime.date.today().isoformat()}. The backend"
        f" `{backend.name}` {short} exact attention without a certificate.",
        "",
        "| | " + " | ".join(rows) + " |",
        "|---|" + "---|" * len(rows),
    ]
    for call, label in CALLS.items():
        cells = [f"{row[call]:,.1f}" if call in row else "" for row in rows.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page(old: str, new: str) -> str:
    """Put a section on the page: instead of that of its kind, beside the other."""
    known = {text.split("\n")[0]: text for text in re.split(r"^(?=## )", old, flags=re.M)[1:]}
    known[new.split("\n")[0]] = new
    parts = [INTRODUCTION, *(known[title] for title in sorted(known))]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def main() -> None:
    """Measure, print, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on a CPU")
    parser.add_argument("--markdown", type=Path, help="page to write the table to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        rows = {}
        for name, shape in SHAPES.items():
            rows[name] = microseconds(calls(shape, device), args.rounds, args.repeats)
            print(device, name, {k: round(x, 1) for k, x in rows[name].items()}, flush=True)
        if args.markdown:
            old = args.markdown.read_text() if args.markdown.exists() else ""
            args.markdown.write_text(page(old, section(rows, device, args.threads)))


if __name__ == "__main__":
    main()
