"""Decode steps over pages on a GPU, against PyTorch's attention and the copy rate.

    python benchmarks/gpu_decode.py --out docs/benchmarks [--heads DIR] [--revision REV]
    python benchmarks/gpu_decode.py --render FILE.json    table and plot from an earlier run

One row of 32 query heads over 8 key/value heads of dim 128: 16-bit pages, 8-bit pages. With
`--heads` (files of gpu_capture.py) also real caches of SmolLM2, with values skipped at the
threshold of a budget of 0.1. Everything in one run. As in a model, whose layers follow each
other, a time is that of one of many calls in a row, each over another cache of the same size:
no cache is in L2, the code is, and the host is ahead.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- its usual name
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaattn_core.decoding import DevicePages
from adaattn_core.plugins.registry import get_backend
from adaattn_cuda.tuning.smxx_attn_decode import CHUNK_KEYS as CHUNK
from adaattn_torch.cache.layer import PagedLayer
from adaattn_torch.cache.rounding import quantise
from decode_report import markdown, plot

HEADS_Q, HEADS_KV, DIM, PAGE = 32, 8, 128, 128
SIZES = tuple((b, n) for b in (1, 16) for n in (8192, 32_768, 131_072) if b * n <= 2**20)
BUDGET = 0.1
CALLS = 12
WAIT_CYCLES = 3_000_000
"""About 1.6 ms: longer than so many calls keep the host."""
COLD_BYTES = 240_000_000
Pair = tuple[torch.Tensor, torch.Tensor]
Calls = list[Callable[[], Any]]
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


def burst_us(calls: Sequence[Callable[[], Any]]) -> float:
    """Device time of a call, of calls in turn."""
    rounds = max(1, -(-CALLS // len(calls)))
    torch.cuda._sleep(WAIT_CYCLES)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(rounds):
        for call in calls:
            call()
    events[1].record()
    torch.cuda.synchronize()
    return 1e3 * events[0].elapsed_time(events[1]) / (rounds * len(calls))


def take_turns(contenders: Mapping[str, Calls], repeats: int = 9) -> dict[str, float]:
    """Median device times; all take turns, so that no clock favours one."""
    for calls in contenders.values():
        for call in calls:
            call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, calls in contenders.items():
            times[name].append(burst_us(calls))
    return {name: statistics.median(spent) for name, spent in times.items()}


def copies(size: int) -> int:
    """Return how many caches of `size` bytes do not fit into L2 together."""
    return max(2, -(-COLD_BYTES // size))


def host_us(call: Callable[[], Any], repeats: int = 300) -> float:
    """Mean host time of a call that waits for nothing."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    spent = time.perf_counter() - started
    torch.cuda.synchronize()
    return 1e6 * spent / repeats


def copy_rate() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / (1e-6 * take_turns({"copy": [lambda: target.copy_(source)]})["copy"])


