"""Check the sm80 family on a GPU against float64, then time tile variants beside torch's SDPA.

    python benchmarks/gpu_check_sm80.py [--out DIR] [--only GROUP ...]

Every group runs in a process of its own with a time limit, so that a hanging kernel costs its
group only. Results go to DIR/sm80_<group>.json and, shortened, to stdout. Needs torch with
CUDA.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.device import driver
from adaattn_cuda.device.views import ArrayView, view
from adaattn_cuda.jit.compile import Compiler, build
from adaattn_cuda.kernels import sm80_attn_fwd as sm80
from adaattn_cuda.tuning.sm80_attn_fwd import Specialisation, specialise

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
LIMIT_S = 60
KERNELS: dict[Any, driver.Kernel] = {}


# --- running one task ------------------------------------------------------------------------
def load(chosen: Specialisation, arch: str) -> driver.Kernel:
    """Load a specialisation, once."""
    if chosen not in KERNELS:
        KERNELS[chosen] = driver.Kernel(
            build(chosen.spec(arch)).cubin, chosen.smem_bytes, chosen.threads
        )
    return KERNELS[chosen]


def prepare(problem: AttentionProblem, qk: str, pv: str, chosen: Specialisation | None = None):
    """Return poisoned outputs and a function that launches the kernel."""
    batch, heads, len_q, _ = problem.query.shape
    out = torch.full(
        (batch, heads, len_q, problem.dim_v), math.nan, dtype=problem.query.dtype, device="cuda"
    )
    lse = torch.full((batch, heads, len_q), math.nan, device="cuda")
    mask = problem.mask
    full = (batch, heads, len_q, problem.len_kv)

    def expanded(array: Any) -> ArrayView | None:
        return None if array is None else view(array.expand(full))

    task = sm80.DenseTask(
        view(problem.query), view(problem.key), view(problem.value), view(out), view(lse),
        expanded(mask.allowed), expanded(mask.bias), problem.sequences, mask.left, mask.right,
        mask.alignment == "bottom_right", problem.scale, qk, pv,
    )  # fmt: skip
    arch = driver.device_facts(0).arch
    chosen = chosen or specialise(
        arch, problem.dtype, qk, pv, problem.dim_qk, problem.dim_v,
        array_mask=task.allowed is not None or task.bias is not None,
        vectorised=sm80.is_vectorised(task),
    )  # fmt: skip
    kernel = load(chosen, arch)
    ready = sm80.launches(task, chosen.tile_m)
    arrays = (task.query, task.key, task.value, task.out, task.lse, task.allowed, task.bias)
    for params, _ in ready:
        sm80.pointer_slots(params)[:] = [a.pointer if a else 0 for a in arrays]
    stream = torch.cuda.current_stream().cuda_stream

    def launch() -> None:
        for params, blocks in ready:
            kernel.launch(0, blocks, stream, params)

    return out, lse, launch, chosen


def oracle(problem: AttentionProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 attention; rows that see nothing give 0 and -inf."""
    q, k, v = (x.double() for x in (problem.query, problem.key, problem.value))
    k, v = (x.repeat_interleave(problem.group_size, 1) for x in (k, v))
    batch, heads, len_q, _ = q.shape
    visible = torch.zeros((batch, heads, len_q, k.shape[2]), dtype=torch.bool)
    for s in problem.sequences:
        start, stop = (torch.as_tensor(x)[:, None] for x in problem.intervals(s.index))
        keys = torch.arange(s.len_kv)[None]
        visible[s.batch, :, s.q_start : s.q_stop, s.kv_start : s.kv_stop] = (keys >= start) & (
            keys < stop
        )
    visible = visible.cuda()
    scores = (q @ k.transpose(-1, -2)) * problem.scale
    if problem.mask.allowed is not None:
        visible &= problem.mask.allowed
    if problem.mask.bias is not None:
        scores = scores + problem.mask.bias.double()
        visible &= problem.mask.bias != -math.inf
    scores = torch.where(visible, scores, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.where(visible, torch.exp(scores - lse[..., None]), 0.0)
    out = torch.zeros_like(q[..., :1]).expand(*q.shape[:3], v.shape[3]).clone()
    # Chosen, not multiplied, where values are not finite.
    finite = torch.where(torch.isfinite(v), v, 0.0)
    out += weights @ finite
    bad = ~torch.isfinite(v)
    if bad.any():
        sees_bad = visible.double() @ bad.double() > 0
        out = torch.where(sees_bad, math.nan, out)
    return torch.where(torch.isneginf(lse)[..., None], 0.0, out), lse


def randn(*shape: int, dtype: str) -> torch.Tensor:
    """Return N(0, 1) numbers in a format."""
    return torch.randn(shape, device="cuda").to(DTYPES[dtype])


# --- checks ----------------------------------------------------------------------------------
LIMITS = {
    ("bf16", "bf16"): 6e-3,
    ("f16", "f16"): 8e-4,
    ("tf32", "tf32"): 1e-3,
    ("f32", "f32"): 2e-6,
}
"""Largest relative Frobenius error on N(0,1) inputs, by (qk, pv)."""


def compare(
    name: str, problem: AttentionProblem, qk: str, pv: str, limit: float
) -> dict[str, Any]:
    """Run a problem twice and hold it to float64."""
    out, lse, launch, chosen = prepare(problem, qk, pv)
    launch()
    torch.cuda.synchronize()
    first = out.clone()
    launch()
    torch.cuda.synchronize()
    expected, expected_lse = oracle(problem)
    finite = torch.isfinite(expected)
    error = float(torch.linalg.vector_norm((out.double() - expected)[finite]))
    norm = float(torch.linalg.vector_norm(expected[finite]))
    reached = torch.isfinite(expected_lse)
    lse_error = (
        float((lse.double() - expected_lse)[reached].abs().max()) if reached.any() else 0.0
    )
    facts = {
        "case": name, "tile": [chosen.tile_m, chosen.tile_n, chosen.warps, chosen.stages],
        "error": error / max(norm, 1e-300), "lse_error": lse_error,
        "finite_where_expected": bool((torch.isfinite(out) == finite).all()),
        "lse_finite_where_expected": bool((torch.isfinite(lse) == reached).all()),
        "repeatable": bool(torch.equal(torch.nan_to_num(first), torch.nan_to_num(out))),
    }  # fmt: skip
    facts["ok"] = bool(
        facts["error"] <= limit
        and lse_error <= max(10 * limit, 2e-5)
        and facts["finite_where_expected"]
        and facts["lse_finite_where_expected"]
        and facts["repeatable"]
    )
    return facts


def problem_of(
    dtype: str,
    batch: int,
    heads: tuple[int, int],
    lens: tuple[int, int],
    dims: tuple[int, int],
    mask: Mask | None = None,
) -> AttentionProblem:
    """Return a random problem; heads and dims are (query or key, key/value or value)."""
    return AttentionProblem.from_arrays(
        randn(batch, heads[0], lens[0], dims[0], dtype=dtype),
        randn(batch, heads[1], lens[1], dims[0], dtype=dtype),
        randn(batch, heads[1], lens[1], dims[1], dtype=dtype),
        mask=mask,
    )


MASKS = {
    "full": (None, (257, 515)),
    "causal_tl": (Mask.causal("top_left"), (300, 200)),
    "causal_br": (Mask.causal("bottom_right"), (300, 777)),
    "window": (Mask.sliding_window(100, 30, "bottom_right"), (500, 400)),
}


def check_formats(formats: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Check formats against every mask kind and several head dimensions."""
    rows = []
    for dtype, qk, pv in formats:
        limit = max(LIMITS[qk, qk], LIMITS[pv, pv], 4e-3 if dtype == "bf16" else 0.0)
        for name, (mask, lens) in MASKS.items():
            for dims in ((64, 64), (128, 128), (256, 256), (96, 160), (72, 40)):
                label = f"{dtype} {qk}/{pv} {name} {dims}"
                rows.append(
                    compare(
                        label, problem_of(dtype, 2, (4, 2), lens, dims, mask), qk, pv, limit
                    )
                )
        odd = problem_of(dtype, 1, (2, 1), (70, 90), (37, 51))  # rows that are not aligned
        rows.append(compare(f"{dtype} {qk}/{pv} odd dims", odd, qk, pv, limit))
    return rows


def check_masks() -> list[dict[str, Any]]:
    """Check what masks and hostile values do."""
    rows = []
    for dtype in ("bf16", "f32"):
        limit = LIMITS[dtype, dtype]
        lengths = Mask.key_lengths([0, 1, 500])
        p = problem_of(dtype, 3, (2, 1), (130, 500), (64, 64), lengths)
        p.value[1, :, 1:] = math.nan
        p.key[0] = math.nan
        rows.append(compare(f"{dtype} lengths, NaN in padding", p, dtype, dtype, limit))
        cu_q, cu_kv = [0, 0, 100, 101, 400], [0, 5, 205, 206, 500]
        ragged = Mask.ragged(cu_q, cu_kv) & Mask.causal("bottom_right")
        p = problem_of(dtype, 1, (4, 2), (400, 500), (128, 128), ragged)
        rows.append(compare(f"{dtype} ragged causal", p, dtype, dtype, limit))
        many = list(range(0, 300 * 7 + 1, 7))
        p = problem_of(
            dtype, 1, (2, 2), (many[-1], many[-1]), (64, 64), Mask.ragged(many, many)
        )
        rows.append(compare(f"{dtype} ragged, 300 sequences", p, dtype, dtype, limit))
        allowed = torch.rand((2, 1, 200, 333), device="cuda") < 0.3
        allowed[0, 0, 5] = False
        p = problem_of(dtype, 2, (4, 4), (200, 333), (64, 64), Mask.boolean(allowed))
        rows.append(compare(f"{dtype} boolean", p, dtype, dtype, limit))
        bias = torch.randn((1, 4, 1, 333), device="cuda")
        bias[..., :9] = -math.inf
        mask = Mask.additive(bias) & Mask.causal("bottom_right")
        p = problem_of(dtype, 2, (4, 2), (200, 333), (128, 128), mask)
        rows.append(compare(f"{dtype} additive and causal", p, dtype, dtype, limit))
        p = problem_of(dtype, 1, (1, 1), (200, 200), (64, 64), Mask.causal("top_left"))
        p.value[0, 0, 100, 3] = math.nan
        p.value[0, 0, 150, 5] = math.inf
        p.key[0, 0, 190] = 0.0
        rows.append(compare(f"{dtype} causal, NaN value", p, dtype, dtype, limit))
        p = problem_of(dtype, 1, (1, 1), (100, 300), (64, 64))
        p.query.mul_(3e4), p.key.mul_(3e4)
        rows.append(compare(f"{dtype} huge scores", p, dtype, dtype, math.inf))
    return rows


def sanitize() -> list[dict[str, Any]]:
    """Small launches of every code path, for compute-sanitizer; nothing is compared."""
    rows = []
    for dtype, qk in (("bf16", "bf16"), ("f32", "f32"), ("f32", "bf16")):
        for mask in (None, Mask.causal("bottom_right"), Mask.key_lengths([100])):
            for dims in ((64, 64), (37, 51)):
                p = problem_of(dtype, 1, (2, 1), (140, 200), dims, mask)
                p.value[0, 0, 90, 3] = math.nan
                _, _, launch, chosen = prepare(p, qk, qk)
                launch()
                rows.append({"tile": [chosen.tile_m, chosen.tile_n], "dtype": dtype, "qk": qk})
        allowed = torch.rand((1, 1, 140, 200), device="cuda") < 0.5
        p = problem_of(dtype, 1, (2, 1), (140, 200), (64, 64), Mask.boolean(allowed))
        prepare(p, qk, qk)[2]()
    torch.cuda.synchronize()
    return rows


# --- timing ----------------------------------------------------------------------------------
def seconds(launch: Any, repeats: int) -> float:
    """Median over `repeats` of one launch, by events."""
    for _ in range(3):
        launch()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return statistics.median(times)


def time_cell(
    dtype: str,
    qk: str,
    dim: int,
    length: int,
    causal: bool,
    variants: list[Specialisation],
    tokens: int = 16384,
) -> list[dict[str, Any]]:
    """Time torch and every variant on one shape."""
    heads = 2048 // dim
    mask = Mask.causal("top_left") if causal else None
    p = problem_of(dtype, tokens // length, (heads, heads), (length, length), (dim, dim), mask)
    flops = 4 * (tokens // length) * heads * length**2 * dim / (2 if causal else 1)
    rows = []

    def record(name: str, launch: Any) -> None:
        t = seconds(launch, 20)
        rows.append(
            {
                "what": name,
                "dim": dim,
                "len": length,
                "causal": causal,
                "ms": round(t * 1e3, 4),
                "tflops": round(flops / t / 1e12, 1),
            }
        )

    kinds = (
        [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
        if dtype != "f32"
        else [SDPBackend.EFFICIENT_ATTENTION]
    )
    for kind in kinds:

        def sdpa(kind: SDPBackend = kind) -> torch.Tensor:
            with sdpa_kernel(kind):
                return torch.nn.functional.scaled_dot_product_attention(
                    p.query, p.key, p.value, is_causal=causal
                )

        record(kind.name.lower(), sdpa)
        if dtype == "f32" and length <= 4096:
            expected, _ = oracle(AttentionProblem.from_arrays(
                p.query[:1, :2], p.key[:1, :2], p.value[:1, :2], mask=mask))  # fmt: skip
            rows[-1]["error"] = relative(sdpa()[:1, :2], expected)
    for chosen in variants:
        out, _, launch, _ = prepare(p, qk, qk, chosen)
        label = f"{qk} {chosen.tile_m}x{chosen.tile_n} w{chosen.warps} s{chosen.stages}"
        record(label, launch)
        if dtype == "f32" and length <= 4096:
            rows[-1]["error"] = relative(out[:1, :2], expected)
    return rows


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative Frobenius error."""
    norm = torch.linalg.vector_norm
    return float(norm(got.double() - expected) / norm(expected))


def tiles(
    dtype: str, qk: str, dim: int, shapes: list[tuple[int, int, int, int]]
) -> list[Specialisation]:
    """Return the chosen specialisation and variants of it."""
    base = specialise("sm_90a", dtype, qk, qk, dim, dim)
    made = [replace(base, tile_m=m, tile_n=n, warps=w, stages=s) for m, n, w, s in shapes]
    return list(dict.fromkeys([base, *made]))


VARIANTS = {
    ("bf16", "bf16", 128): [(128, 64, 4, 2), (128, 64, 4, 1), (128, 64, 8, 2), (128, 128, 8, 2),
                            (128, 32, 4, 2), (64, 64, 4, 2), (64, 64, 2, 2)],
    ("bf16", "bf16", 64): [(128, 96, 4, 2), (128, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 2)],
    ("bf16", "bf16", 256): [(128, 64, 8, 1), (128, 64, 8, 2), (64, 64, 4, 1), (128, 32, 8, 2)],
    ("f32", "f32", 128): [(128, 64, 8, 2), (64, 64, 4, 1), (128, 64, 8, 1), (64, 64, 4, 2)],
    ("f32", "f32", 256): [],
    ("f32", "tf32", 256): [],
    ("f32", "f32", 64): [(128, 64, 8, 2), (64, 64, 4, 2), (128, 128, 8, 1), (128, 64, 8, 1)],
    ("f32", "tf32", 128): [(128, 64, 8, 2), (64, 64, 4, 2)],
}  # fmt: skip


def time_dims(
    dtype: str, qk: str, dim: int, cells: list[tuple[int, bool]]
) -> list[dict[str, Any]]:
    """Time the variants of one head dimension."""
    rows = []
    for length, causal in cells:
        variants = tiles(dtype, qk, dim, VARIANTS[dtype, qk, dim])
        rows += time_cell(dtype, qk, dim, length, causal, variants)
    return rows


SHORT = [(4096, False), (16384, False), (1024, True), (16384, True)]
GROUPS = {
    "check_narrow": lambda: check_formats([("bf16",) * 3, ("f16",) * 3]),
    "check_wide": lambda: check_formats([("f32",) * 3, ("f32", "tf32", "tf32")]),
    "check_mixed": lambda: check_formats([("f32", "bf16", "f16"), ("bf16", "f32", "f32")]),
    "check_masks": check_masks,
    "sanitize": sanitize,
    "time_bf16_128": lambda: time_dims("bf16", "bf16", 128, SHORT),
    "time_bf16_64": lambda: time_dims("bf16", "bf16", 64, SHORT[1::2]),
    "time_bf16_256": lambda: time_dims("bf16", "bf16", 256, SHORT[1:2]),
    "time_f32_128": lambda: time_dims("f32", "f32", 128, [(4096, False), (4096, True)]),
    "time_f32_64": lambda: time_dims("f32", "f32", 64, [(4096, False)]),
    "time_f32_256": lambda: time_dims("f32", "f32", 256, [(4096, False), (4096, True)]),
    "time_tf32_256": lambda: time_dims("f32", "tf32", 256, [(4096, False)]),
    "time_tf32_128": lambda: time_dims("f32", "tf32", 128, [(4096, False)]),
}


def compile_all(names: list[str]) -> None:
    """Fill the cache with what the timing groups need, several compilers at a time."""
    wanted: dict[Specialisation, None] = {}
    for (dtype, qk, dim), shapes in VARIANTS.items():
        if f"time_{qk}_{dim}" in names:
            wanted |= dict.fromkeys(tiles(dtype, qk, dim, shapes))

    def work(part: list[Specialisation]) -> None:
        with Compiler() as compiler:
            for chosen in part:
                try:
                    made = build(chosen.spec("sm_90a"), compiler=compiler)
                    print(chosen, made.resources, f"{made.seconds:.2f} s", flush=True)
                except Exception as error:  # a variant that does not compile is left out later
                    print(chosen, error, flush=True)

    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    every = list(wanted)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, [every[i::workers] for i in range(workers)]))


