"""Backward pass of dense attention on one GPU: this library, cuDNN, FlashAttention-2 and -3.

    python benchmarks/gpu_backward.py --out DIR           measure; writes gpu_backward.json, .md
    python benchmarks/gpu_backward.py --render FILE.json  table and plot from an earlier run

16,384 tokens in all, model width 2,048, bf16, random inputs, two sets used in turn, contenders
in turn as in gpu_dense.py. A call is given the output and its lse and returns three gradients,
allocations included. cuDNN and FlashAttention-2 are torch's own backends through autograd;
FlashAttention-3 is the wheel flash_attn3_jax, where it can be imported, timed by the host clock
over a burst.
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
from adaattn_cuda.backend import CudaBackend

FIXED = "adaattn, deterministic"


def contenders(sets: list[list[Any]], causal: bool) -> tuple[dict[str, Burst], dict[str, Any]]:
    """Everybody, and how far our gradients are from cuDNN's."""
    bursts, reference = of_torch(sets, causal)
    bursts |= ours(sets, causal)
    if (fa3 := flash3(sets, causal)) is not None:
        bursts[FA3] = fa3
    mine = CudaBackend().backward(*sets[0], mask=Mask.causal() if causal else None)
    return bursts, {"difference": difference(mine[:3], reference)}


def ours(sets: list[list[Any]], causal: bool) -> dict[str, Burst]:
    """Time our own backward pass, and the same with its additions in one order."""
    backend, mask = CudaBackend(), Mask.causal() if causal else None
    saved = [backend.forward(*x[:3], mask=mask) for x in sets]

    def call(x: list[Any], kept: tuple[Any, Any], fixed: bool) -> Any:
        out, lse = kept
        return backend.backward(*x, out=out, lse=lse, mask=mask, deterministic=fixed)

    pairs = list(zip(sets, saved, strict=True))
    return {
        name: by_events(in_turn([
            lambda x=x, kept=kept, fixed=fixed: call(x, kept, fixed) for x, kept in pairs
        ]))
        for name, fixed in ((OURS, False), (FIXED, True))
    }  # fmt: skip


def of_torch(
    sets: list[list[Any]], causal: bool
) -> tuple[dict[str, Burst], list[torch.Tensor]]:
    """Time backward passes of cuDNN and FlashAttention-2; return cuDNN's gradients too."""
    found: dict[str, Burst] = {}
    gradients: list[torch.Tensor] = []
    for name, backend in (
        (FA2, SDPBackend.FLASH_ATTENTION),
        (CUDNN, SDPBackend.CUDNN_ATTENTION),
    ):
        graphs = []
        for *inputs, grad in sets:
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            with sdpa_kernel(backend):
                out = torch.nn.functional.scaled_dot_product_attention(
                    *leaves, is_causal=causal
                )
            graphs.append((out, leaves, grad))

        def call(out: Any, leaves: Any, grad: Any) -> Any:
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

        found[name] = by_events(in_turn([lambda g=g, call=call: call(*g) for g in graphs]))
        gradients = list(call(*graphs[0]))
    return found, gradients


def flash3(sets: list[list[Any]], causal: bool) -> Burst | None:
    """FlashAttention-3's backward pass through JAX; None where it cannot run."""
    try:
        jax, flash = flash3_of_jax()
        q, k, v, g = (jax.dlpack.from_dlpack(x.transpose(1, 2).contiguous()) for x in sets[0])
        _, pull = jax.vjp(lambda q, k, v: flash(q, k, v, is_causal=causal), q, k, v)
        call = jax.jit(lambda pull, g: pull(g))
        call(pull, g)[0].block_until_ready()
    except Exception as error:  # the wheel holds some head dims only, and says so in many ways
        print("FA3:", str(error)[:200], file=sys.stderr)
        return None
    return by_host_together(lambda: call(pull, g), lambda found: found[0].block_until_ready())


BACKWARD = Pass(
    stem="gpu_backward",
    title="Backward pass of dense attention on one GPU",
    counted="TFLOP/s counts 10·b·h·n²·d, half for causal, of calls that are given the output"
    " and return three gradients",
    products=5,
    cells=[
        (dim, length, causal)
        for dim in (64, 128)
        for causal in (False, True)
        for length in (1024, 4096, 16_384)
    ],
    arrays=4,
    contenders=contenders,
    agreement_rel=0.02,
    colours={
        OURS: "#1b6ca8", FIXED: "#8fbbdb", CUDNN: "#76b900", FA3: "#e07b39", FA2: "#b8b8b8",
    },
    remark="FA2 and cuDNN are PyTorch's own backends; FA3 is the wheel `flash_attn3_jax`, `-`"
    " where it was not installed or does not take the head dim.",
)  # fmt: skip

if __name__ == "__main__":
    BACKWARD.main(__doc__ or "")