def on_pages(key: torch.Tensor, value: torch.Tensor, narrow: str) -> DevicePages:
    """Put (batch, heads, len, dim) keys and values on pages; `narrow`: ``""``, i8 or e4m3."""
    batch, heads, length, dim = key.shape
    wide = [x.reshape(-1, PAGE, dim) for x in (key, value)]
    table = torch.arange(batch * heads * length // PAGE, device="cuda", dtype=torch.int32)
    table = table.reshape(batch, heads, -1)
    codes: list[Any] = [None, None]
    if narrow:
        codes = [tuple(quantise(x, narrow)[:4]) for x in wide]
    else:
        table = -1 - table
    lengths = torch.full((batch,), length, device="cuda", dtype=torch.int32)
    return DevicePages(wide[0], wide[1], codes[0], codes[1], narrow or "i8", table.contiguous(),
                       lengths, torch.zeros_like(lengths), length)  # fmt: skip


def peers(query: torch.Tensor, caches: list[Pair]) -> dict[str, Calls]:
    """PyTorch's own attention, by backend."""

    def attend(backend: SDPBackend, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    return {
        name: [partial(attend, backend, *cache) for cache in caches]
        for name, backend in PEERS.items()
    }


def steps(
    backend: Any, query: torch.Tensor, caches: list[Pair], narrow: str, **how: float
) -> Calls:
    """Decode steps over the caches, on pages; narrow ones are fewer bytes, so twice each."""
    pages = [on_pages(*cache, narrow) for cache in caches * (2 if narrow else 1)]
    return [partial(backend.decode, query, each, **how) for each in pages]


def synthetic(backend: Any, rate: float) -> list[dict[str, Any]]:
    """Time normally distributed caches of every size."""
    rows = []
    for batch, length in SIZES:
        query = torch.randn(batch, HEADS_Q, 1, DIM, device="cuda", dtype=torch.bfloat16)
        shape = (batch, HEADS_KV, length, DIM)
        moved = 4 * batch * HEADS_KV * length * DIM
        caches = [
            (torch.randn(shape, device="cuda", dtype=torch.bfloat16),
             torch.randn(shape, device="cuda", dtype=torch.bfloat16))
            for _ in range(copies(moved))
        ]  # fmt: skip
        contenders = peers(query, caches)
        for name, narrow in (("wide", ""), ("i8", "i8"), ("e4m3", "e4m3")):
            contenders[name] = steps(backend, query, caches, narrow, scale=DIM**-0.5)
        row = {"batch": batch, "len": length, "copy_us": 1e6 * moved / rate}
        rows.append(
            row | {"us": take_turns(contenders), "host_us": host_us(contenders["i8"][0])}
        )
        print(rows[-1], flush=True)
    return rows


def middle_and_most(x: torch.Tensor) -> tuple[float, float]:
    """Median and largest."""
    return float(x.median()), float(x.max())


class Captured:
    """Layers of a captured file side by side as a batch; exact attention of their last row.

    Attributes
    ----------
    light : float
        Share of runs of 64 keys whose values a budget's threshold lets be, by exact scores.
    """

    def __init__(self, path: Path) -> None:
        layers = torch.load(path)["layers"].values()
        self.query = torch.stack([x["q"][:, -1:] for x in layers]).cuda()
        key, value = (torch.stack([x[n] for x in layers]).cuda() for n in "kv")
        self.length = key.shape[2] // PAGE * PAGE
        self.key, self.value = (x[:, :, : self.length].contiguous() for x in (key, value))
        self.scale, self.lam = self.key.shape[3] ** -0.5, BUDGET / self.length
        group = self.query.shape[1] // key.shape[1]
        rows = self.query.reshape(*key.shape[:2], group, -1).double()
        scores = rows @ self.key.double().mT * self.scale
        weights = scores.softmax(-1)
        values = self.value.double()
        self.exact = (weights @ values).reshape(*self.query.shape)
        self.runs = weights.reshape(*key.shape[:2], group, -1, CHUNK).mean(-1)
        self.light = float((self.runs.amax(2) < self.lam).double().mean())
        around = (values - values.mean(2, keepdim=True)).norm(dim=-1).amax(-1)
        self.diameter = 2 * around.repeat_interleave(group, 1)

    def caches(self) -> list[Pair]:
        """As many copies as do not fit into L2."""
        more = copies(4 * self.key.numel()) - 1
        return [(self.key, self.value)] + [
            (self.key.clone(), self.value.clone()) for _ in range(more)
        ]

    def error(self, out: torch.Tensor) -> tuple[float, float]:
        """Error of a row relative to it, of the heads."""
        found = (out.double() - self.exact).norm(dim=-1) / self.exact.norm(dim=-1)
        return middle_and_most(found)

    def bound(self, dropped: torch.Tensor) -> tuple[float, float]:
        """Theorem 11 for the mass whose values were left, relative to the row."""
        lost = dropped.squeeze(2).double() * self.diameter
        return middle_and_most(lost / self.exact.norm(dim=-1).squeeze(2))

    def skipped(self, backend: Any) -> float:
        """Share of runs of 64 keys whose values the kernel leaves: found by NaN in each.

        Values of a run that is read make the row NaN; a page is poisoned at a time.
        """
        stride = max(1, self.length // PAGE // 64)
        value = self.value.clone()
        pages = on_pages(self.key, value, "")
        left = []
        for page in range(0, self.length // PAGE, stride):
            for half in (0, CHUNK):
                keys = slice(page * PAGE + half, page * PAGE + half + CHUNK)
                kept = value[:, :, keys].clone()
                value[:, :, keys] = torch.nan
                out = backend.decode(self.query, pages, scale=self.scale, lam=self.lam)[0]
                value[:, :, keys] = kept
                group = out.reshape(*self.key.shape[:2], -1)
                left.append((~group.isnan().any(-1)).double().mean())
        return float(torch.stack(left).mean())


def real(backend: Any, folder: Path) -> list[dict[str, Any]]:
    """Time captured caches."""
    rows = []
    for path in sorted(folder.glob("qkv-*.pt"), key=lambda x: (int(x.stem.split("-")[1]), x)):
        data = Captured(path)
        caches = data.caches()
        contenders = peers(data.query, caches)
        errors, dropped = {}, torch.zeros(())
        for name, narrow, lam in (
            ("wide", "", 0.0), ("i8", "i8", 0.0), ("wide_skip", "", data.lam),
            ("i8_skip", "i8", data.lam),
        ):  # fmt: skip
            calls = steps(backend, data.query, caches, narrow, scale=data.scale, lam=lam)
            contenders[name] = calls
            out, _, dropped = calls[0]()
            errors[name] = data.error(out)
        rows.append({
            "file": path.stem, "len": data.length, "light": data.light,
            "skipped": data.skipped(backend), "dropped": middle_and_most(dropped),
            "bound": data.bound(dropped), "error": errors, "us": take_turns(contenders),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def footprint() -> list[tuple[int, float]]:
    """Bytes of an i8 cache against 16 bits, by keys."""
    found = []
    for length in (8192, 32_768, 131_072):
        shape = (1, HEADS_KV, length, DIM)
        key, value = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
        pages = PagedLayer(PAGE, "i8", math.inf, 0)
        pages.append(key, value)
        mine, plain = pages.footprint()
        found.append((length, mine / plain))
    return found


def main() -> None:
    """Measure and write the report, or render an earlier one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--heads", type=Path, help="folder of gpu_capture.py's files")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--render", type=Path)
    parser.add_argument("--revision", default="unknown", help="of this repository")
    options = parser.parse_args()
    if options.render:
        report = json.loads(options.render.read_text())
        options.render.with_suffix(".md").write_text(markdown(report))
        plot(report, options.render.with_suffix(".png"))
        return
    backend, rate = get_backend("cuda"), copy_rate()
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "date": datetime.now(UTC).date().isoformat(),
        "revision": options.revision,
        "budget": BUDGET,
        "copy": rate,
        "footprint": footprint(),
        "synthetic": synthetic(backend, rate),
        "real": real(backend, options.heads) if options.heads else [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_decode.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "gpu_decode.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
