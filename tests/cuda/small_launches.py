"""Small launches of every path of the kernels, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python tests/cuda/small_launches.py exact
    compute-sanitizer --tool racecheck python tests/cuda/small_launches.py few rules adaptive

"exact": formats, masks, rows on and off the 16-byte grid, packed batches, NaN and Inf; "few" of
them: every mask and every head dim, not each with each, for the tools that take a second a
launch; "rules": softcaps and sinks; "eight_bit": operands of 8 bits; "blocks": given block
masks, chosen ones, landmarks by a plan, drawn rows; "backward": gradients, in any order and in
one; "decode": pages of every format and dim, read whole and in part; "adaptive": what plans,
runs and certifies a budget on the device. The figures of certificates are read. Nothing is
compared here. Needs torch with CUDA.
"""

from __future__ import annotations

import math
import sys
from itertools import accumulate

import ml_dtypes
import numpy as np
import torch

from adaattn_core.api import attention
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.policies import BudgetPolicy
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import BlockSparse, Landmark, ScoreSkip
from adaattn_core.testing.paged import PagedSpec
from adaattn_cuda.adaptive import LEAST_KEYS
from adaattn_cuda.backend import CudaBackend

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
LENGTHS = (70, 0, 200, 30)
EDGES = tuple(accumulate(LENGTHS, initial=0))
PACKED = Mask(cu_seqlens_q=EDGES, cu_seqlens_kv=EDGES)
LEN = EDGES[-1]


def masks() -> tuple[Mask | None, ...]:
    """One mask of every kind."""
    allowed = torch.rand((1, 1, LEN, LEN), device="cuda") < 0.5
    return (
        None,
        Mask.causal("bottom_right"),
        Mask.sliding_window(40, 20, "top_left"),
        Mask.key_lengths([100]),
        PACKED,
        Mask.boolean(allowed),
        Mask.additive(torch.randn((LEN,), device="cuda")),
    )


def problem_of(
    dtype: torch.dtype, dims: tuple[int, int], mask: Mask | None
) -> AttentionProblem:
    """Four query heads on two key heads, with a NaN and an Inf."""
    shapes = ((4, dims[0]), (2, dims[0]), (2, dims[1]))
    query, key, value = (
        torch.randn((1, heads, LEN, dim), device="cuda").to(dtype) for heads, dim in shapes
    )
    value[0, 0, 90, 3], key[0, 1, 5, 2] = math.nan, math.inf
    return AttentionProblem.from_arrays(query, key, value, mask=mask)


def problems(dtype: torch.dtype, few: bool) -> list[AttentionProblem]:
    """Every kind of mask, with head dims that fill 16 bytes and some that do not."""
    all_dims = ((64, 64), (37, 51), (128, 64), (256, 256))
    return [
        problem_of(dtype, dims, mask)
        for i, mask in enumerate(masks())
        for dims in ((all_dims[i % 4],) if few else all_dims)
    ]


def exact(few: bool) -> int:
    """Run them all; returns how many heads were looked at."""
    backend, heads = CudaBackend(), 0
    for name, dtype in DTYPES.items():
        for problem in problems(dtype, few):
            for operand in (name, "bf16"):
                plan = Plan.uniform(problem, HeadPlan(qk=operand, pv=operand))
                heads += len(dict(backend.run(problem, plan).facts))
    return heads


def eight_bit() -> int:
    """Run what the 8-bit kernel takes: interval masks and head dims in eights, up to 128."""
    backend, heads = CudaBackend(), 0
    if torch.cuda.get_device_capability() != (9, 0):
        return heads
    for problem in problems(DTYPES["bf16"], few=False):
        dims = problem.dim_qk, problem.dim_v
        if not problem.mask.is_structural or max(dims) > 128 or any(d % 8 for d in dims):
            continue
        for qk, pv in (("i8", "e4m3"), ("i8", "bf16"), ("bf16", "e4m3")):
            plan = Plan.uniform(problem, HeadPlan(qk=qk, pv=pv))
            heads += len(dict(backend.run(problem, plan).facts))
    return heads


