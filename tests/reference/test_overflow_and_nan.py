"""What is too large, and what is no number: right, or NaN with the flag; never a hidden key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaattn_core import ErrorBudget, Mask, attention
from adaattn_core.policies.fixed import FixedPolicy
from adaattn_core.structure import BlockSparse, Dense, Landmark, LowRank, ScoreSkip
from adaattn_core.testing.oracles import rms_row_norm, row_errors

STRUCTURES = (
    Landmark(band=64, group=256, tile=64, pool=64, tail=64, samples=16),
    Landmark(band=64, group=256, tile=64, pool=64, tail=0, samples=16, screen_rank=0),
    ScoreSkip(lam=1e-3),
    ScoreSkip(lam=1e-3, tile_q=256, tile_kv=1),
    BlockSparse(band=64, group=256, samples=16),
    LowRank(rank=4),
)
LEN, DIM = 512, 16


def normal(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Return standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def truth(q, k, v, scale, visible=None):
    """Attention of one head in extended precision."""
    q, k, v = (x.astype(np.longdouble) for x in (q, k, v))
    scores = np.longdouble(scale) * (q @ k.T)
    if visible is not None:
        scores[~visible] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True) @ v).astype(np.float64)


# -- overflow of finite numbers ---------------------------------------------------------------
@pytest.mark.parametrize("qk", ["f32", "tf32", "bf16", "i8", "e4m3"])
def test_scores_beyond_float32_weigh_their_keys(qk):
    t = np.full((1, 1, 2, 4), 1e20, np.float32)
    result = attention(t, -t, np.ones_like(t), policy=FixedPolicy(qk=qk, pv="f32"))
    np.testing.assert_allclose(result.out, 1.0, rtol=1e-6)
    assert np.isfinite(result.lse).all()
    assert not result.certificate[0, 0].nonfinite


def test_scores_beyond_float64_are_flagged():
    t = np.full((1, 1, 2, 4), 1e200)
    result = attention(t, -t, np.ones_like(t))
    assert np.isnan(result.out).all()
    assert np.isnan(result.lse).all()
    assert result.certificate[0, 0].nonfinite


@given(
    query=st.integers(-36, 36),
    key=st.integers(-36, 36),
    value=st.sampled_from([-30, 0, 37]),
    score=st.integers(-3, 3),
    seed=st.integers(0, 99),
)
def test_any_scale_that_leaves_the_scores_in_range(query, key, value, score, seed):
    q = normal(1, 1, 6, 8, seed=seed) * np.float32(10.0**query)
    k = normal(1, 1, 7, 8, seed=seed + 1) * np.float32(10.0**key)
    v = normal(1, 1, 7, 8, seed=seed + 2) * np.float32(10.0**value)
    scale = 10.0 ** (score - query - key)
    result = attention(q, k, v, scale=scale)
    exact = truth(q[0, 0], k[0, 0], v[0, 0], scale)
    certificate, out = result.certificate[0, 0], result.out[0, 0].astype(np.float64)
    assert not certificate.nonfinite
    allowed = 1e-2 if score > 1 else 1e-4
    assert row_errors(out, exact).max() <= allowed * np.abs(v).max().astype(np.float64)
    assert row_errors(out, exact).max() <= certificate.upper * rms_row_norm(out)


def test_sums_of_huge_values_do_not_overflow():
    q, k = normal(1, 1, 8, 16), normal(1, 1, 64, 16, seed=1)
    v = np.full((1, 1, 64, 4), 3e38, np.float32)
    for qk in ("f32", "bf16", "i8"):
        result = attention(0 * q, k, v, policy=FixedPolicy(qk=qk, pv="f32"))
        np.testing.assert_allclose(result.out, 3e38, rtol=1e-5)
        assert not result.certificate[0, 0].nonfinite


@pytest.mark.parametrize("guarantee", ["sampled", "worst_case"])
def test_a_budget_of_scores_beyond_float32(guarantee):
    q, k, v = (normal(1, 1, 100, 16, seed=s) for s in range(3))
    q, k = q * np.float32(1e25), k * np.float32(1e20)
    rows, sure = (0.95, 0.95) if guarantee == "sampled" else (1.0, 1.0)
    budget = ErrorBudget(0.1, rows, sure, guarantee, on_violation="report")
    result = attention(q, k, v, budget=budget, scale=1e-45)
    exact = truth(q[0, 0], k[0, 0], v[0, 0], 1e-45)
    assert row_errors(result.out[0, 0], exact).max() < 1e-5
    assert result.plan[0, 0].structure == Dense()


# -- NaN and Inf under every structure --------------------------------------------------------
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: f"{s.kind}")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nonfinite_reaches_rows_that_see_it_and_no_others(structure, where, bad):
    arrays = {
        n: normal(1, 2, LEN, DIM, seed=s) for s, n in enumerate(("query", "key", "value"))
    }
    policy, mask = FixedPolicy(structure=structure), Mask.causal()
    frozen = attention(**arrays, mask=mask, policy=policy, seed=3).plan
    dense = attention(**arrays, mask=mask)
    arrays[where][0, 1, 200, 5] = bad
    result = attention(**arrays, mask=mask, plan=frozen)
    lost = ~np.isfinite(result.out[0, 1]).all(axis=1)
    reached = np.arange(LEN) == 200 if where == "query" else np.arange(LEN) >= 200
    assert not lost[~reached].any(), "a row that does not see it"
    np.testing.assert_allclose(result.out[0, 1, ~reached], dense.out[0, 1, ~reached], atol=1e-5)
    if np.isnan(bad) or where != "key":
        assert lost[reached].all(), "every row that sees it"
    else:  # a score of -inf is a weight of 0, one of +inf is NaN: about a half each
        assert 0.2 < lost[reached].mean() < 0.8
    certificate = result.certificate
    assert certificate[0, 1].nonfinite
    assert not certificate[0, 0].nonfinite
    assert result.plan[0, 1].structure == Dense()
    assert "NaN or Inf" in result.plan[0, 1].reason
    assert result.plan[0, 0].structure == structure
    assert result.provenance["ran_dense"] == ["0,1"]


@pytest.mark.parametrize("policy", ["budget", "entropy"])
@pytest.mark.parametrize("guarantee", ["sampled", "worst_case"])
def test_policies_plan_dense_for_nonfinite_heads(policy, guarantee):
    q, k, v = (normal(1, 2, LEN, DIM, seed=s) for s in range(3))
    k[0, 1, 300, 2] = np.nan
    rows, sure = (0.95, 0.95) if guarantee == "sampled" else (1.0, 1.0)
    budget = ErrorBudget(0.5, rows, sure, guarantee)
    result = attention(q, k, v, mask=Mask.causal(), budget=budget, policy=policy)
    assert result.plan[0, 1].structure == Dense()
    lost = ~np.isfinite(result.out[0, 1]).all(axis=1)
    np.testing.assert_array_equal(lost, np.arange(LEN) >= 300)
    assert result.certificate.nonfinite.tolist() == [[False, True]]


@pytest.mark.parametrize("structure", STRUCTURES[2:], ids=lambda s: f"{s.kind}")
def test_hidden_nonfinite_keys_change_no_structure(structure):
    q, k, v = (normal(1, 1, LEN, DIM, seed=s) for s in range(3))
    allowed = np.ones(LEN, bool)
    allowed[5::7] = False
    mask, policy = Mask.boolean(allowed), FixedPolicy(structure=structure)
    clean = attention(q, k, v, mask=mask, policy=policy, seed=1)
    k[:, :, ~allowed], v[:, :, ~allowed] = np.nan, np.inf
    result = attention(q, k, v, mask=mask, policy=policy, seed=1)
    assert result.plan[0, 0].structure == structure
    np.testing.assert_array_equal(result.out, clean.out)
    assert not result.certificate[0, 0].nonfinite


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_key_of_weight_zero_hands_on_its_nonfinite_value(value):
    q = np.ones((1, 1, 2, 4), np.float32)
    k, v = normal(1, 1, 8, 4), normal(1, 1, 8, 4, seed=1)
    k[0, 0, 3, 0], v[0, 0, 3] = -np.inf, value
    result = attention(q, k, v)
    assert np.isnan(result.out).all()
    alone = attention(q, k[:, :, 3:4], v[:, :, :1])
    assert np.isnan(alone.out).all(), "it is all that the row sees: no row of zeros"
    assert alone.certificate[0, 0].nonfinite
