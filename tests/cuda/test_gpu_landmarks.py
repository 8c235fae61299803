"""Landmarks and chosen blocks by a plan, on a GPU: what NumPy makes of the same plan."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adaattn_core import attention
from adaattn_core.errors import UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import BlockSparse, Dense, Landmark
from adaattn_cuda.backend import CudaBackend

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
APART = {"bf16": 0.03, "f16": 0.01, "f32": 5e-3}
"""What roundings of a pool and a choice between nearly equal keys may move an output by."""
MASKS = {
    "none": Mask.none(),
    "causal top left": Mask.causal("top_left"),
    "causal bottom right": Mask.causal("bottom_right"),
    "lengths": Mask.key_lengths([1500, 900]) & Mask.causal("top_left"),
}


@pytest.fixture(scope="module")
def backend() -> CudaBackend:
    return CudaBackend()


def smooth(
    dtype: str,
    dims: tuple[int, int],
    heads: tuple[int, int],
    lens: tuple[int, int] = (1400, 1600),
    batch: int = 2,
) -> list[Any]:
    """Neighbours are alike, and a few keys are heavy for everybody."""
    generator = torch.Generator().manual_seed(1)

    def drift(count: int, length: int, dim: int) -> Any:
        steps = torch.randn(batch, count, length, dim, generator=generator)
        return (
            torch.nn.functional.avg_pool1d(
                steps.flatten(0, 1).mT, 33, stride=1, padding=16
            ).mT.unflatten(0, (batch, count))
            * 4
        )

    q, k = drift(heads[0], lens[0], dims[0]), drift(heads[1], lens[1], dims[0])
    heavy = torch.randint(lens[1] // 2, (9,), generator=generator)
    k[:, :, heavy] += torch.randn(dims[0], generator=generator)
    q = 3 * q + k[:, :, heavy].mean(2).repeat_interleave(heads[0] // heads[1], 1)[:, :, None]
    v = torch.randn(batch, heads[1], lens[1], dims[1], generator=generator)
    return [x.to(DTYPES[dtype]).cuda() for x in (q, k, v)]


def host(problem: AttentionProblem) -> AttentionProblem:
    """The same problem in NumPy's hands."""
    three = [x.cpu() for x in (problem.query, problem.key, problem.value)]
    return AttentionProblem.from_arrays(*three, mask=problem.mask, scale=problem.scale)


def numpy_of(problem: AttentionProblem, plan: Plan) -> Any:
    on_host = host(problem)
    return attention(
        on_host.query, on_host.key, on_host.value, mask=problem.mask, plan=plan, backend="numpy"
    )


def check(backend: CudaBackend, problem: AttentionProblem, structure: Any) -> Any:
    head = HeadPlan(structure=structure, qk=problem.dtype, pv=problem.dtype)
    plan = Plan.uniform(problem, head, seed=7)
    raw = backend.run(problem, plan)
    theirs = numpy_of(problem, plan)
    out, other = raw.out.double().cpu(), theirs.out.double()
    assert float((out - other).norm()) <= APART[problem.dtype] * float(other.norm())
    seen = torch.isfinite(raw.lse.cpu())
    assert torch.equal(seen, torch.isfinite(torch.as_tensor(np.asarray(theirs.lse))))
    for index in problem.heads():
        ours, facts = raw.facts[index], theirs.facts[index]
        assert ours.share == pytest.approx(facts.share, rel=0.03)
        assert ours.rank == pytest.approx(facts.rank, rel=0.1, abs=64)
        assert ours.dropped_mass_upper == facts.dropped_mass_upper
    return raw


@pytest.mark.parametrize(
    ("dtype", "dims", "heads"),
    [
        ("bf16", (64, 64), (4, 2)),
        ("f16", (128, 128), (3, 1)),
        ("f16", (64, 128), (2, 1)),
        ("bf16", (256, 256), (2, 1)),
        ("f32", (40, 72), (2, 2)),
    ],
)
def test_landmarks(
    backend: CudaBackend, dtype: str, dims: tuple[int, int], heads: tuple[int, int]
) -> None:
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for name, mask in MASKS.items():  # within one test: a kernel compiles once a process
        problem = AttentionProblem.from_arrays(*smooth(dtype, dims, heads), mask=mask)
        structure = Landmark(tau=0.05, band=256, group=512, tile=128, screen_rank=0)
        check(backend, problem, structure)
        own = hopper and dtype != "f32" and name != "none"
        assert ("sm90_attn" if own else "sm80_attn") in backend.provenance()["kernels"], name


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_sizes(backend: CudaBackend, dtype: str) -> None:
    problem = AttentionProblem.from_arrays(
        *smooth(dtype, (64, 64), (2, 1)), mask=Mask.causal("bottom_right")
    )
    cases: list[dict[str, Any]] = [
        {"band": 64, "group": 256, "tile": 64, "tail": 0},
        {"band": 0, "group": 1024, "tile": 256, "samples": 64},
        {"band": 96, "group": 384, "tile": 96, "pool": 32},
        {"band": 128, "group": 512, "tile": 128, "pool": 0},
    ]
    for sizes in cases:
        check(backend, problem, Landmark(tau=0.05, screen_rank=0, **sizes))


