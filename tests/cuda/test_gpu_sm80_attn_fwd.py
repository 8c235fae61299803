"""The sm80 family on a device, against float64: every format, mask kind and dimension class."""

from __future__ import annotations

import math
from typing import Any

import pytest

from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.device.views import ArrayView, broadcast, view
from adaattn_cuda.kernels.sm80_attn_fwd import Sm80Launch
from adaattn_cuda.kernels.task import Task, addresses

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
LIMITS = {"bf16": 6e-3, "f16": 8e-4, "tf32": 1e-3, "f32": 2e-6}
"""Largest relative Frobenius error on N(0, 1) inputs, by the coarser of both formats."""


def run(problem: AttentionProblem, qk: str, pv: str) -> tuple[Any, Any]:
    """Outputs of two launches into poisoned arrays, which must be equal."""
    rows = (problem.batch, problem.heads_q, problem.len_q)
    dtype, mask = problem.query.dtype, problem.mask
    found = []
    for _ in range(2):
        out = torch.full((*rows, problem.dim_v), math.nan, dtype=dtype, device="cuda")
        lse = torch.full(rows, math.nan, device="cuda")

        def expanded(array: Any) -> ArrayView | None:
            return None if array is None else broadcast(view(array), (*rows, problem.len_kv))

        three = (view(problem.query), view(problem.key), view(problem.value))
        arrays = (*three, view(out), view(lse), expanded(mask.allowed), expanded(mask.bias))
        stream = torch.cuda.current_stream().cuda_stream
        launch = Sm80Launch(Task.of(problem, arrays, (qk, pv), None), stream)
        launch.start(addresses(arrays), 0, stream)
        found.append((out, lse))
    torch.cuda.synchronize()
    (out, lse), (again, lse_again) = found
    for one, other in ((out, again), (lse, lse_again)):
        assert torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)), "not repeatable"
    return out, lse


def oracle(problem: AttentionProblem) -> tuple[Any, Any]:
    """Float64 attention; rows that see nothing give 0 and -inf."""
    q, k, v = (x.double() for x in (problem.query, problem.key, problem.value))
    k, v = (x.repeat_interleave(problem.group_size, 1) for x in (k, v))
    batch, heads, len_q, _ = q.shape
    visible = torch.zeros((batch, heads, len_q, k.shape[2]), dtype=torch.bool)
    for s in problem.sequences:
        start, stop = (torch.as_tensor(x)[:, None] for x in problem.intervals(s.index))
        keys = torch.arange(s.len_kv)[None]
        seen = (keys >= start) & (keys < stop)
        visible[s.batch, :, s.q_start : s.q_stop, s.kv_start : s.kv_stop] = seen
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
    # Chosen, not multiplied, where values are not finite.
    out = weights @ torch.where(torch.isfinite(v), v, 0.0)
    bad = ~torch.isfinite(v)
    if bad.any():
        out = torch.where(visible.double() @ bad.double() > 0, math.nan, out)
    return torch.where(torch.isneginf(lse)[..., None], 0.0, out), lse


def check(problem: AttentionProblem, qk: str, pv: str, limit: float) -> None:
    out, lse = run(problem, qk, pv)
    expected, expected_lse = oracle(problem)
    finite, reached = torch.isfinite(expected), torch.isfinite(expected_lse)
    assert torch.equal(torch.isfinite(out), finite)
    assert torch.equal(torch.isfinite(lse), reached)
    error = torch.linalg.vector_norm((out.double() - expected)[finite])
    norm = torch.linalg.vector_norm(expected[finite])
    assert float(error) <= limit * max(float(norm), 1e-300)
    if reached.any():
        worst = float((lse.double() - expected_lse)[reached].abs().max())
        assert worst <= max(10 * limit, 2e-5)


def problem_of(
    dtype: str,
    batch: int,
    heads: tuple[int, int],
    lens: tuple[int, int],
    dims: tuple[int, int],
    mask: Mask | None = None,
) -> AttentionProblem:
    """Return a random problem; heads and dims are (query or key, key/value or value)."""
    shapes = (
        (batch, heads[0], lens[0], dims[0]),
        (batch, heads[1], lens[1], dims[0]),
        (batch, heads[1], lens[1], dims[1]),
    )
    arrays = (torch.randn(shape, device="cuda").to(DTYPES[dtype]) for shape in shapes)
    return AttentionProblem.from_arrays(*arrays, mask=mask)


