"""Score-then-skip: what is skipped weighs no more than its theorem says, in whatever order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaattn_core import AttentionProblem, HeadPlan, Mask, Plan, ScoreSkip
from adaattn_core.bounds import skipped_mass
from adaattn_core.stats import MeasureRequest
from adaattn_reference.backend import NumpyBackend
from adaattn_reference.score_skip import visiting_order
from adaattn_reference.view import ProblemViews

BACKEND = NumpyBackend()
LAMS = st.sampled_from((1e-6, 1e-3, 0.02, 0.3, 0.9))


def of_scores(scores: NDArray[np.float64], mask: Mask | None = None) -> AttentionProblem:
    """Build a problem with these scores whose output rows are the weights themselves."""
    n = scores.shape[1]
    query = scores.astype(np.float32)[None, None]
    unit = np.eye(n, dtype=np.float32)[None, None]
    return AttentionProblem.from_arrays(query, unit, unit, mask=mask, scale=1.0)


def run(problem: AttentionProblem, structure: ScoreSkip):
    plan = Plan.uniform(problem, HeadPlan(structure=structure))
    raw = BACKEND.run(problem, plan)
    return raw.out[0, 0].astype(np.float64), raw.facts[0, 0]


def weights(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        exact = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exact / exact.sum(axis=1, keepdims=True)


@st.composite
def adversarial(draw: st.DrawFn) -> NDArray[np.float64]:
    """Scores that meet a running sum badly: rising, falling, alternating, at the limit."""
    rows, keys = draw(st.integers(1, 40)), draw(st.integers(1, 200))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from((0.0, 0.5, 5.0, 60.0)))
    scores = rng.standard_normal((rows, keys)) * spread
    match draw(st.sampled_from(("any", "rising", "falling", "steps", "needles", "huge"))):
        case "rising":
            scores = np.sort(scores, axis=1)
        case "falling":
            scores = -np.sort(-scores, axis=1)
        case "steps":  # every step a little above, at, or below ln(lam) of what came before
            scores = np.cumsum(rng.choice([-7.0, -6.9, 0.0, 6.9, 7.0], (rows, keys)), axis=1)
        case "needles":
            scores[:, rng.integers(0, keys, 3)] += 12
        case "huge":
            scores = scores * 1e4
    return scores


@given(adversarial(), LAMS, st.sampled_from((1, 8, 64)), st.sampled_from((1, 16, 64)))
def test_dropped_mass_is_bounded_and_no_heavy_key_is_lost(scores, lam, tile_kv, tile_q) -> None:
    out, facts = run(of_scores(scores), ScoreSkip(lam, tile_q, tile_kv))
    exact = weights(scores.astype(np.float32).astype(np.float64))
    skipped = (out == 0) & (exact > 1e-30)
    assert exact[skipped].max(initial=0) <= lam * (1 + 1e-4)
    dropped = np.where(skipped, exact, 0).sum(axis=1)
    count = skipped.sum(axis=1)
    assert (dropped <= skipped_mass(lam, count) * (1 + 1e-4)).all()
    assert dropped.max() <= facts.dropped_mass_upper + 1e-30
    assert 0.5 * np.abs(out - exact).sum(axis=1).max() <= facts.dropped_mass_upper + 2e-5


@pytest.mark.parametrize("tile_kv", [1, 64])
def test_needles_are_found_at_every_depth(tile_kv: int) -> None:
    rng = np.random.default_rng(0)
    n = 2048
    scores = rng.standard_normal((n, n)) * 0.3
    where = np.array([rng.integers(0, i + 1) for i in range(n)])
    scores[np.arange(n), where] = 16
    problem = of_scores(scores, Mask.causal())
    out, _ = run(problem, ScoreSkip(1e-3, 64, tile_kv))
    assert (out[np.arange(n), where] > 0.99).all()


@pytest.mark.parametrize("tile_kv", [1, 64])
def test_diffuse_rows_skip_more_than_against_the_maximum(tile_kv: int) -> None:
    """Keys above lam of the maximum's weight go, where hundreds of keys share the mass."""
    n, lam = 2048, 1e-3
    scores = np.full((64, n), -5.0)  # weight e^-5 of the largest: above lam
    scores[:, -320:] = 0.0
    scores += np.random.default_rng(0).uniform(0, 0.1, scores.shape)
    problem = of_scores(scores)
    out, facts = run(problem, ScoreSkip(lam, 64, tile_kv))
    exact = weights(scores)
    against_maximum = exact >= lam * exact.max(axis=1, keepdims=True)
    assert against_maximum.mean() == 1.0
    assert facts.share < 0.3
    bound = lam * n if tile_kv == 1 else 0.05  # of tiles the maxima are known
    assert 0.5 * np.abs(out - exact).sum(axis=1).max() < facts.dropped_mass_upper < bound


def test_equal_scores_are_skipped_only_above_their_share() -> None:
    """Every key of a uniform row of n has weight 1/n; none is lost while lam is below that."""
    n = 1000
    problem = of_scores(np.zeros((8, n)))
    _, facts = run(problem, ScoreSkip(0.5 / n, 8, 1))
    assert facts.share == 1.0
    assert facts.dropped_mass_upper == 0.0


def test_rows_that_see_nothing_hinder_no_other() -> None:
    """Hidden scores need no key: the first rows of a bottom-right mask may see none."""
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((64, 1024)) * 8
    allowed = np.ones(scores.shape, bool)
    allowed[:3] = False
    problem = of_scores(scores, Mask.boolean(allowed[None, None]))
    _, facts = run(problem, ScoreSkip(1e-2, 64, 1))
    assert facts.share < 0.7


@pytest.mark.parametrize(
    "mask", [None, Mask.causal(), Mask.sliding_window(100, 60, "top_left")]
)
@pytest.mark.parametrize(("tile_q", "tile_kv"), [(64, 64), (256, 1), (48, 7)])
def test_every_tile_is_visited_once_diagonal_first(mask, tile_q: int, tile_kv: int) -> None:
    n = 1000
    query = np.zeros((1, 1, n, 4), np.float32)
    view = ProblemViews(AttentionProblem.from_arrays(query, query, query, mask=mask))[0, 0]
    for start in range(0, n, tile_q):
        rows = slice(start, min(start + tile_q, n))
        chunks = list(visiting_order(view, rows, tile_kv))
        seen = np.concatenate([np.arange(a, b) for a, b in chunks])
        low, high = int(view.start[rows].min()), int(view.stop[rows].max())
        assert len(np.unique(seen)) == len(seen)
        assert np.isin(np.arange(low, high), seen).all()
        assert chunks[0][0] <= rows.start
        assert chunks[0][1] >= min(rows.stop, high)
        assert all(a % tile_kv == 0 for a, _ in chunks)


@pytest.mark.parametrize("structure", [ScoreSkip(2e-3, 64, 64), ScoreSkip(2e-3, 128, 1)])
def test_the_judge_keeps_what_a_run_keeps(structure: ScoreSkip) -> None:
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((structure.tile_q, 2048)) * 2.5
    problem = of_scores(scores)
    request = MeasureRequest(0.95, (structure,), 0.0, (), False, 0)
    stats, _ = BACKEND.measure(problem, request)
    (estimate,) = stats.heads[0, 0].structures
    _, facts = run(problem, structure)
    # The judge also looks at a tile in the middle, of half as many rows here.
    assert estimate.share == pytest.approx(facts.share, rel=0.25)