def main() -> int:
    """Compile, check, time, report; the exit code counts failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    usual = [name for name in GROUPS if name != "sanitize"]
    parser.add_argument("--only", nargs="*", choices=list(GROUPS), default=usual)
    parser.add_argument("--group", choices=list(GROUPS), help="run this one here, print JSON")
    chosen = parser.parse_args()
    if chosen.group:
        torch.manual_seed(time.time_ns() % 2**31)
        print(json.dumps(GROUPS[chosen.group]()))
        return 0
    chosen.out.mkdir(parents=True, exist_ok=True)
    os.environ["ADAATTN_QUIET"] = "1"
    started = time.perf_counter()
    compile_all(chosen.only)
    print(f"compiled in {time.perf_counter() - started:.1f} s", flush=True)
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        checks = {n: pool.submit(run_group, n) for n in chosen.only if n.startswith("check")}
        results = {n: future.result() for n, future in checks.items()}
    results |= {n: run_group(n) for n in chosen.only if not n.startswith("check")}
    for name, (rows, problem) in results.items():
        (chosen.out / f"sm80_{name}.json").write_text(
            json.dumps({"rows": rows, "error": problem})
        )
        bad = [row for row in rows if row.get("ok") is False]
        failed += len(bad) + bool(problem)
        print(f"== {name}: {len(rows)} rows, {len(bad)} bad {problem}")
        for row in rows if name.startswith("time") else bad[:12]:
            print("  ", json.dumps(row))
        if name.startswith("check") and rows:
            print("   worst error", max(row["error"] for row in rows))
    return 1 if failed else 0


def run_group(name: str) -> tuple[list[dict[str, Any]], str]:
    """Run one group in a process of its own."""
    command = [sys.executable, __file__, "--group", name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return [], f"ran longer than {LIMIT_S} s"
    if done.returncode:
        return [], done.stderr[-1500:]
    return json.loads(done.stdout.splitlines()[-1]), ""


if __name__ == "__main__":
    sys.exit(main())