def looked_at(backend: CudaBackend, problem: AttentionProblem, plan: Plan) -> int:
    """Run a plan, read its figures, and compare a few rows."""
    raw = backend.run(problem, plan)
    rows = {
        (sequence, head): np.arange(min(problem.sequences[sequence].len_q, 3))
        for sequence, head in problem.heads()
    }
    backend.row_errors(problem, raw, rows)
    return len(dict(raw.facts))


def blocks() -> int:
    """Blocks, given and chosen, and landmarks, in both families; NaN and Inf among values."""
    backend, heads = CudaBackend(), 0
    for name, dtype in DTYPES.items():
        for problem in problems(dtype, few=True):
            packed = problem.mask.cu_seqlens_q is not None
            longest = max(LENGTHS) if packed else LEN
            kept = (
                np.random.default_rng(heads).random((-(-longest // 64), -(-longest // 32)))
                < 0.5
            )
            kept[0] = False
            plan = Plan.block_sparse(
                problem, kept, tile_q=64, tile_kv=32, head=HeadPlan(qk=name, pv=name)
            )
            heads += looked_at(backend, problem, plan)
            chosen = BlockSparse(tau=0.2, band=0, tile_q=32, tile_kv=16, group=64, samples=8)
            plan = Plan.uniform(problem, HeadPlan(structure=chosen, qk=name, pv=name))
            heads += looked_at(backend, problem, plan)
            far = Landmark(
                tau=0.2, band=0, tile=64, group=64, samples=8, tail=64, pool=32, screen_rank=0
            )
            if not problem.mask.is_structural or problem.mask.left is not None:
                continue
            plan = Plan.uniform(problem, HeadPlan(structure=far, qk=name, pv=name))
            heads += looked_at(backend, problem, plan)
    return heads


def rules() -> int:
    """Softcap and sinks, alone and together, in both families; NaN and Inf among the values."""
    backend, heads = CudaBackend(), 0
    sinks = torch.tensor([1.0, -2.0, 30.0, -math.inf], device="cuda")
    kinds = ({"softcap": 3.0}, {"sinks": sinks}, {"softcap": 3.0, "sinks": sinks})
    for name, dtype in DTYPES.items():
        for i, plain in enumerate(problems(dtype, few=True)):
            three = plain.query, plain.key, plain.value
            problem = AttentionProblem.from_arrays(*three, mask=plain.mask, **kinds[i % 3])
            plan = Plan.uniform(problem, HeadPlan(qk=name, pv=name))
            heads += len(dict(backend.run(problem, plan).facts))
    return heads


def backward() -> int:
    """Gradients by every path of both families, of few kernels: most of the time compiles.

    Without rules, and under a softcap with sinks.
    With NaN and Inf about, which on Hopper makes the pass be done again, and without.
    """
    backend, heads = CudaBackend(), 0
    for dtype, dims, kinds in (
        ("bf16", (64, 64), range(7)),  # all masks; those without arrays take Hopper's kernel
        ("f32", (37, 51), (1, 5, 6)),  # three products each, rows off the 16-byte grid
        ("f16", (256, 128), (1,)),  # keys and values by a launch each
    ):
        every = masks()
        for mask in (every[i] for i in kinds):
            problem = problem_of(DTYPES[dtype], dims, mask)
            grad = torch.randn((1, 4, LEN, dims[1]), device="cuda").to(DTYPES[dtype])
            arrays = problem.query, problem.key, problem.value, grad
            need = problem.mask.bias is not None
            for clean in (False, True):
                given = [x.nan_to_num(0, 0, 0) if clean else x for x in arrays]
                for fixed in (False, not need):
                    backend.backward(
                        *given, mask=problem.mask, need_bias=need, deterministic=fixed
                    )
                    heads += 4
    sinks = torch.tensor([1.0, -2.0, 30.0, -math.inf], device="cuda")
    problem = problem_of(torch.bfloat16, (64, 64), Mask.causal("bottom_right"))
    arrays = (problem.query, problem.key, problem.value, torch.zeros_like(problem.query))
    for rules_ in ({"sinks": sinks}, {"sinks": sinks, "softcap": 3.0}):
        backend.backward(*arrays, mask=problem.mask, **rules_)
        heads += 4
    return heads


def adaptive() -> int:
    """Plan, run and certify on the device: a smooth head, a hard one, their group's keys."""
    smooth = torch.randn((1, 1, LEAST_KEYS // 128, 64), device="cuda").repeat_interleave(128, 2)
    noise = torch.randn((1, 1, LEAST_KEYS, 64), device="cuda")
    query = torch.cat((smooth, 4 * noise), 1).bfloat16()
    key, value = smooth.bfloat16(), (smooth + 0.1 * noise).bfloat16()
    heads = 0
    unhurried = BudgetPolicy(worthwhile=1e9)  # so short a problem is measured by no other
    narrow = BudgetPolicy(narrow_worthwhile=1e9, worthwhile=0.0)  # nor run in 8 bits first
    both = BudgetPolicy(narrow_worthwhile=1e9, worthwhile=1e9, narrow_diffuse=0.5)
    for mask in (Mask.causal(), Mask()):
        for policy in (None, narrow, both, unhurried):
            result = attention(
                query, key, value, mask=mask, budget=0.2, policy=policy, backend="cuda", seed=0
            )
            if result.provenance.get("planned_on") != "device":
                raise SystemExit(f"not planned on the device: {dict(result.provenance)}")
            heads += len(dict(result.certificate.heads))
            if policy is narrow and not any(p.qk == "i8" for p in result.plan.heads.values()):
                raise SystemExit("no head ran in 8 bits")
        if not any(stats.structures for stats in result.stats.heads.values()):
            raise SystemExit("no structure was measured")
    return heads


def decode() -> int:
    """Decode steps over pages that lie anyhow, ragged and padded; one split, and many."""
    backend, heads = CudaBackend(), 0
    for dim in (64, 128, 256):
        for narrow in ("", "i8", "e4m3"):
            for lam in (0.0, 1e-3):
                for len_q, lengths in ((1, (1500, 90, 0)), (3, (700, 5))):
                    spec = PagedSpec(
                        starts=(0,) * len(lengths), lengths=lengths, heads_kv=2, group=4,
                        len_q=len_q, page_len=128, dim_qk=dim, dim_v=dim, dtype="bf16",
                        narrow=narrow, causal=True, peak=0.5,
                    )  # fmt: skip
                    problem = spec.problem(on_device)
                    head = HeadPlan(qk="bf16", pv="bf16")
                    if lam:
                        head = HeadPlan(qk="bf16", pv="bf16", structure=ScoreSkip(lam=lam))
                    raw = backend.run(problem, Plan.uniform(problem, head))
                    _ = raw.facts[0, 0]  # the host works them out: one is enough
                    heads += len(lengths) * 8
    return heads


def on_device(x: np.ndarray) -> torch.Tensor:
    """Send an array to the device; NumPy's bf16 is a stranger to torch."""
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16).cuda()
    return torch.from_numpy(np.ascontiguousarray(x)).cuda()


def main() -> None:
    """Run what the command line names and say how many heads were looked at."""
    chosen = sys.argv[1:] or ["exact", "adaptive"]
    heads = 0
    for what in chosen:
        others = {
            "adaptive": adaptive, "backward": backward, "rules": rules, "eight_bit": eight_bit,
            "blocks": blocks, "decode": decode,
        }  # fmt: skip
        heads += others[what]() if what in others else exact(few=what == "few")
    torch.cuda.synchronize()
    print(f"figures of {heads} heads")


if __name__ == "__main__":
    main()
