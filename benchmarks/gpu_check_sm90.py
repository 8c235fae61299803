"""Check ``sm90_attn_fwd_f16`` against an fp64 oracle and time specialisations of it.

    python benchmarks/gpu_check_sm90.py --out DIR

Every specialisation is compiled first. A child process then checks and times them one after the
other and reports a JSON line for each finding; when it falls silent (a kernel hangs), it is
ended, the specialisation at fault is set aside, and a new child goes on.
"""

from __future__ import annotations

import argparse
import json
import pickle
import queue
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sm90_cases import cases, check, check_sources, sequence
from sm90_direct import DTYPES, Kernel, Launch, compile_all, compile_cubin
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaattn_cuda.kernels.sm90_attn_fwd_f16 import plan_launch
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import Tile, candidates
from adaattn_cuda.work.geometry import Geometry

SILENCE_SECONDS = 40.0
TOKENS = 16_384


def cells(dim: int) -> Iterator[tuple[int, int, bool]]:
    """(len, heads, causal) at 16,384 tokens and a model width of 2,048."""
    for length in (1024, 4096, 16384):
        for causal in (False, True):
            yield length, 2048 // dim, causal


def inputs(length: int, heads: int, dim: int, dtype: str) -> list[list[torch.Tensor]]:
    """Two sets of random (q, k, v) of 16,384 tokens, to be used in turn."""
    shape = (TOKENS // length, heads, length, dim)
    return [
        [torch.randn(shape, device="cuda", dtype=DTYPES[dtype]) for _ in range(3)]
        for _ in range(2)
    ]


def launches(
    kernel: Kernel, dtype: str, sets: list[list[torch.Tensor]], causal: bool, blocks: int
) -> list[Launch]:
    """One launch for each input set."""
    batch, heads, length, dim = sets[0][0].shape
    spans = tuple(sequence(b, 0, length, 0, length) for b in range(batch))
    geometry = Geometry(spans, heads, heads, dim, dim, right=0 if causal else None)
    plan = plan_launch(geometry, dtype, blocks, kernel.tile)
    return [Launch.prepare(kernel, plan, q, [k], [v], dim**-0.5) for q, k, v in sets]


def time_side_by_side(
    contenders: dict[str, list[Any]], rounds: int = 4, burst_ms: float = 40.0
) -> dict[str, float]:
    """Median milliseconds of a call.

    Contenders take turns in random order, in bursts long enough for the clocks to settle.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    single = {
        name: statistics.median(time_events(calls, 4)) for name, calls in contenders.items()
    }
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
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
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
    """Return calls of torch's attention on one backend, one for each input set."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return [lambda x=x: call(*x) for x in sets]


def tflops(length: int, heads: int, dim: int, causal: bool, milliseconds: float) -> float:
    """4 b h n^2 d floating-point operations, half of them under a causal mask."""
    return 4 * TOKENS * length * heads * dim / (2 if causal else 1) / milliseconds / 1e9


def variants() -> Iterator[tuple[str, str, Tile, bool]]:
    """(name, dtype, tile, whether to time it in all cells)."""
    measured = ((64, 64), (128, 128), (256, 256))
    for dims in (*measured, (192, 192), (192, 128), (64, 256), (256, 64)):
        for _, tile in candidates(*dims):
            for dtype in DTYPES:
                name = f"{tile.dim_qk}/{tile.dim_v} {tile.consumers}x{tile.tile_n} {dtype}"
                yield name, dtype, tile, dims in measured and dtype == "bf16"
    turns = Tile(128, 128, 2, 128, ping_pong=True)
    yield "128/128 2x128 ping-pong", "bf16", turns, True
    yield "sources", "bf16", Tile(128, 128, 2, 128, bias=True, max_sources=3), False


def child(work: Path, skip: set[str], dims: list[int]) -> None:
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
        say(
            kind="check",
            name=name,
            passed=not bad,
            bad=bad,
            worst=max(r["out"] for r in results.values()),
        )
        good.append((name, dtype, tile, timed, kernel))
    say(kind="at", name="timing")
    say(kind="ceiling", matmul=time_matmul())
    for dim in dims:
        for length, heads, causal in cells(dim):
            sets = inputs(length, heads, dim, "bf16")
            contenders = {"cudnn": torch_attention("CUDNN_ATTENTION", sets, causal)}
            for name, dtype, tile, timed, kernel in good:
                if timed and tile.dim_qk == dim:
                    contenders[name] = launches(kernel, dtype, sets, causal, blocks)
            say(kind="at", name=f"timing {dim} {length} {causal}")
            for name, ms in time_side_by_side(contenders).items():
                say(
                    kind="time",
                    name=name,
                    dim=dim,
                    length=length,
                    causal=causal,
                    ms=ms,
                    tflops=tflops(length, heads, dim, causal, ms),
                )
    say(kind="ceiling", matmul=time_matmul())
    say(kind="done")


def profile(name: str, length: int, causal: bool) -> None:
    """Launch one variant three times."""
    _, dtype, tile, _ = next(v for v in variants() if v[0] == name)
    torch.zeros(1, device="cuda")
    kernel = Kernel(compile_cubin((tile, dtype))[0], tile)
    sets = inputs(length, 2048 // tile.dim_qk, tile.dim_qk, dtype)
    for launch in (
        launches(
            kernel,
            dtype,
            sets,
            causal,
            torch.cuda.get_device_properties(0).multi_processor_count,
        )
        * 2
    ):
        launch()
    torch.cuda.synchronize()


def watch(work: Path, out: Path, skip: set[str], log: list[dict[str, Any]]) -> str | None:
    """Run a child until it ends or falls silent; return what it hung or died on, or None."""
    command = [sys.executable, __file__, "--child", str(work), *sys.argv[1:]]
    command += ["--skip", json.dumps(sorted(skip))]
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
            print(
                "ok  " if line["passed"] else "FAIL",
                line["name"],
                f"{line['worst']:.2e}",
                json.dumps(line["bad"])[:600],
                flush=True,
            )


def table(log: list[dict[str, Any]]) -> str:
    """TFLOP/s per variant and cell."""
    rows: list[str] = []
    for dim in (128, 64, 256):
        times = [line for line in log if line["kind"] == "time" and line["dim"] == dim]
        names = list(dict.fromkeys(line["name"] for line in times))
        rows.append(
            f"hd{dim}".ljust(28)
            + "".join(f"{n}{'c' if c else 'f'}".rjust(8) for n, _, c in cells(dim))
        )
        for name in names:
            values = {
                (line["length"], line["causal"]): line["tflops"]
                for line in times
                if line["name"] == name
            }
            rows.append(
                name.ljust(28)
                + "".join(f"{values.get((n, c), float('nan')):8.0f}" for n, _, c in cells(dim))
            )
    return "\n".join(rows)


def main() -> None:
    """Compile, check, time, print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--child", type=Path)
    parser.add_argument("--skip", default="[]")
    parser.add_argument("--only", default="")
    parser.add_argument("--time", type=int, nargs="*", default=[128, 64, 256], metavar="DIM")
    parser.add_argument(
        "--profile", help="only launch this variant a few times, for a profiler to watch"
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--causal", action="store_true")
    options = parser.parse_args()
    if options.profile:
        profile(options.profile, options.length, options.causal)
        return
    if options.child:
        child(options.child, set(json.loads(options.skip)), options.time)
        return
    start = time.time()
    chosen = [v for v in variants() if options.only in v[0]]
    cubins = compile_all([(tile, dtype) for _, dtype, tile, _ in chosen])
    print(f"compiled {len(chosen)} in {time.time() - start:.0f} s", flush=True)
    work = options.out / "work.pickle"
    work.write_bytes(
        pickle.dumps([(n, d, t, timed, cubins[(t, d)][0]) for n, d, t, timed in chosen])
    )
    log: list[dict[str, Any]] = []
    skip: set[str] = set()
    for _ in range(3):
        stopped = watch(work, options.out, skip, log)
        if stopped is None:
            break
        print("hung or died:", stopped, flush=True)
        skip.add(stopped)
    print(table(log))
    print(
        "ceilings",
        [line["matmul"] for line in log if line["kind"] == "ceiling"],
        f"{time.time() - start:.0f} s in all",
    )
    work.unlink()


if __name__ == "__main__":
    main()
