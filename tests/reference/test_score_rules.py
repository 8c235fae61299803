"""Softcap and sinks on the CPU: every structure that takes them, held to its certificate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaattn_core import ErrorBudget, Mask, attention
from adaattn_core.errors import UnsupportedError
from adaattn_core.policies.fixed import FixedPolicy
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import BlockSparse, Dense, Landmark, LowRank, ScoreSkip, Structure
from adaattn_core.testing.oracles import exact_attention, naive_attention, row_errors
from adaattn_reference.backend import NumpyBackend

CAUSAL = Mask.causal()


def arrays(seed: int = 0, length: int = 96, size: float = 3.0) -> list[NDArray[Any]]:
    """Query of four heads, key and value of two; scores of about `size`."""
    rng = np.random.default_rng(seed)
    shapes = ((1, 4, length, 16), (1, 2, length, 16), (1, 2, length, 12))
    query, key, value = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    return [query * np.float32(size), key, value]


def by_formula(
    three: list[NDArray[Any]], softcap: float | None, sinks: Any, mask: Mask
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The definition, written out with the sink as one more key of value 0."""
    q, k, v = (x.astype(np.float64) for x in three)
    k, v = (np.repeat(x, 2, axis=1) for x in (k, v))
    scores = q @ k.swapaxes(2, 3) / 4
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    length = scores.shape[2]
    if mask.has_window:
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    if mask.bias is not None:
        scores = scores + np.asarray(mask.bias, np.float64)
    if sinks is not None:
        logit = np.broadcast_to(np.asarray(sinks, np.float64)[:, None, None], (1, 4, length, 1))
        scores = np.concatenate([scores, logit], axis=3)
        v = np.concatenate([v, np.zeros((1, 4, 1, v.shape[3]))], axis=2)
    top = scores.max(axis=3, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=3, keepdims=True)
    return weights / total @ v, (top + np.log(total))[..., 0]


SINKS = np.array([0.5, -2.0, 6.0, -np.inf], np.float32)
BIAS = Mask.additive(np.linspace(-2, 2, 96, dtype=np.float32)[None, None, None])


@pytest.mark.parametrize("mask", [Mask.none(), CAUSAL, BIAS], ids=["none", "causal", "bias"])
@pytest.mark.parametrize(
    ("softcap", "sinks"),
    [(2.0, None), (None, SINKS), (5.0, SINKS)],
    ids=["cap", "sinks", "both"],
)
def test_the_definition(softcap: float | None, sinks: Any, mask: Mask) -> None:
    """Oracle, naive computation and backend agree with the formula, in out and in lse."""
    three = arrays()
    out, lse = by_formula(three, softcap, sinks, mask)
    problem = AttentionProblem.from_arrays(*three, mask=mask, softcap=softcap, sinks=sinks)
    exact = exact_attention(problem)
    assert np.abs(exact.out - out).max() <= 1e-13
    assert np.abs(exact.lse - lse).max() <= 1e-13
    naive = naive_attention(problem)
    unit = row_errors(naive.out, out).max()
    found = attention(*three, mask=mask, softcap=softcap, sinks=sinks, backend="numpy")
    assert row_errors(found.out, out).max() <= 2 * max(unit, 2.0**-23)
    assert np.abs(found.lse - lse).max() <= 2.0**-20 * 8
    size = np.sqrt((np.linalg.norm(found.out, axis=3) ** 2).mean(axis=2))
    worst = row_errors(found.out, out).max(axis=2)
    assert (worst <= found.certificate.upper * size).all()


STRUCTURES = [
    Dense(),
    ScoreSkip(lam=1e-3),
    BlockSparse(tau=0.05),
    LowRank(8),
    Landmark(band=16, group=32, tile=16, pool=16, tail=16, tau=0.1),
]


@pytest.mark.parametrize("formats", [("f32", "f32"), ("i8", "e4m3"), ("bf16", "bf16")])
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.kind)
@pytest.mark.parametrize("rule", ["softcap", "sinks", "both"])
def test_certificates_hold(structure: Structure, formats: tuple[str, str], rule: str) -> None:
    """Theorems where there are any; a smoothed mean key is given back before the cap."""
    softcap = None if rule == "sinks" else 3.0
    sinks = None if rule == "softcap" else SINKS
    three = arrays(length=160)
    three[1] += np.float32(1.5)  # a mean key worth smoothing
    asked: dict[str, Any] = {"mask": CAUSAL, "softcap": softcap, "sinks": sinks}
    policy = FixedPolicy(structure, *formats)
    if structure.kind == "landmark" and softcap is not None:
        with pytest.raises(UnsupportedError, match="landmark structure under a softcap"):
            attention(*three, policy=policy, backend="numpy", **asked)
        return
    found = attention(*three, policy=policy, backend="numpy", seed=1, **asked)
    exact = exact_attention(AttentionProblem.from_arrays(*three, **asked))
    size = np.sqrt((np.linalg.norm(found.out.astype(np.float64), axis=3) ** 2).mean(axis=2))
    worst = row_errors(found.out, exact.out).max(axis=2)
    assert (worst <= found.certificate.upper * size + exact.error_upper).all()
    if structure.kind in ("dense", "score_skip", "low_rank"):
        assert np.isfinite(found.certificate.upper).all()


