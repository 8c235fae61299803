"""Check ``sm90_attn_fwd_f16`` against an fp64 oracle and time specialisations of it: ``python benchmarks/gpu_check_sm90.py --out DIR``.

Every specialisation is compiled first. A child process then checks and times them one after the other and reports a JSON line for
each finding; when it falls silent (a kernel hangs), it is ended, the specialisation at fault is set aside, and a new child goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import queue
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sm90_direct import DTYPES, Kernel, Launch, compile_all, compile_cubin

from torch.nn.attention import SDPBackend, sdpa_kernel

from adaattn_cuda.sm90 import plan_launch
from adaattn_cuda.sm90_work import Geometry, Span
from adaattn_cuda.tuning.sm90 import Tile

SILENCE_SECONDS = 40.0
TOKENS = 16_384


@dataclass(frozen=True)
class Case:
    """One problem: spans in (batch, heads, len, dim) arrays and a mask."""

    name: str
    spans: tuple[Span, ...]
    batch: int
    len_q: int
    len_kv: int
    heads_q: int = 4
    heads_kv: int = 2
    dim_qk: int = 0  # 0: the tile's
    dim_v: int = 0
    bottom_right: bool = False
    left: int | None = None
    right: int | None = None
    layout: str = "bhsd"
    poison: bool = False


def cases() -> Iterator[Case]:
    """Shapes and masks that every specialisation must get right."""
    two = (Span(0, 0, 384, 0, 512), Span(1, 0, 384, 0, 512))
    yield Case("full", two, 2, 384, 512)
    yield Case("full bshd", two, 2, 384, 512, layout="bshd")
    yield Case("causal top-left", two, 2, 384, 512, right=0)
    yield Case("causal bottom-right", two, 2, 384, 512, right=0, bottom_right=True)
    yield Case("causal, more queries than keys", (Span(0, 0, 700, 0, 300),), 1, 700, 300, right=0, bottom_right=True)
    yield Case("window", two, 2, 384, 512, left=100, right=30, bottom_right=True)
    yield Case("odd lengths", (Span(0, 0, 333, 0, 777),), 1, 333, 777, right=0, bottom_right=True)
    yield Case("one query, one key", (Span(0, 0, 1, 0, 1),), 1, 1, 1)
    yield Case("key lengths", (Span(0, 0, 200, 0, 0), Span(1, 0, 200, 0, 1), Span(2, 0, 200, 0, 450)), 3, 200, 512, poison=True)
    ragged = (Span(0, 0, 5, 0, 70), Span(0, 5, 300, 70, 300), Span(0, 305, 0, 370, 10), Span(0, 305, 257, 380, 512))
    yield Case("ragged", ragged, 1, 562, 892, poison=True)
    yield Case("ragged causal", ragged, 1, 562, 892, right=0, bottom_right=True, poison=True)
    yield Case("dims less 8", two, 2, 384, 512, dim_qk=-8, dim_v=-24, right=0)
    yield Case("causal, poisoned future", (Span(0, 0, 600, 0, 600),), 1, 600, 600, right=0, poison=True)
    yield Case("long", (Span(0, 0, 2048, 0, 2048),), 1, 2048, 2048, heads_q=2, heads_kv=1, right=0)


def visible(case: Case, span: Span) -> torch.Tensor:
    """Boolean mask of one span, (len_q, len_kv), written from the definition."""
    row = torch.arange(span.len_q, device="cuda")[:, None]
    column = torch.arange(span.len_kv, device="cuda")[None]
    aligned = row + (span.len_kv - span.len_q if case.bottom_right else 0)
    seen = torch.ones(span.len_q, span.len_kv, dtype=torch.bool, device="cuda")
    if case.left is not None:
        seen &= column >= aligned - case.left
    if case.right is not None:
        seen &= column <= aligned + case.right
    return seen


def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float) -> tuple[torch.Tensor, ...]:
    """(out, lse, out with probabilities and result rounded like the kernel's), all but the last in f64."""
    if 0 in (q.shape[1], k.shape[1]):
        nothing = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64, device="cuda")
        return nothing, torch.full(q.shape[:2], -math.inf, dtype=torch.float64, device="cuda"), nothing
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    scores = (q.double() @ k.double().mT) * scale
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, -1)
    top = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    p = torch.exp(scores - top)
    total = p.sum(-1, keepdim=True)
    inverse = torch.where(total > 0, 1 / total, 0.0)
    out = (p @ v.double()) * inverse
    rounded = ((p.to(q.dtype).double() @ v.double()) * inverse).to(q.dtype).double()
    return out, lse, rounded


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frobenius norm of a - b over that of b; NaN never passes."""
    norm = float(b.norm())
    return float((a - b).norm()) / norm if norm > 0 else float(a.norm())


def tensor(case: Case, heads: int, length: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Random (batch, heads, len, dim) view in the case's layout."""
    shape = (case.batch, heads, length, dim) if case.layout == "bhsd" else (case.batch, length, heads, dim)
    x = torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)
    return x if case.layout == "bhsd" else x.transpose(1, 2)


