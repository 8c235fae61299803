"""Small launches of every path of the kernels, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python tests/cuda/small_launches.py

Formats, masks, rows on and off the 16-byte grid, packed batches, NaN and Inf; the figures of
certificates are read. Nothing is compared here. Needs torch with CUDA.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch

from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.backend import CudaBackend

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
LENGTHS = (70, 0, 200, 30)
EDGES = tuple(accumulate(LENGTHS, initial=0))
PACKED = Mask(cu_seqlens_q=EDGES, cu_seqlens_kv=EDGES)
LEN = EDGES[-1]


def problems(dtype: torch.dtype) -> list[AttentionProblem]:
    """Every kind of mask, with head dims that fill 16 bytes and some that do not."""
    allowed = torch.rand((1, 1, LEN, LEN), device="cuda") < 0.5
    masks = (
        None,
        Mask.causal("bottom_right"),
        Mask.sliding_window(40, 20, "top_left"),
        Mask.key_lengths([100]),
        PACKED,
        Mask.boolean(allowed),
        Mask.additive(torch.randn((LEN,), device="cuda")),
    )
    found = []
    for mask in masks:
        for dims in ((64, 64), (37, 51), (128, 64), (256, 256)):
            shapes = ((4, dims[0]), (2, dims[0]), (2, dims[1]))
            query, key, value = (
                torch.randn((1, heads, LEN, dim), device="cuda").to(dtype)
                for heads, dim in shapes
            )
            value[0, 0, 90, 3], key[0, 1, 5, 2] = math.nan, math.inf
            found.append(AttentionProblem.from_arrays(query, key, value, mask=mask))
    return found


def main() -> None:
    """Run them all and say how many heads were looked at."""
    backend, heads = CudaBackend(), 0
    for name, dtype in DTYPES.items():
        for problem in problems(dtype):
            for operand in (name, "bf16"):
                plan = Plan.uniform(problem, HeadPlan(qk=operand, pv=operand))
                heads += len(dict(backend.run(problem, plan).facts))
    torch.cuda.synchronize()
    print(f"facts of {heads} heads")


if __name__ == "__main__":
    main()
