"""Host time of one eager call at 128 tokens, beside torch's SDPA, and of a cold process.

    python benchmarks/gpu_host_time.py [--calls-only]
    python benchmarks/gpu_host_time.py --against CHECKOUT [--rounds 5]

A call is timed from its start to its return; the device works behind it. The cold process
imports the backend, loads a kernel that the disk cache has, runs it and waits. With --against,
another checkout of this repository takes turns with this one, a process each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adaattn_bench.clock import until_return
from adaattn_core import attention
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.backend import CudaBackend
from adaattn_cuda.forward import attention_forward
from adaattn_torch import scaled_dot_product_attention as adaattn_sdpa

COLD = """
import time
{before}
begin = time.perf_counter()
import adaattn_core
imported = time.perf_counter()
from adaattn_cuda.forward import attention_forward
attention_forward(q, k, v)
{wait}
print(imported - begin, time.perf_counter() - imported)
"""
TORCH = {
    "before": "import torch\nq, k, v = torch.randn((3, 1, 8, 128, 128), device='cuda', "
    "dtype=torch.bfloat16)\ntorch.cuda.synchronize()",
    "wait": "torch.cuda.synchronize()",
}
CUPY = {
    "before": "import cupy\nq, k, v = cupy.ones((3, 1, 8, 128, 128), cupy.float16)\n"
    "cupy.cuda.Device().synchronize()",
    "wait": "cupy.cuda.Device().synchronize()",
}


def microseconds(
    calls: dict[str, Callable[[], Any]], repeats: int = 100, rounds: int = 10
) -> dict[str, float]:
    """Median time until each call returns, to the hundredth."""
    found = until_return(calls, rounds, repeats, drain=50)
    return {name: round(us, 2) for name, us in found.items()}


def measure(calls_only: bool) -> dict[str, Any]:
    """Figures of this process, and of cold ones."""
    q, k, v = torch.randn((3, 1, 8, 128, 128), device="cuda", dtype=torch.bfloat16)
    backend = CudaBackend()
    problem = AttentionProblem.from_arrays(q, k, v)
    plan = Plan.uniform(problem, HeadPlan(qk="bf16", pv="bf16"))
    wide = [x.float() for x in (q, k, v)]
    problem_f32 = AttentionProblem.from_arrays(*wide)
    plan_f32 = Plan.uniform(problem_f32, HeadPlan())
    sdpa = torch.nn.functional.scaled_dot_product_attention
    drawn = torch.randn((300, 3, *q.shape), device="cuda", dtype=q.dtype)
    sets = itertools.cycle([tuple(three) for three in drawn])
    causal = Mask.causal("bottom_right")
    forward = microseconds(
        {
            "attention_forward, bf16": lambda: attention_forward(q, k, v),
            "attention_forward, bf16, causal": lambda: attention_forward(q, k, v, mask=causal),
            "attention_forward, bf16, 300 sets of arrays": lambda: attention_forward(
                *next(sets)
            ),
            "attention_forward, f32": lambda: attention_forward(*wide),
            "torch SDPA, bf16": lambda: sdpa(q, k, v),
            "torch SDPA, bf16, causal": lambda: sdpa(q, k, v, is_causal=True),
            "torch SDPA, bf16, 300 sets of arrays": lambda: sdpa(*next(sets)),
            "run, bf16": lambda: backend.run(problem, plan),
            "run, f32": lambda: backend.run(problem_f32, plan_f32),
            "AttentionProblem.from_arrays": lambda: AttentionProblem.from_arrays(q, k, v),
        }
    )
    certified = microseconds(
        {
            "attention(), certificate not looked at": lambda: attention(
                q, k, v, backend=backend
            ),
            "adaattn_torch's function": lambda: adaattn_sdpa(q, k, v),
        }
    ) | microseconds(
        {
            "attention(), certificate read": lambda: (
                attention(q, k, v, backend=backend).certificate.upper
            )
        },
        repeats=10,
    )
    backend.run(problem, plan)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "kernel of bf16": backend.provenance()["kernels"],
        "microseconds": forward | certified,
    }
    if calls_only:
        return found
    for library, parts in (("torch", TORCH), ("cupy", CUPY)):
        for _ in range(3):  # the first fills the kernel cache, the second the page cache
            done = subprocess.run(
                [sys.executable, "-c", COLD.format(**parts)],
                capture_output=True, text=True, check=True, timeout=120,
            )  # fmt: skip
            core, rest = (float(x) for x in done.stdout.split())
            found[f"cold process, seconds above importing {library}"] = {
                "importing adaattn_core": round(core, 3),
                "backend, cached kernel, first result": round(rest, 3),
            }
    return found


def in_turn(other: Path, rounds: int) -> dict[str, Any]:
    """Medians of both checkouts, whose processes take turns; the host's pace varies."""
    here = Path(__file__).resolve().parents[1]
    roots = {"this": here, "other": other.resolve()}
    calls: dict[str, dict[str, list[float]]] = {}
    cold: dict[str, dict[str, list[float]]] = {}
    for turn in range(rounds + 1):
        for name, root in roots.items():
            parts = (".", "reference", "backends", "kernels_cu", "benchmarks")
            paths = os.pathsep.join(str(root / part) for part in parts)
            env = {**os.environ, "PYTHONPATH": paths}
            script = root / "benchmarks" / "gpu_host_time.py"
            answer = run([sys.executable, str(script), "--calls-only"], env)
            start = run([sys.executable, "-c", COLD.format(**TORCH)], env)
            if turn == 0:
                continue  # fills the kernel cache and the page cache
            for what, us in json.loads(answer)["microseconds"].items():
                calls.setdefault(what, {}).setdefault(name, []).append(us)
            core, rest = (float(x) for x in start.split())
            for what, seconds in (("importing adaattn_core", core), ("first result", rest)):
                cold.setdefault(what, {}).setdefault(name, []).append(seconds)
    return {
        "microseconds": {w: _medians(found, 2) for w, found in calls.items()},
        "cold process, seconds above importing torch": {
            w: _medians(found, 3) for w, found in cold.items()
        },
    }


def _medians(found: dict[str, list[float]], digits: int) -> dict[str, float]:
    return {name: round(statistics.median(times), digits) for name, times in found.items()}


def run(command: list[str], env: dict[str, str]) -> str:
    """Output of a process."""
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls-only", action="store_true")
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    if chosen.against:
        found = in_turn(chosen.against, chosen.rounds)
    else:
        found = measure(chosen.calls_only)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
