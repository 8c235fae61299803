"""Certificates speak about rows that see a key: only those are drawn, and only those count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from adaattn_core import ErrorBudget, Mask, attention
from adaattn_core.liverows import LiveRows
from adaattn_core.policies.fixed import FixedPolicy
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import BlockSparse
from adaattn_core.testing.oracles import exact_attention, rms_row_norm, row_errors
from adaattn_core.testing.strategies import problem_specs


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 1, 2000, 32), dtype=np.float32)
    return 3 * q, k, v


LIVE = np.arange(0, 2000, 100)


def masks():
    """The same 20 live rows of 2,000, said in three ways."""
    allowed = np.zeros((2000, 2000), bool)
    allowed[LIVE] = True
    yield "boolean", Mask.boolean(allowed)
    yield "additive", Mask.additive(np.where(allowed, 0, -np.inf).astype(np.float32))
    yield "blind rows", Mask.boolean(allowed[:, :1])


@pytest.mark.parametrize("mask", [m for _, m in masks()], ids=[n for n, _ in masks()])
@pytest.mark.parametrize(
    "policy",
    [FixedPolicy(qk="e4m3", pv="e4m3"), FixedPolicy(structure=BlockSparse(tau=0.9, band=0))],
    ids=["e4m3", "block_sparse"],
)
def test_few_live_rows_are_all_looked_at(arrays, mask, policy):
    budget = ErrorBudget(0.1, on_violation="report")
    result = attention(*arrays, mask=mask, policy=policy, budget=budget, seed=1)
    exact = exact_attention(AttentionProblem.from_arrays(*arrays, mask=mask)).out[0, 0]
    errors = np.sort(row_errors(result.out[0, 0], exact)[LIVE])
    certificate = result.certificate[0, 0]
    assert certificate.guarantee == "sampled"
    assert certificate.confidence == 1.0, "20 rows: every one is computed"
    bound = certificate.upper * rms_row_norm(result.out[0, 0])
    assert errors[18] <= bound * (1 + 1e-6) <= errors[19] * (1 + 1e-3), "19 of 20 rows"
    relative = np.linalg.norm(errors) / np.linalg.norm(exact)
    assert certificate.estimate == pytest.approx(relative, rel=1e-3)


def test_causal_rows_before_the_first_key_do_not_count(arrays):
    q, k, v = arrays[0], arrays[1][:, :, :20], arrays[2][:, :, :20]
    policy, budget = FixedPolicy(qk="e4m3", pv="e4m3"), ErrorBudget(0.1, on_violation="report")
    mask = Mask.causal("bottom_right")
    result = attention(q, k, v, mask=mask, policy=policy, budget=budget, seed=1)
    exact = exact_attention(AttentionProblem.from_arrays(q, k, v, mask=mask)).out[0, 0]
    errors = np.sort(row_errors(result.out[0, 0], exact)[-20:])
    bound = result.certificate[0, 0].upper * rms_row_norm(result.out[0, 0])
    assert errors[18] <= bound * (1 + 1e-6)


def test_a_head_that_sees_nothing_is_exact(arrays):
    for mask in (Mask.boolean(np.zeros((1, 2000), bool)), Mask.key_lengths([0])):
        for policy in (None, "entropy", FixedPolicy(qk="e4m3", pv="e4m3")):
            result = attention(*arrays, mask=mask, budget=0.1, policy=policy)
            assert (result.out == 0).all()
            assert result.certificate[0, 0].upper == 0


@given(problem_specs())
def test_live_rows_are_those_with_a_finite_lse(spec):
    problem = spec.build()
    live, exact = LiveRows(problem), exact_attention(problem)
    for index in problem.heads():
        span = problem.sequences[index[0]]
        lse = exact.lse[span.batch, index[1], span.q_start : span.q_stop]
        np.testing.assert_array_equal(live[index], np.flatnonzero(lse != -np.inf))