def check(kernel: Kernel, dtype: str, case: Case, blocks: int) -> dict[str, Any]:
    """Errors of one case."""
    tile = kernel.tile
    dim_qk = case.dim_qk if case.dim_qk > 0 else tile.dim_qk + case.dim_qk
    dim_v = case.dim_v if case.dim_v > 0 else tile.dim_v + case.dim_v
    kind = DTYPES[dtype]
    q = tensor(case, case.heads_q, case.len_q, dim_qk, kind)
    k = tensor(case, case.heads_kv, case.len_kv, dim_qk, kind)
    v = tensor(case, case.heads_kv, case.len_kv, dim_v, kind)
    scale = 1.3 / math.sqrt(dim_qk)
    geometry = Geometry(
        case.spans, case.heads_q, case.heads_kv, dim_qk, dim_v, case.bottom_right, case.left, case.right
    )
    dirty_k, dirty_v, dirty_rows = k.clone(), v.clone(), {}
    if case.poison:  # NaN wherever no row, or only some rows, of a sequence may look
        used = torch.zeros(case.batch, case.len_kv, dtype=torch.bool, device="cuda")
        for index, span in enumerate(case.spans):
            used[span.batch, span.kv_first : span.kv_first + span.len_kv] = True
            if case.right is not None and span.len_kv > 40:
                at = span.len_kv - 20
                dirty_v[span.batch, :, span.kv_first + at] = math.inf
                dirty_k[span.batch, :, span.kv_first + at] = math.nan
                dirty_rows[index] = visible(case, span)[:, at]
        for x in (dirty_k, dirty_v):
            x.masked_fill_(~used[:, None, :, None], math.nan)
    launch = Launch.prepare(kernel, plan_launch(geometry, dtype, blocks, tile), q, [dirty_k], [dirty_v], scale)
    launch()
    torch.cuda.synchronize()
    worst = {"out": 0.0, "limit": 0.0, "lse": 0.0}
    passed = True
    for index, span in enumerate(case.spans):
        rows = slice(span.q_first, span.q_first + span.len_q)
        cols = slice(span.kv_first, span.kv_first + span.len_kv)
        out, lse, rounded = oracle(q[span.batch, :, rows], k[span.batch, :, cols], v[span.batch, :, cols], visible(case, span), scale)
        got = launch.out[span.batch, :, rows].double()
        got_lse = launch.lse[span.batch, :, rows].double()
        if index in dirty_rows:
            dirty = dirty_rows[index]
            passed &= bool(got[:, dirty].isnan().all())
            clean = ~dirty
            out, lse, rounded, got, got_lse = out[:, clean], lse[:, clean], rounded[:, clean], got[:, clean], got_lse[:, clean]
        error, limit = relative(got, out), 2 * relative(rounded, out) + 1e-5
        finite = lse.isfinite()
        lse_error = float((got_lse - lse)[finite].abs().max()) if finite.any() else 0.0
        passed &= error <= limit and lse_error <= 1e-4 and bool((got_lse[~finite] == -math.inf).all())
        worst = {"out": max(worst["out"], error), "limit": max(worst["limit"], limit), "lse": max(worst["lse"], lse_error)}
    return {"passed": passed, **worst}


