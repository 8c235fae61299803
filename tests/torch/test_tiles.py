"""Landmarks of consecutive rows: against exact attention, on every device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaattn_core import ErrorBudget, Mask, attention
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.plugins.registry import get_backend
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import Landmark
from adaattn_core.testing.oracles import exact_attention, row_quantile
from adaattn_torch.backend.geometry import Geometry
from adaattn_torch.backend.masking import SequenceMask
from adaattn_torch.backend.operands import Operands
from adaattn_torch.backend.tiles import OCTAVES, Strip
from adaattn_torch.backend.tiling import TiledHeads, Tiling, takes

TILED = Landmark(tau=0.05, band=64, group=128, samples=8, tile=128, tail=32, screen_rank=0)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def _problem(
    len_q: int, len_kv: int, mask: Mask, dim_v: int = 32
) -> tuple[AttentionProblem, list[np.ndarray]]:
    rng = np.random.default_rng(len_q + len_kv)
    centres = 2 * rng.standard_normal((16, 32))
    key = centres[rng.integers(0, 16, (2, len_kv))] + 0.3 * rng.standard_normal((2, len_kv, 32))
    query = centres[rng.integers(0, 16, (4, len_q))] + 0.3 * rng.standard_normal((4, len_q, 32))
    value = rng.standard_normal((2, len_kv, dim_v))
    arrays = [x[None].astype(np.float32) for x in (query, key, value)]
    return AttentionProblem.from_arrays(*arrays, mask=mask), arrays


MASKS = {
    "causal": (640, 640, Mask.causal()),
    "longer keys": (384, 900, Mask.causal("bottom_right")),
    "rows left over": (700, 700, Mask.causal()),
    "full": (512, 600, Mask.none()),
    "padded": (384, 900, Mask.causal("bottom_right") & Mask.key_lengths([800])),
}


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dim_v", [32, 48])
def test_certificates_hold_and_numpy_agrees(name: str, dim_v: int, device: str) -> None:
    """The same plan on NumPy: both lie within their certificates, and keep as many scores."""
    len_q, len_kv, mask = MASKS[name]
    problem, arrays = _problem(len_q, len_kv, mask, dim_v)
    plan = Plan.uniform(problem, HeadPlan(structure=TILED), seed=3)
    budget = ErrorBudget(1.0, rows=0.9, on_violation="report")
    sent = [torch.from_numpy(x).to(device) for x in arrays]
    mine = attention(*sent, mask=mask, plan=plan, budget=budget, seed=5, backend="torch")
    theirs = attention(*arrays, mask=mask, plan=plan, budget=budget, seed=5, backend="numpy")
    oracle = exact_attention(problem)
    out = mine.out.cpu().numpy().astype(np.float64)
    tail = slice(len_q - TILED.tail, len_q)
    assert np.abs(out[:, :, tail] - oracle.out[:, :, tail]).max() < 1e-5
    for head in range(4):
        error = row_quantile(out[0, head], oracle.out[0, head], 0.9)
        facts = mine.facts[0, head]
        assert error <= mine.certificate[0, head].upper * facts.output_rms * (1 + 1e-6)
        other = row_quantile(np.asarray(theirs.out)[0, head], oracle.out[0, head], 0.9)
        assert error <= 2 * other + 0.02
        assert facts.share < 1 or mine.certificate[0, head].upper < 1e-3
        assert facts.share == pytest.approx(theirs.facts[0, head].share, rel=0.3)


@pytest.mark.parametrize("causal", [True, False])
def test_nothing_is_left_where_tau_is_nothing(causal: bool) -> None:
    """With every key that has a mass as a landmark, what is left is rounding."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 512, 32) for _ in range(3))
    mask = Mask.causal() if causal else Mask.none()
    problem = AttentionProblem.from_arrays(q, k, v, mask=mask)
    structure = Landmark(tau=0.0, band=64, group=128, samples=8, tile=128, screen_rank=0)
    plan = Plan.uniform(problem, HeadPlan(structure=structure))
    result = attention(q, k, v, mask=mask, plan=plan, backend="torch")
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert float((result.out - exact).abs().max()) < 1e-5


def _strip(len_kv: int, tiles: list[int]) -> Strip:
    torch.manual_seed(1)
    mask = Mask.causal()
    q, k, v = (torch.randn(1, 2, len_kv, 16) for _ in range(3))
    problem = AttentionProblem.from_arrays(3 * q, k, v, mask=mask)
    tiling = Tiling.of(Geometry.of(SequenceMask.of(problem, 0, q.device), TILED))
    assert tiling is not None
    heads = TiledHeads.of(Operands(3 * q[0], k[0], v[0], 0.25), [0, 1], tiling)
    return Strip.probe(heads, tiles, 0)


@pytest.mark.parametrize("tau", [0.3, 0.05, 0.01])
def test_landmarks_are_the_fewest_that_leave_the_mass(tau: float) -> None:
    """As few as sorting would choose, but for keys whose masses are within 1 part in 16."""
    strip = _strip(1024, [5, 7])
    chosen = strip.landmarks([tau, tau])
    left = (strip.mass * ~chosen).sum(dim=2)
    assert (left <= tau * (1 + 1e-5)).all()
    least = torch.where(chosen, strip.mass, torch.inf).amin(dim=2, keepdim=True)
    fewer = strip.mass >= least * (1 + 2**-3)
    assert ((strip.mass * ~fewer).sum(dim=2) > tau).all()
    assert not (chosen & (strip.mass < 2.0**-OCTAVES)).any()


def test_sampled_masses_are_softmax_masses() -> None:
    """What a strip says of its rows is what softmax says, far keys only."""
    strip = _strip(640, [4])
    heads, tiling = strip.heads, strip.heads.tiling
    rows = torch.from_numpy(tiling.drawn(4, 0))
    scores = heads.query[:, rows] @ heads.key.transpose(1, 2) * heads.scale
    scores = scores.masked_fill(torch.arange(640) > rows[:, None], -torch.inf)
    mass = torch.softmax(scores, 2).mean(dim=1)[:, : tiling.start[4]]
    assert torch.allclose(strip.mass[:, 0], mass, atol=1e-6)
    assert torch.allclose(strip.lse[:, 0], torch.logsumexp(scores, 2), atol=1e-5)


def test_what_is_taken() -> None:
    """Clusters, screens and groups of several tiles go another way."""
    assert takes(TILED)
    for other in (
        Landmark(group=128, tile=128),  # a screen
        Landmark(group=256, tile=128, screen_rank=0),
        Landmark(group=128, tile=128, clusters=2, screen_rank=0),
        Landmark(group=128, tile=128, band=0, pool=0, screen_rank=0),
    ):
        assert not takes(other)


@pytest.mark.gpu
def test_heads_that_are_run_again_keep_their_bits() -> None:
    """Products are spelled out on CUDA: some heads alone give what all of them gave."""
    backend = get_backend("torch")
    problem, arrays = _problem(96, 96, Mask.causal())
    sent = [torch.from_numpy(x).cuda() for x in arrays]
    problem = AttentionProblem.from_arrays(*sent, mask=Mask.causal())
    plan = Plan.uniform(problem, HeadPlan(qk="f32", pv="f32"))
    first = backend.run(problem, plan)
    kept = first.out.clone()
    again = backend.run(problem, plan, heads=[(0, 1), (0, 2)], into=first)
    assert torch.equal(again.out, kept)
