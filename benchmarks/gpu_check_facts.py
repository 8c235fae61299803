"""Small runs of every path of smxx_operand_norms, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python benchmarks/gpu_check_facts.py

Three dtypes; rows on and off the 16-byte grid; whole, causal and packed batches; several blocks
to a head; NaN and Inf. The figures are read, as a certificate does. Needs torch with CUDA.
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


def main() -> None:
    """Run them all and say how many heads were looked at."""
    backend, heads = CudaBackend(), 0
    edges = tuple(accumulate(LENGTHS, initial=0))
    for name, dtype in DTYPES.items():
        for dim_qk, dim_v, mask in (
            (64, 64, None),
            (37, 51, Mask.causal("bottom_right")),
            (128, 64, Mask(cu_seqlens_q=edges, cu_seqlens_kv=edges)),
        ):
            shapes = ((4, dim_qk), (2, dim_qk), (2, dim_v))
            query, key, value = (
                torch.randn((1, h, edges[-1], dim), device="cuda").to(dtype)
                for h, dim in shapes
            )
            value[0, 0, 90, 3], key[0, 1, 5, 2] = math.nan, math.inf
            problem = AttentionProblem.from_arrays(query, key, value, mask=mask)
            plan = Plan.uniform(problem, HeadPlan(qk=name, pv=name))
            heads += len(dict(backend.run(problem, plan).facts))
    torch.cuda.synchronize()
    print(f"facts of {heads} heads")


if __name__ == "__main__":
    main()
