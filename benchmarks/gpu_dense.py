"""Dense forward attention on one GPU: this library, cuDNN, FlashAttention-2 and -3, in one run.

    python benchmarks/gpu_dense.py --out DIR             measure; writes gpu_dense.json and .md
    python benchmarks/gpu_dense.py --render FILE.json    table and plot from an earlier run

16,384 tokens in all, model width 2,048, bf16, random inputs, two sets used in turn. Contenders
take turns in random order, in bursts long enough for the clocks to settle, because these
kernels run at the card's power limit; every figure is a median over all rounds. cuDNN and
FlashAttention-2 are torch's own backends and are timed by CUDA events, as is the `forward` of
this library's backend, allocations included. FlashAttention-3 is the wheel flash_attn3_jax,
where it can be imported: JAX has its own stream, so it is timed by the host clock over a
burst.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaattn_bench.cells import CUDNN, FA2, FA3, OURS, Pass, difference
from adaattn_bench.clock import Burst, by_events, by_host_together, in_turn
from adaattn_bench.contenders import flash3_of_jax
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.backend import CudaBackend

SDPA = torch.nn.functional.scaled_dot_product_attention


def contenders(sets: list[list[Any]], causal: bool) -> tuple[dict[str, Burst], dict[str, Any]]:
    """Everybody, and whether both doors of ours compute what cuDNN does."""

    def theirs(backend: Any, arrays: list[Any]) -> Any:
        with sdpa_kernel(backend):
            return SDPA(*arrays, is_causal=causal)

    backend, mask = CudaBackend(), Mask.causal() if causal else None
    bursts = {
        name: by_events(in_turn([lambda b=way, x=x: theirs(b, x) for x in sets]))
        for name, way in (
            (CUDNN, SDPBackend.CUDNN_ATTENTION),
            (FA2, SDPBackend.FLASH_ATTENTION),
        )
    }
    bursts[OURS] = by_events(
        in_turn([lambda x=x: backend.forward(*x, mask=mask) for x in sets])
    )
    if (fa3 := flash3(sets, causal)) is not None:
        bursts[FA3] = fa3
    problem = AttentionProblem.from_arrays(*sets[0], mask=mask)
    plan = Plan.uniform(problem, HeadPlan(qk=problem.dtype, pv=problem.dtype))
    planned = backend.run(problem, plan).out
    out, _ = backend.forward(*sets[0], mask=mask)
    assert torch.equal(out, planned), "both doors start the same kernel"
    return bursts, {
        "kernel": backend.provenance()["kernels"],
        "difference": difference([out], [SDPA(*sets[0], is_causal=causal)]),
    }


def flash3(sets: list[list[Any]], causal: bool) -> Burst | None:
    """FlashAttention-3 through JAX; None where it cannot be imported or refuses the dim."""
    try:
        jax, flash = flash3_of_jax()
        drawn = [
            [jax.dlpack.from_dlpack(x.transpose(1, 2).contiguous()) for x in s] for s in sets
        ]
        call = jax.jit(lambda q, k, v: flash(q, k, v, is_causal=causal))
        call(*drawn[0]).block_until_ready()
    except Exception as error:  # the wheel holds some head dims only, and says so in many ways
        print("FA3:", str(error)[:200], file=sys.stderr)
        return None
    calls = in_turn([lambda x=x: call(*x) for x in drawn])
    return by_host_together(calls, lambda out: out.block_until_ready())


FORWARD = Pass(
    stem="gpu_dense",
    title="Dense forward attention on one GPU",
    counted="TFLOP/s counts 4·b·h·n²·d, half for causal",
    products=2,
    cells=[
        (dim, length, causal)
        for dim in (64, 128, 256)
        for causal in (False, True)
        for length in (1024, 4096, 16_384)
    ],
    arrays=3,
    contenders=contenders,
    agreement_rel=0.01,
    colours={OURS: "#1b6ca8", CUDNN: "#76b900", FA3: "#e07b39", FA2: "#b8b8b8"},
    remark="FA2 and cuDNN are PyTorch's own backends; FA3 is the wheel `flash_attn3_jax`, `-`"
    " where it was not installed or does not take the head dim.",
)

if __name__ == "__main__":
    FORWARD.main(__doc__ or "")
