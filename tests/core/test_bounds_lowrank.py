"""Theorem 6: projections of the feature space."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core.bounds import projected_score_error, residual_norm

seeds = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(seeds, st.integers(2, 24), st.data())
def test_projection_error_is_covered(seed, dim, data):
    rank = data.draw(st.integers(0, dim - 1))
    rng = np.random.default_rng(seed)
    query, key = rng.standard_cauchy((2, 20, dim))
    basis = np.linalg.qr(rng.normal(size=(dim, dim)))[0][:, :rank]
    projected = (query @ basis) @ (key @ basis).T
    error = np.abs(0.3 * (query @ key.T - projected))
    bound = projected_score_error(0.3, residual_norm(query, basis), residual_norm(key, basis))
    rounding = 1e-13 * np.linalg.norm(query, axis=1).max() * np.linalg.norm(key, axis=1).max()
    assert error.max() <= bound + rounding


def test_projection_error_is_attained_by_parallel_residuals():
    basis = np.array([[1.0], [0.0]])
    query, key = np.array([[2.0, 3.0]]), np.array([[-1.0, 5.0]])
    bound = projected_score_error(1.0, residual_norm(query, basis), residual_norm(key, basis))
    assert 15.0 <= bound <= 15.0 * (1 + 1e-12)


def test_no_vectors_leave_no_residual():
    assert residual_norm(np.zeros((0, 4)), np.eye(4, 2)) == 0