def test_packed_sequences(backend: CudaBackend) -> None:
    mask = Mask.ragged([0, 700, 700, 1400], [0, 600, 800, 1600]) & Mask.causal("bottom_right")
    q, k, v = smooth("bf16", (64, 64), (2, 1), batch=1)
    problem = AttentionProblem.from_arrays(q, k, v, mask=mask)
    check(backend, problem, Landmark(band=64, group=256, tile=64, screen_rank=0))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_chosen_blocks(backend: CudaBackend, dtype: str) -> None:
    structure = BlockSparse(tau=0.2, band=128, tile_q=128, tile_kv=64, group=512)
    for mask in (*MASKS.values(), Mask.sliding_window(500, 40, "bottom_right")):
        problem = AttentionProblem.from_arrays(*smooth(dtype, (64, 64), (2, 1)), mask=mask)
        check(backend, problem, structure)


def test_certificates_say_nothing_of_what_was_left_out(backend: CudaBackend) -> None:
    q, k, v = smooth("bf16", (64, 64), (2, 1))
    mask = Mask.causal("bottom_right")
    problem = AttentionProblem.from_arrays(q, k, v, mask=mask)
    landmark = Landmark(band=256, group=512, tile=128, screen_rank=0)
    plan = Plan.uniform(problem, HeadPlan(structure=landmark, qk="bf16", pv="bf16"))
    result = attention(q, k, v, mask=mask, plan=plan, backend=backend)
    assert (result.certificate.upper == math.inf).all()


def test_a_plan_repeats_bit_for_bit_alone_or_in_a_batch(backend: CudaBackend) -> None:
    q, k, v = smooth("bf16", (64, 64), (4, 2))
    mask = Mask.causal("bottom_right")
    problem = AttentionProblem.from_arrays(q, k, v, mask=mask)
    structure = Landmark(band=256, group=512, tile=128, screen_rank=0)
    head = HeadPlan(structure=structure, qk="bf16", pv="bf16")
    first = backend.run(problem, Plan.uniform(problem, head, seed=2))
    again = backend.run(problem, Plan.uniform(problem, head, seed=2))
    assert torch.equal(first.out, again.out)
    one = AttentionProblem.from_arrays(q[1:], k[1:], v[1:], mask=mask)
    alone = backend.run(one, Plan.uniform(one, head, seed=2))
    assert torch.equal(alone.out[0], first.out[1])


def test_heads_that_see_nan_run_dense(backend: CudaBackend) -> None:
    q, k, v = smooth("bf16", (64, 64), (4, 2))
    k[1, 0, 300, 5] = math.nan
    mask = Mask.causal("bottom_right")
    problem = AttentionProblem.from_arrays(q, k, v, mask=mask)
    dense = HeadPlan(structure=Dense(), qk="bf16", pv="bf16")
    far = replace(dense, structure=Landmark(band=256, group=512, tile=128, screen_rank=0))
    raw = backend.run(problem, Plan.uniform(problem, far))
    assert raw.ran_dense == {(1, 0), (1, 1)}
    other = backend.run(problem, Plan.uniform(problem, dense))
    assert torch.equal(raw.out[1, :2].isnan(), other.out[1, :2].isnan())
    assert not raw.out[0].isnan().any()
    plan = attention(q, k, v, mask=mask, plan=Plan.uniform(problem, far), backend=backend).plan
    assert plan[1, 0].structure == Dense()
    assert "NaN" in plan.explain()


def test_a_recording_is_refused(backend: CudaBackend) -> None:
    q, k, v = smooth("bf16", (64, 64), (2, 1))
    problem = AttentionProblem.from_arrays(q, k, v)
    far = Landmark(band=256, group=512, tile=128, screen_rank=0)
    plan = Plan.uniform(problem, HeadPlan(structure=far, qk="bf16", pv="bf16"))
    backend.run(problem, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy = q + 1
        with pytest.raises(UnsupportedError, match="during a CUDA-graph capture"):
            backend.run(problem, plan)
    graph.replay()
    assert torch.equal(copy, q + 1), "the capture goes on"
