"""Block masks on a GPU: attention under a boolean mask, and skipped blocks stay unread."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adaattn_core import attention
from adaattn_core.errors import PlanError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import BlockSparse
from adaattn_cuda.backend import CudaBackend
from adaattn_torch import import_block_mask

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

UNIT = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 2.0**-19}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
MASKS = {
    "none": Mask.none(),
    "causal top left": Mask.causal("top_left"),
    "causal bottom right": Mask.causal("bottom_right"),
    "window": Mask.sliding_window(300, 20, "bottom_right"),
    "lengths": Mask.key_lengths([700, 333]),
}


@pytest.fixture(scope="module")
def backend() -> CudaBackend:
    return CudaBackend()


def arrays(
    dtype: str = "bf16",
    dims: tuple[int, int] = (64, 64),
    heads: tuple[int, int] = (4, 2),
    lens: tuple[int, int] = (900, 1000),
    batch: int = 2,
    seed: int = 0,
) -> list[Any]:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shapes = (
        (batch, heads[0], lens[0], dims[0]),
        (batch, heads[1], lens[1], dims[0]),
        (batch, heads[1], lens[1], dims[1]),
    )
    return [
        torch.randn(s, device="cuda", generator=generator).to(DTYPES[dtype]) for s in shapes
    ]


def blocks_of(problem: AttentionProblem, tile_q: int, tile_kv: int, share: float) -> Any:
    """Random blocks for each sequence and head; one tile of rows that sees nothing."""
    rng = np.random.default_rng(1)
    longest = max(s.len_q for s in problem.sequences)
    keys = (
        problem.len_kv
        if problem.mask.cu_seqlens_kv is None
        else max(s.len_kv for s in problem.sequences)
    )
    shape = (
        len(problem.sequences),
        problem.heads_q,
        -(-longest // tile_q),
        -(-keys // tile_kv),
    )
    kept = rng.random(shape) < share
    kept[:, 0, 1] = False
    return kept


def expected(problem: AttentionProblem, kept: Any, tile_q: int, tile_kv: int) -> Any:
    """Exact attention in float64, and lse, of what lies in the blocks."""
    q, k, v = (x.double() for x in (problem.query, problem.key, problem.value))
    group = problem.heads_q // problem.heads_kv
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64, device="cuda")
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64, device="cuda")
    for s in problem.sequences:
        start, stop = problem.mask.intervals(s.len_q, s.len_kv)
        key = np.arange(s.len_kv)
        seen = (key >= start[:, None]) & (key < stop[:, None])
        whole = kept[s.index].repeat(tile_q, 1).repeat(tile_kv, 2)[:, : s.len_q, : s.len_kv]
        seen = torch.from_numpy(seen & whole).cuda()
        rows, keys = slice(s.q_start, s.q_stop), slice(s.kv_start, s.kv_stop)
        own = k[s.batch, :, keys].repeat_interleave(group, 0)
        scores = q[s.batch, :, rows] @ own.mT * problem.scale
        scores = scores.masked_fill(~seen, -math.inf)
        lse[s.batch, :, rows] = scores.logsumexp(-1)
        weights = scores.softmax(-1).nan_to_num(0.0)
        out[s.batch, :, rows] = weights @ v[s.batch, :, keys].repeat_interleave(group, 0)
    return out, lse


def check(
    backend: CudaBackend,
    problem: AttentionProblem,
    *,
    tile_q: int = 128,
    tile_kv: int = 64,
    share: float = 0.4,
    kernel: str = "",
) -> Any:
    kept = blocks_of(problem, tile_q, tile_kv, share)
    head = HeadPlan(qk=problem.dtype, pv=problem.dtype)
    plan = Plan.block_sparse(problem, kept, tile_q=tile_q, tile_kv=tile_kv, head=head)
    raw = backend.run(problem, plan)
    assert kernel in backend.provenance()["kernels"]
    out, lse = expected(problem, kept, tile_q, tile_kv)
    error = float((raw.out.double() - out).norm() / out.norm())
    assert error <= 2 * UNIT[problem.dtype], error
    reached = torch.isfinite(lse)
    assert torch.equal(torch.isfinite(raw.lse), reached)
    assert (raw.out[~reached] == 0).all()
    away = (raw.lse[reached] - lse[reached]).abs().max()
    assert away <= 2.0**-12 * lse[reached].abs().max()
    return raw


@pytest.mark.parametrize(
    ("dtype", "dims", "heads"),
    [
        ("bf16", (64, 64), (4, 2)),
        ("f16", (96, 96), (3, 3)),
        ("bf16", (128, 128), (8, 1)),
        ("f16", (128, 128), (2, 2)),
        ("bf16", (256, 256), (2, 1)),
        ("f16", (128, 64), (4, 2)),
        ("bf16", (64, 192), (2, 2)),
    ],
)
def test_hopper(
    backend: CudaBackend, dtype: str, dims: tuple[int, int], heads: tuple[int, int]
) -> None:
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for mask in MASKS.values():  # within one test: a kernel compiles once a process
        problem = AttentionProblem.from_arrays(*arrays(dtype, dims, heads), mask=mask)
        check(backend, problem, kernel="sm90_attn_fwd_f16" if hopper else "sm80_attn_fwd")


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (37, 51)])
def test_float32(backend: CudaBackend, dims: tuple[int, int]) -> None:
    for mask in MASKS.values():
        problem = AttentionProblem.from_arrays(*arrays("f32", dims), mask=mask)
        check(backend, problem, kernel="sm80_attn_fwd")


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_block_sizes(backend: CudaBackend, share: float) -> None:
    problem = AttentionProblem.from_arrays(*arrays(), mask=Mask.causal("bottom_right"))
    for tile_q, tile_kv in ((128, 128), (64, 64), (256, 32), (32, 16), (100, 56)):
        check(backend, problem, tile_q=tile_q, tile_kv=tile_kv, share=share)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_packed_sequences(backend: CudaBackend, dtype: str) -> None:
    q, k, v = arrays(dtype, lens=(900, 1000), batch=1)
    mask = Mask.ragged([0, 400, 400, 900], [0, 350, 500, 1000]) & Mask.causal("bottom_right")
    check(backend, AttentionProblem.from_arrays(q, k, v, mask=mask))


def test_array_masks(backend: CudaBackend) -> None:
    """What no interval states goes to the other family, blocks and all."""
    q, k, v = arrays("bf16")
    allowed = torch.rand((2, 4, 900, 1000), device="cuda") < 0.5
    problem = AttentionProblem.from_arrays(q, k, v, mask=Mask.boolean(allowed))
    kept = blocks_of(problem, 128, 64, 0.4)
    plan = Plan.block_sparse(problem, kept, head=HeadPlan(qk="bf16", pv="bf16"))
    raw = backend.run(problem, plan)
    whole = torch.from_numpy(kept.repeat(128, 2).repeat(64, 3)[..., :900, :1000]).cuda()
    true = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1),
        attn_mask=whole & allowed,
    ).nan_to_num(0.0)  # fmt: skip
    assert float((raw.out.double() - true).norm() / true.norm()) <= 2 * UNIT["bf16"]


def test_all_blocks_are_dense_and_certified(backend: CudaBackend) -> None:
    q, k, v = arrays()
    mask = Mask.causal("bottom_right")
    problem = AttentionProblem.from_arrays(q, k, v, mask=mask)
    kept = np.ones((8, 16), bool)
    plan = Plan.block_sparse(problem, kept, head=HeadPlan(qk="bf16", pv="bf16"))
    result = attention(q, k, v, mask=mask, plan=plan, backend=backend)
    exact = attention(q, k, v, mask=mask, backend=backend)
    assert all(facts.share == 1 for facts in result.facts.values())
    assert np.isfinite(result.certificate.upper).all()
    assert float((result.out.double() - exact.out.double()).abs().max()) <= 2.0**-6
    kept[3, 2] = False
    plan = Plan.block_sparse(problem, kept, head=HeadPlan(qk="bf16", pv="bf16"))
    result = attention(q, k, v, mask=mask, plan=plan, backend=backend)
    assert (result.certificate.upper == math.inf).all()
    assert all(0.9 < facts.share < 1 for facts in result.facts.values())


def test_heads_of_one_plan_run_as_they_are_planned(backend: CudaBackend) -> None:
    problem = AttentionProblem.from_arrays(*arrays(), mask=Mask.causal("bottom_right"))
    dense = HeadPlan(qk="bf16", pv="bf16")
    sparse = replace(dense, structure=BlockSparse.from_mask(np.eye(8, 16, dtype=bool)))
    plan = Plan({i: sparse if i[1] % 2 else dense for i in problem.heads()})
    raw = backend.run(problem, plan)
    other = backend.run(problem, Plan.uniform(problem, dense))
    assert torch.equal(raw.out[:, ::2], other.out[:, ::2])
    assert not torch.equal(raw.out[:, 1::2], other.out[:, 1::2])
    shares = {i: raw.facts[i].share for i in problem.heads()}
    assert all(0 < shares[i] < 0.2 if i[1] % 2 else shares[i] == 1 for i in shares)
    backend.run(problem, Plan.uniform(problem, dense), heads=[(0, 1)], into=raw)
    assert torch.equal(raw.out[0, 1], other.out[0, 1])
    assert raw.facts[0, 1].share == 1


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_keys_of_skipped_blocks_are_not_touched(backend: CudaBackend, dtype: str) -> None:
    """Whatever they hold: the same bits."""
    q, k, v = arrays(dtype, batch=1)
    kept = np.zeros((8, 16), bool)
    kept[:, [1, 2, 7, 9]] = True
    problem = AttentionProblem.from_arrays(q, k, v)
    plan = Plan.block_sparse(problem, kept, head=HeadPlan(qk=dtype, pv=dtype))
    before = backend.run(problem, plan)
    hidden = torch.from_numpy(~kept[0].repeat(64)[:1000]).cuda()
    for held in (math.nan, math.inf, -math.inf):
        k[:, :, hidden], v[:, :, hidden] = held, held
        after = backend.run(problem, plan)
        assert torch.equal(before.out, after.out)
        assert torch.equal(before.lse, after.lse)
    v[0, 0, 64 * 7 + 3] = math.nan  # a key that they keep
    seen = backend.run(problem, plan).out
    assert seen[:, :2].isnan().any(-1).all()
    assert torch.equal(seen[:, 2:], before.out[:, 2:])


def test_a_plan_is_captured_after_one_run(backend: CudaBackend) -> None:
    q, k, v = arrays()
    problem = AttentionProblem.from_arrays(q, k, v)
    kept = np.random.default_rng(0).random((8, 16)) < 0.5
    plan = Plan.block_sparse(problem, kept, head=HeadPlan(qk="bf16", pv="bf16"))
    first = backend.run(problem, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        raw = backend.run(problem, plan)
    graph.replay()
    assert torch.equal(raw.out, first.out)


def test_plans_that_do_not_fit_are_refused(backend: CudaBackend) -> None:
    problem = AttentionProblem.from_arrays(*arrays())
    head = HeadPlan(
        structure=BlockSparse.from_mask(np.ones((3, 4), bool)), qk="bf16", pv="bf16"
    )
    with pytest.raises(PlanError, match="query tiles"):
        backend.run(problem, Plan.uniform(problem, head))
    fits = BlockSparse.from_mask(np.ones((8, 16), bool))
    with pytest.raises(UnsupportedError, match="formats"):
        backend.run(
            problem, Plan.uniform(problem, HeadPlan(structure=fits, qk="i8", pv="bf16"))
        )


@pytest.mark.parametrize("causal", [True, False])
def test_flex_attentions_block_mask(backend: CudaBackend, causal: bool) -> None:
    """A BlockMask on the device becomes work lists; nothing of its size is made."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    length = 4096
    q, k, v = arrays(lens=(length, length))

    document = torch.arange(length, device="cuda") // 512  # read by the function, as usual

    def mask_mod(b: Any, h: Any, row: Any, key: Any) -> Any:
        same = (document[row] == document[key]) | (key < 128)
        return same & (row >= key) if causal else same

    blocks = flex.create_block_mask(mask_mod, None, None, length, length, device="cuda")
    imported = import_block_mask(blocks)
    problem = AttentionProblem.from_arrays(q, k, v, mask=imported.mask)
    plan = imported.plan(problem, HeadPlan(qk="bf16", pv="bf16"))
    before = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    raw = backend.run(problem, plan)
    assert torch.cuda.max_memory_allocated() < before + length * length
    row, key = torch.arange(length, device="cuda")[:, None], torch.arange(length, device="cuda")
    seen = mask_mod(0, 0, row, key)
    true = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1),
        attn_mask=seen,
    )  # fmt: skip
    assert float((raw.out.double() - true).norm() / true.norm()) <= 2 * UNIT["bf16"]
    assert raw.facts[0, 0].share < 0.5