def check_sources(kernel: Kernel, dtype: str) -> dict[str, Any]:
    """Several sources with biases: two runs of keys of two tensors, the second unmasked, must act as their concatenation."""
    tile, kind = kernel.tile, DTYPES[dtype]
    lens, parts = (300, 77), []
    q = torch.randn(1, 2, 128, tile.dim_qk, device="cuda").to(kind)
    for n in lens:
        parts.append(tuple(torch.randn(1, 2, n, d, device="cuda").to(kind) for d in (tile.dim_qk, tile.dim_v)))
    bias = torch.randn(sum(lens), device="cuda")
    scale = 1 / math.sqrt(tile.dim_qk)
    plan = plan_launch(Geometry((Span(0, 0, 128, 0, lens[0]),), 2, 2, tile.dim_qk, tile.dim_v), dtype, 132, tile)
    records = plan.records
    records["source"][..., 1] = records["source"][..., 0]
    second = records["source"][..., 1]
    second["map"], second["keys"], second["masked"], second["bias_first"] = 1, lens[1], 0, lens[0]
    records["sources"] = 2
    records["tiles"] += -(-lens[1] // tile.tile_n)
    launch = Launch.prepare(kernel, plan, q, [p[0] for p in parts], [p[1] for p in parts], scale, bias)
    launch()
    torch.cuda.synchronize()
    k, v = (torch.cat([p[i] for p in parts], 2) for i in (0, 1))
    scores = (q.double() @ k.double().mT) * scale + bias.double()
    out = torch.softmax(scores, -1) @ v.double()
    error = relative(launch.out.double(), out)
    return {"passed": error < 0.008, "out": error, "limit": 0.008, "lse": float((launch.lse.double() - scores.logsumexp(-1)).abs().max())}


def cells(dim: int) -> Iterator[tuple[int, int, bool]]:
    """(len, heads, causal) at 16,384 tokens and a model width of 2,048."""
    for length in (1024, 4096, 16384):
        for causal in (False, True):
            yield length, 2048 // dim, causal


def inputs(length: int, heads: int, dim: int, dtype: str) -> list[list[torch.Tensor]]:
    """Two sets of random (q, k, v) of 16,384 tokens, to be used in turn."""
    shape = (TOKENS // length, heads, length, dim)
    return [[torch.randn(shape, device="cuda", dtype=DTYPES[dtype]) for _ in range(3)] for _ in range(2)]


def launches(kernel: Kernel, dtype: str, sets: list[list[torch.Tensor]], causal: bool, blocks: int) -> list[Launch]:
    """One launch for each input set."""
    batch, heads, length, dim = sets[0][0].shape
    spans = tuple(Span(b, 0, length, 0, length) for b in range(batch))
    geometry = Geometry(spans, heads, heads, dim, dim, right=0 if causal else None)
    plan = plan_launch(geometry, dtype, blocks, kernel.tile)
    return [Launch.prepare(kernel, plan, q, [k], [v], dim**-0.5) for q, k, v in sets]


def time_side_by_side(contenders: dict[str, list[Any]], rounds: int = 4, burst_ms: float = 40.0) -> dict[str, float]:
    """Median milliseconds of a call. Contenders take turns in random order, in bursts long enough for the clocks to settle."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    single = {name: statistics.median(time_events(calls, 4)) for name, calls in contenders.items()}
    for _ in range(rounds):
        for name in random.sample(sorted(contenders), len(contenders)):
            calls = contenders[name]
            count = max(4, int(burst_ms / single[name]))
            times[name] += time_events(calls, count, warm_up=count // 2)
    return {name: statistics.median(values) for name, values in times.items()}


def time_events(calls: list[Any], repeats: int, warm_up: int = 2) -> list[float]:
    """Milliseconds of single calls, by events."""
    for i in range(warm_up):
        calls[i % len(calls)]()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (start, stop) in enumerate(marks):
        start.record()
        calls[i % len(calls)]()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in marks]


def time_matmul(n: int = 8192) -> float:
    """TFLOP/s of a bf16 product of random matrices."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / statistics.median(time_events([lambda: a @ b], 20)) / 1e9


def torch_attention(backend: str, sets: list[list[torch.Tensor]], causal: bool) -> list[Any]:
    """Calls of torch's attention on one backend, one for each input set."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return [lambda x=x: call(*x) for x in sets]


def tflops(length: int, heads: int, dim: int, causal: bool, milliseconds: float) -> float:
    """4 b h n^2 d floating-point operations, half of them under a causal mask."""
    return 4 * TOKENS * length * heads * dim / (2 if causal else 1) / milliseconds / 1e9


def variants() -> Iterator[tuple[str, str, Tile, bool]]:
    """(name, dtype, tile, whether to time it in all cells)."""
    for tile in (
        Tile(128, 128, 2, 128), Tile(128, 128, 2, 160, query_stages=2), Tile(128, 128, 2, 176),
        Tile(64, 64, 3, 128, 2, 2), Tile(64, 64, 2, 128, 2, 2), Tile(256, 256, 2, 80),
    ):  # fmt: skip
        yield f"{tile.dim_qk} {tile.consumers}x{tile.tile_n}", "bf16", tile, True
    base = Tile(128, 128, 2, 128)
    yield "f16 128", "f16", base, False
    yield "f16 64", "f16", Tile(64, 64, 3, 128, 2, 2), False
    yield "192/128", "bf16", Tile(192, 128, 2, 112), False
    yield "sources", "bf16", replace(base, bias=True, max_sources=3), False


def child(work: Path, skip: set[str]) -> None:
    """Check, then time, everything not in `skip`."""
    jobs = pickle.loads(work.read_bytes())
    blocks = torch.cuda.get_device_properties(0).multi_processor_count

    def say(**line: Any) -> None:
        print(json.dumps(line), flush=True)

    say(kind="device", name=torch.cuda.get_device_name(), torch=torch.__version__)
    good: list[tuple[str, str, Tile, bool, Kernel]] = []
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    for name, dtype, tile, timed, cubin in jobs:
        if name in skip:
            continue
        say(kind="at", name=name)
        torch.manual_seed(time.time_ns() % 2**31)
        kernel = Kernel(cubin, tile)
        results = {"sources": check_sources(kernel, dtype)} if tile.max_sources > 1 else {}
        if tile.max_sources == 1:
            for case in cases():
                results[case.name] = check(kernel, dtype, case, blocks)
        bad = {case: r for case, r in results.items() if not r["passed"]}
        say(kind="check", name=name, passed=not bad, bad=bad, worst=max(r["out"] for r in results.values()))
        good.append((name, dtype, tile, timed, kernel))
    say(kind="at", name="timing")
    say(kind="ceiling", matmul=time_matmul())
    for dim in (128, 64, 256):
        for length, heads, causal in cells(dim):
            sets = inputs(length, heads, dim, "bf16")
            contenders = {"cudnn": torch_attention("CUDNN_ATTENTION", sets, causal)}
            for name, dtype, tile, timed, kernel in good:
                if timed and tile.dim_qk == dim:
                    contenders[name] = launches(kernel, dtype, sets, causal, blocks)
            say(kind="at", name=f"timing {dim} {length} {causal}")
            for name, ms in time_side_by_side(contenders).items():
                say(kind="time", name=name, dim=dim, length=length, causal=causal, ms=ms, tflops=tflops(length, heads, dim, causal, ms))
    say(kind="ceiling", matmul=time_matmul())
    say(kind="done")


def profile(name: str, length: int, causal: bool) -> None:
    """Launch one variant three times."""
    _, dtype, tile, _ = next(v for v in variants() if v[0] == name)
    torch.zeros(1, device="cuda")
    kernel = Kernel(compile_cubin((tile, dtype))[0], tile)
    sets = inputs(length, 2048 // tile.dim_qk, tile.dim_qk, dtype)
    for launch in launches(kernel, dtype, sets, causal, torch.cuda.get_device_properties(0).multi_processor_count) * 2:
        launch()
    torch.cuda.synchronize()


def watch(work: Path, out: Path, skip: set[str], log: list[dict[str, Any]]) -> str | None:
    """Run a child until it ends or falls silent; the name of what it hung or died on, or None."""
    command = [sys.executable, __file__, "--child", str(work), "--skip", json.dumps(sorted(skip))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    at = "start"
    while True:
        try:
            text = lines.get(timeout=SILENCE_SECONDS)
        except queue.Empty:
            process.kill()
            return at
        if text is None:
            return None if process.wait() == 0 else at
        if not text.startswith("{"):
            continue
        line = json.loads(text)
        if line["kind"] == "at":
            at = line["name"]
            continue
        log.append(line)
        with (out / "check_sm90.jsonl").open("a") as sink:
            sink.write(text)
        if line["kind"] == "check":
            print("ok  " if line["passed"] else "FAIL", line["name"], f"{line['worst']:.2e}", json.dumps(line["bad"])[:600], flush=True)


def table(log: list[dict[str, Any]]) -> str:
    """TFLOP/s per variant and cell."""
    rows: list[str] = []
    for dim in (128, 64, 256):
        times = [line for line in log if line["kind"] == "time" and line["dim"] == dim]
        names = list(dict.fromkeys(line["name"] for line in times))
        rows.append(f"hd{dim}".ljust(28) + "".join(f"{n}{'c' if c else 'f'}".rjust(8) for n, _, c in cells(dim)))
        for name in names:
            values = {(line["length"], line["causal"]): line["tflops"] for line in times if line["name"] == name}
            rows.append(name.ljust(28) + "".join(f"{values.get((n, c), float('nan')):8.0f}" for n, _, c in cells(dim)))
    return "\n".join(rows)


def main() -> None:
    """Compile, check, time, print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--child", type=Path)
    parser.add_argument("--skip", default="[]")
    parser.add_argument("--only", default="")
    parser.add_argument("--profile", help="only launch this variant a few times, for a profiler to watch")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--causal", action="store_true")
    options = parser.parse_args()
    if options.profile:
        profile(options.profile, options.length, options.causal)
        return
    if options.child:
        child(options.child, set(json.loads(options.skip)))
        return
    start = time.time()
    chosen = [v for v in variants() if options.only in v[0]]
    cubins = compile_all([(tile, dtype) for _, dtype, tile, _ in chosen])
    print(f"compiled {len(chosen)} in {time.time() - start:.0f} s", flush=True)
    work = options.out / "work.pickle"
    work.write_bytes(pickle.dumps([(n, d, t, timed, cubins[(t, d)][0]) for n, d, t, timed in chosen]))
    log: list[dict[str, Any]] = []
    skip: set[str] = set()
    for _ in range(3):
        stopped = watch(work, options.out, skip, log)
        if stopped is None:
            break
        print("hung or died:", stopped, flush=True)
        skip.add(stopped)
    print(table(log))
    print("ceilings", [line["matmul"] for line in log if line["kind"] == "ceiling"], f"{time.time() - start:.0f} s in all")
    work.unlink()


if __name__ == "__main__":
    main()
