"""Causal heads whose rows are taken in halves: right, certified, of the same bits every way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from adaattn_core import AttentionProblem, HeadPlan, Mask, Plan, attention
from adaattn_core.structure import Landmark
from adaattn_core.testing.oracles import exact_attention, row_errors
from adaattn_torch.backend import TorchBackend, halves, kernels
from adaattn_torch.backend.halves import causal, whole_part


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(halves, "LEAST_ROWS", 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def given(heads_q: int, heads_kv: int, rows: int, batch: int = 1) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows)
    shapes = ((batch, heads_q, rows, 16), *[(batch, heads_kv, rows, 16)] * 2)
    return tuple(torch.randn(shape) for shape in shapes)


def test_heads_that_threads_share_evenly_stay_whole() -> None:
    assert whole_part((3, 3, 64), torch.float32, "cpu") == 2
    assert whole_part((1, 3, 64), torch.float32, "cpu") == 0
    assert whole_part((4, 2, 64), torch.float32, "cpu") == 4
    assert whole_part((3, 3, 63), torch.float32, "cpu") == 3
    assert whole_part((3, 3, 64), torch.float64, "cpu") == 3
    assert whole_part((3, 3, 64), torch.float32, "cuda") == 3


@pytest.mark.parametrize("rows", [64, 101, 700])
def test_halves_are_causal_attention(rows: int) -> None:
    q, k, v = given(9, 3, rows)
    query, key, value = q[0].unflatten(0, (3, 3)), k[0][:, None], v[0][:, None]
    key, value = (x.expand(-1, 3, -1, -1) for x in (key, value))
    out, lse, used = causal(query, key, value, 0.25)
    exact, sums = kernels.fused(query, key, value, 0.25, causal=True)
    assert used == kernels.HALVED
    torch.testing.assert_close(out, exact, atol=2e-6, rtol=0)
    torch.testing.assert_close(lse, sums, atol=2e-6, rtol=0)
    assert torch.equal(out[:2], exact[:2])


@pytest.mark.parametrize(("heads_q", "heads_kv"), [(9, 3), (3, 1), (3, 3), (1, 1), (4, 2)])
@pytest.mark.parametrize("rows_outermost", [False, True])
def test_the_short_way_gives_the_same_bits(
    heads_q: int, heads_kv: int, rows_outermost: bool
) -> None:
    q, k, v = given(heads_q, heads_kv, 130)
    if rows_outermost:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    out, lse = TorchBackend().forward(q, k, v, mask=Mask.causal())
    result = attention(q, k, v, mask=Mask.causal(), backend="torch")
    assert torch.equal(out, result.out)
    assert torch.equal(lse, result.lse)


def test_sequences_of_a_batch_are_halved_one_by_one() -> None:
    q, k, v = given(3, 3, 130, batch=2)
    out, _ = TorchBackend().forward(q, k, v, mask=Mask.causal())
    alone, _ = TorchBackend().forward(q[1:], k[1:], v[1:], mask=Mask.causal())
    assert torch.equal(out[1:], alone)


@pytest.mark.parametrize("planned", [range(9), (2, 3, 4, 5, 6), (1, 7, 8), (4,)])
def test_bits_of_a_head_depend_on_the_plan_alone(planned: tuple[int, ...]) -> None:
    """Whichever of the plan's dense heads are run again."""
    q, k, v = given(9, 3, 300)
    problem = AttentionProblem.from_arrays(q, k, v, mask=Mask.causal())
    far = HeadPlan(
        structure=Landmark(tau=0.1, band=64, group=128, samples=8, tile=128, screen_rank=0)
    )
    plan = Plan({(0, h): HeadPlan() if h in planned else far for h in range(9)}, seed=1)
    backend = TorchBackend()
    first = backend.run(problem, plan)
    kept = first.out.clone(), first.lse.clone()
    for heads in ([(0, planned[0])], [(0, planned[-1]), (0, planned[len(planned) // 2])]):
        first.out[0, [h for _, h in heads]] = 7.0
        again = backend.run(problem, plan, heads=heads, into=first)
        assert torch.equal(again.out, kept[0])
        assert torch.equal(again.lse, kept[1])


@pytest.mark.parametrize("size", [1.0, 6.0, 40.0])
def test_their_theorem_covers_merging(size: float) -> None:
    """Scores of some thousands make merging by a rounded logarithm the largest error."""
    q, k, v = given(3, 1, 200)
    q = q * size
    result = attention(q, k, v, mask=Mask.causal(), backend="torch")
    assert result.provenance["kernels"] == kernels.HALVED
    problem = AttentionProblem.from_arrays(q, k, v, mask=Mask.causal())
    exact = exact_attention(problem)
    for head in range(3):
        error = row_errors(result.out.numpy()[0, head], exact.out[0, head]).max()
        upper = result.certificate[0, head].upper * result.facts[0, head].output_rms
        assert np.isfinite(upper)
        assert error <= upper
