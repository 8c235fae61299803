"""No factorisation may end a call: other drivers, then a plain choice with honest bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaattn_core import ErrorBudget, Mask, attention
from adaattn_core.policies import EntropyPolicy, FixedPolicy
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import BlockSparse, Landmark, LowRank, ScoreSkip
from adaattn_core.testing.oracles import exact_attention, rms_row_norm, row_errors
from adaattn_reference import linalg
from adaattn_reference.svd import score_factors

WORST = ErrorBudget(0.1, 1, 1, "worst_case", on_violation="report")
STRUCTURES = (
    LowRank(3),
    ScoreSkip(),
    BlockSparse(tile_q=16, group=64, tile_kv=16, band=16, samples=4),
    Landmark(group=64, tile=16, pool=16, band=16, samples=8, clusters=2, tail=16),
)


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@st.composite
def matrices(draw: st.DrawFn) -> Any:
    """Finite matrices of any rank and magnitude, graded ones among them."""
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rank = draw(st.integers(0, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    a = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
    grading = 10.0 ** (draw(st.floats(0, 16)) * -rng.random(columns))
    return a * grading * 10.0 ** draw(st.integers(-100, 100))


@given(matrices())
def test_decompositions_are_found_and_are_decompositions(a: Any) -> None:
    found = linalg.svd(a)
    assert found is not None
    u, s, vt = found
    size = np.linalg.norm(a)
    assert np.linalg.norm(u * s @ vt - a) <= 1e-13 * size
    np.testing.assert_array_equal(s, np.sort(s)[::-1])
    values = linalg.singular_values(a)
    assert values is not None
    np.testing.assert_allclose(values, s, atol=1e-13 * size)
    unit = np.abs(a).max(initial=0.0) or 1.0
    spread = (a / unit).T @ (a / unit)
    eigen = linalg.eigh(spread)
    assert eigen is not None
    np.testing.assert_allclose(
        eigen[1] * eigen[0] @ eigen[1].T, spread, atol=1e-12 * np.linalg.norm(spread)
    )


@pytest.mark.parametrize("failures", [1, 2])
def test_the_drivers_behind_the_first_give_the_same(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = np.random.default_rng(0).standard_normal((9, 7))
    values = np.linalg.svd(a, compute_uv=False)
    monkeypatch.setattr(np.linalg, "svd", _failing(np.linalg.svd, failures))
    found = linalg.svd(a)
    assert found is not None
    np.testing.assert_allclose(found[0] * found[1] @ found[2], a, atol=1e-13)
    monkeypatch.undo()
    monkeypatch.setattr(np.linalg, "svd", _failing(np.linalg.svd, failures))
    np.testing.assert_allclose(linalg.singular_values(a), values, rtol=1e-12)


def test_a_mirrored_matrix_has_the_same_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = np.cov(np.random.default_rng(0).standard_normal((7, 20)))
    monkeypatch.setattr(np.linalg, "eigh", _failing(np.linalg.eigh, 1))
    found = linalg.eigh(spread)
    assert found is not None
    np.testing.assert_allclose(found[1] * found[0] @ found[1].T, spread, atol=1e-12)


def test_what_is_not_finite_is_not_decomposed() -> None:
    bad = np.diag([1.0, np.nan])
    assert linalg.svd(bad) is None
    assert linalg.singular_values(bad) is None
    assert linalg.eigh(bad) is None
    assert linalg.solve(np.zeros((2, 2)), np.eye(2)) is None


def _failing(driver: Any, times: float) -> Any:
    """The driver, failing to converge the first so many times."""
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= times:
            raise np.linalg.LinAlgError("did not converge")
        return driver(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    "policy",
    ["budget", "entropy", EntropyPolicy(least_len=0, rank_participation=2), *STRUCTURES],
    ids=lambda p: getattr(p, "kind", None) or getattr(p, "name", p),
)
@pytest.mark.parametrize("budget", [0.2, WORST], ids=["sampled", "worst_case"])
def test_no_call_ends_where_no_driver_converges(
    policy: Any, budget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("svd", "eigh", "eigvalsh", "solve", "inv", "cholesky"):
        monkeypatch.setattr(np.linalg, name, _failing(None, np.inf))
    q, k, v = (normal(1, 2, 200, 16, seed=s) for s in range(3))
    if not isinstance(policy, str | EntropyPolicy):
        policy = FixedPolicy(policy)
    result = attention(q, k, v, mask=Mask.causal(), budget=budget, policy=policy, seed=1)
    problem = AttentionProblem.from_arrays(q, k, v, mask=Mask.causal())
    error = row_errors(result.out, exact_attention(problem).out)
    rms = np.array([[rms_row_norm(head) for head in result.out[0]]])
    if budget is WORST:
        assert (error.max(axis=-1) <= result.certificate.upper * rms).all()
    else:
        assert (np.quantile(error, 0.95, axis=-1) <= 2 * 0.2 * rms).all()


def test_without_a_basis_a_projection_still_keeps_its_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k = normal(40, 16), normal(50, 16, seed=1)
    best = score_factors(q, k, 5)
    monkeypatch.setattr(np.linalg, "svd", _failing(None, np.inf))
    factors = score_factors(q, k, 5)
    error = np.abs(q.astype(float) @ k.T - factors.query_r @ factors.key_r.T).max()
    assert best.score_residual_upper < error <= factors.score_residual_upper < np.inf


@pytest.mark.parametrize("seed", [37, 38])
def test_more_dimensions_than_keys(seed: int) -> None:
    """Gaussian heads whose score matrix LAPACK's divide and conquer does not decompose."""
    q, k, v = np.random.default_rng(seed).standard_normal((3, 1, 9, 32, 64), dtype=np.float32)
    result = attention(q, k, v, budget=ErrorBudget(0.1, 1, 1, "worst_case"))
    assert (result.certificate.upper <= 0.1).all()


@pytest.mark.parametrize("strength", [8e3, 1e6, 1e12])
def test_one_direction_far_stronger_than_the_others(strength: float) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 1024, 32), dtype=np.float32) for _ in range(3))
    k[..., 0] *= strength
    policy = FixedPolicy(Landmark(group=512, clusters=4))
    result = attention(q / 1e3, k, v, mask=Mask.causal(), budget=0.1, policy=policy, seed=0)
    assert (result.certificate.upper <= 0.1).all()


def test_a_hidden_key_of_nan_disturbs_no_measurement() -> None:
    q, k, v = (normal(1, 1, 96, 64, seed=s) for s in range(3))
    allowed = np.ones(96, bool)
    allowed[[5, 95]] = False
    mask = Mask.boolean(allowed)
    expected = attention(q, k, v, mask=mask, budget=WORST, seed=0)
    k[:, :, ~allowed] = np.nan
    v[:, :, ~allowed] = np.inf
    result = attention(q, k, v, mask=mask, budget=WORST, seed=0)
    np.testing.assert_array_equal(result.out, expected.out)
    assert result.stats is not None
    assert expected.stats is not None
    measured, clean = result.stats.heads[0, 0], expected.stats.heads[0, 0]
    assert measured.participation_ratio == clean.participation_ratio
    assert measured.feature_residual_upper == clean.feature_residual_upper