@settings(max_examples=25, deadline=None)
@given(
    softcap=st.none() | st.floats(0.05, 100.0),
    sinks=st.none() | st.lists(st.floats(-30, 30), min_size=4, max_size=4),
    size=st.floats(0.01, 300.0),
    qk=st.sampled_from(["f32", "bf16", "i8", "e4m3"]),
)
def test_theorems_hold_whatever_the_rule(
    softcap: float | None, sinks: list[float] | None, size: float, qk: str
) -> None:
    three = arrays(3, 40, size)
    asked: dict[str, Any] = {
        "mask": CAUSAL,
        "softcap": softcap,
        "sinks": None if sinks is None else np.array(sinks, np.float32),
    }
    found = attention(*three, policy=FixedPolicy(Dense(), qk, "f32"), backend="numpy", **asked)
    exact = exact_attention(AttentionProblem.from_arrays(*three, **asked))
    rms = np.sqrt((np.linalg.norm(found.out.astype(np.float64), axis=3) ** 2).mean(axis=2))
    worst = row_errors(found.out, exact.out).max(axis=2)
    bounded = np.isfinite(found.certificate.upper)
    limit = np.where(bounded, found.certificate.upper, 0) * rms + exact.error_upper
    assert (worst <= np.where(bounded, limit, np.inf)).all()


def test_a_sampled_budget_is_kept_under_rules() -> None:
    three = arrays(length=512)
    asked: dict[str, Any] = {"mask": CAUSAL, "softcap": 4.0, "sinks": SINKS}
    budget = ErrorBudget(rel=0.05)
    found = attention(*three, budget=budget, backend="numpy", seed=5, **asked)
    assert found.certificate.holds(budget)
    exact = exact_attention(AttentionProblem.from_arrays(*three, **asked)).out
    size = np.sqrt((np.linalg.norm(found.out.astype(np.float64), axis=3) ** 2).mean(axis=2))
    errors = np.quantile(row_errors(found.out, exact), 0.95, axis=2)
    assert (errors <= 0.05 * size).all()
    assert "softcap: no landmark" in found.plan.explain()


def test_a_sink_of_minus_infinity_and_a_wide_cap_change_nothing() -> None:
    three = arrays()
    plain = attention(*three, mask=CAUSAL, backend="numpy")
    none = attention(*three, mask=CAUSAL, sinks=np.full(4, -np.inf), backend="numpy")
    np.testing.assert_array_equal(none.out, plain.out)
    np.testing.assert_array_equal(none.lse, plain.lse)
    wide = attention(*three, mask=CAUSAL, softcap=1e6, backend="numpy")
    assert np.abs(wide.out - plain.out).max() <= 1e-4


def test_rows_that_see_nothing_have_the_sink_for_their_lse() -> None:
    three = arrays(length=20)
    mask = Mask.key_lengths([0])
    found = attention(*three, mask=mask, sinks=SINKS, backend="numpy")
    assert (found.out == 0).all()
    np.testing.assert_array_equal(found.lse, np.broadcast_to(SINKS[None, :, None], (1, 4, 20)))
    assert (found.certificate.upper == 0).all()


@pytest.mark.parametrize("hidden", [np.nan, np.inf])
def test_nothing_leaks_from_hidden_keys(hidden: float) -> None:
    three = arrays(length=30)
    asked: dict[str, Any] = {"mask": Mask.key_lengths([20]), "softcap": 2.0, "sinks": SINKS}
    clean = attention(*three, backend="numpy", **asked)
    three[1][:, :, 20:] = three[2][:, :, 20:] = hidden
    found = attention(*three, backend="numpy", **asked)
    np.testing.assert_array_equal(found.out, clean.out)
    np.testing.assert_array_equal(found.certificate.upper, clean.certificate.upper)


def test_a_sink_that_is_no_number_is_not_hidden() -> None:
    three = arrays(length=30)
    for sink in (np.nan, np.inf):
        found = attention(*three, sinks=np.array([sink, 0, 0, 0]), backend="numpy")
        assert np.isnan(found.out[0, 0]).all()
        assert np.isnan(found.lse[0, 0]).all()
        assert np.isfinite(found.out[0, 1:]).all()
        assert found.certificate.upper[0, 0] == np.inf


def test_scores_that_overflow_float32_are_capped() -> None:
    three = arrays(length=30)
    three[0] *= np.float32(1e20)
    three[1] *= np.float32(1e20)
    problem = AttentionProblem.from_arrays(*three, softcap=2.0)
    found = attention(*three, softcap=2.0, backend="numpy")
    assert row_errors(found.out, exact_attention(problem).out).max() <= 1e-5


def test_formats_that_a_backend_has_not_under_rules_are_not_planned() -> None:
    class Narrow(NumpyBackend):
        name = "narrow"

        def capabilities(self) -> Any:
            return replace(super().capabilities(), rule_formats=("f32", "f16"))

    three = arrays(length=64, size=0.1)
    budget = ErrorBudget(rel=0.5, guarantee="worst_case")
    plain = attention(*three, backend=Narrow(), budget=budget, target="sm90")
    assert {head.qk for head in plain.plan.heads.values()} == {"bf16"}
    ruled = attention(*three, backend=Narrow(), budget=budget, target="sm90", softcap=50.0)
    assert {head.qk for head in ruled.plan.heads.values()} <= {"f32", "f16"}
    assert "i8" in ruled.plan[0, 0].reason


def test_a_backend_that_does_not_know_a_rule_is_never_asked() -> None:
    class Plain(NumpyBackend):
        name = "plain"

        def capabilities(self) -> Any:
            return replace(super().capabilities(), rules=())

    three = arrays(length=8)
    for asked in ({"softcap": 2.0}, {"sinks": SINKS}):
        with pytest.raises(UnsupportedError, match='on backend "plain"'):
            attention(*three, backend=Plain(), **asked)