MASKS = {
    "full": (None, (257, 515)),
    "causal_tl": (Mask.causal("top_left"), (300, 200)),
    "causal_br": (Mask.causal("bottom_right"), (300, 777)),
    "window": (Mask.sliding_window(100, 30, "bottom_right"), (500, 400)),
}
FORMATS = [
    ("bf16", "bf16", "bf16"),
    ("f16", "f16", "f16"),
    ("f32", "f32", "f32"),
    ("f32", "tf32", "tf32"),
    ("f32", "bf16", "f16"),
    ("bf16", "f32", "f32"),
]


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (96, 160), (72, 40)])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_formats(formats: tuple[str, str, str], name: str, dims: tuple[int, int]) -> None:
    mask, lens = MASKS[name]
    check(problem_of(formats[0], 2, (4, 2), lens, dims, mask), *formats[1:], limit_of(formats))


def limit_of(formats: tuple[str, str, str]) -> float:
    dtype, qk, pv = formats
    return max(LIMITS[qk], LIMITS[pv], 4e-3 if dtype == "bf16" else 0.0)


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_rows_that_are_not_aligned(formats: tuple[str, str, str]) -> None:
    odd = problem_of(formats[0], 1, (2, 1), (70, 90), (37, 51))
    check(odd, *formats[1:], limit_of(formats))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
class TestMasks:
    """What masks and hostile values do."""

    def test_lengths_with_nan_in_the_padding(self, dtype: str) -> None:
        p = problem_of(dtype, 3, (2, 1), (130, 500), (64, 64), Mask.key_lengths([0, 1, 500]))
        p.value[1, :, 1:], p.key[0] = math.nan, math.nan
        check(p, dtype, dtype, LIMITS[dtype])

    def test_ragged_and_causal(self, dtype: str) -> None:
        ragged = Mask.ragged([0, 0, 100, 101, 400], [0, 5, 205, 206, 500])
        mask = ragged & Mask.causal("bottom_right")
        p = problem_of(dtype, 1, (4, 2), (400, 500), (128, 128), mask)
        check(p, dtype, dtype, LIMITS[dtype])

    def test_more_sequences_than_one_launch_takes(self, dtype: str) -> None:
        edges = list(range(0, 300 * 7 + 1, 7))
        lens = (edges[-1], edges[-1])
        p = problem_of(dtype, 1, (2, 2), lens, (64, 64), Mask.ragged(edges, edges))
        check(p, dtype, dtype, LIMITS[dtype])

    def test_boolean(self, dtype: str) -> None:
        allowed = torch.rand((2, 1, 200, 333), device="cuda") < 0.3
        allowed[0, 0, 5] = False
        p = problem_of(dtype, 2, (4, 4), (200, 333), (64, 64), Mask.boolean(allowed))
        check(p, dtype, dtype, LIMITS[dtype])

    def test_additive_and_causal(self, dtype: str) -> None:
        bias = torch.randn((1, 4, 1, 333), device="cuda")
        bias[..., :9] = -math.inf
        mask = Mask.additive(bias) & Mask.causal("bottom_right")
        p = problem_of(dtype, 2, (4, 2), (200, 333), (128, 128), mask)
        check(p, dtype, dtype, LIMITS[dtype])

    def test_nonfinite_values_under_a_causal_mask(self, dtype: str) -> None:
        p = problem_of(dtype, 1, (1, 1), (200, 200), (64, 64), Mask.causal("top_left"))
        p.value[0, 0, 100, 3], p.value[0, 0, 150, 5] = math.nan, math.inf
        p.key[0, 0, 190] = 0.0
        check(p, dtype, dtype, LIMITS[dtype])

    def test_huge_scores_stay_one_hot(self, dtype: str) -> None:
        """Scores of about 1e10: the largest key takes the row; f32 values in two tf32 parts."""
        p = problem_of(dtype, 1, (1, 1), (100, 300), (64, 64))
        p.query.mul_(3e4), p.key.mul_(3e4)
        out, _ = run(p, dtype, dtype)
        scores = p.query.double() @ p.key.double().mT
        best = scores.topk(2, -1)
        clear = (best.values[..., 0] - best.values[..., 1]) > 1e-5 * best.values[..., 0].abs()
        expected = p.value[0, 0][best.indices[0, 0, :, 0]]
        assert clear.sum() > 90
        got, wanted = out[0, 0][clear[0, 0]].double(), expected[clear[0, 0]].double()
        limit = 2.0**-20 if dtype == "f32" else 0.0
        assert ((got - wanted).abs() <= limit * wanted.abs()).all()
