"""Spectral facts: optimal feature rank, its error, a rigorous entrywise bound (theorem 6)."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core.errors import ArgumentError
from adaattn_reference.svd import (
    best_score_error,
    epsilon_rank,
    score_factors,
    score_singular_values,
)

seeds = st.integers(0, 2**32 - 1)


@st.composite
def operands(draw):
    """Query and key from well conditioned to singular, of any aspect and magnitude."""
    rng = np.random.default_rng(draw(seeds))
    dim = draw(st.integers(1, 24))
    len_q, len_kv = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    query, key = rng.normal(size=(len_q, dim)), rng.normal(size=(len_kv, dim))
    kind = draw(st.sampled_from(["plain", "decaying", "singular", "outlier", "zero", "tiny"]))
    if kind == "decaying":
        mix = rng.normal(size=(dim, dim)) * np.logspace(0, -draw(st.integers(1, 9)), dim)
        query, key = query @ mix.T, key @ mix.T
    elif kind == "singular":
        rank = draw(st.integers(0, dim))
        query[:, rank:] = 0
        key = key[:, : max(rank - 1, 0)] @ rng.normal(size=(max(rank - 1, 0), dim))
    elif kind == "outlier":
        key[rng.integers(len_kv)] *= 1e4
        query[:, 0] *= 1e3
    elif kind == "zero":
        key[:] = 0
    elif kind == "tiny":
        query, key = query * 1e-25, key * 1e20
    return query, key


@settings(deadline=None)
@given(operands(), st.integers(1, 24))
def test_the_entrywise_bound_holds_for_the_returned_factors(arrays, rank):
    query, key = arrays
    factors = score_factors(query, key, rank)
    wide = [x.astype(np.longdouble) for x in (query, key, factors.query_r, factors.key_r)]
    left = np.abs(wide[0] @ wide[1].T - wide[2] @ wide[3].T)
    size = np.linalg.norm(query, axis=1).max() * np.linalg.norm(key, axis=1).max()
    # The check's own rounding, where longdouble is no wider than float64.
    slack = 0.0 if np.finfo(np.longdouble).eps < 1e-17 else 1e-14 * size
    assert left.max() <= factors.score_residual_upper + slack
    assert factors.query_r.shape == (len(query), min(rank, query.shape[1]))


@settings(deadline=None)
@given(operands(), st.integers(1, 24))
def test_the_factorisation_is_optimal(arrays, rank):
    query, key = arrays
    factors = score_factors(query, key, rank)
    scores = query @ key.T
    left = scores - factors.query_r @ factors.key_r.T
    frobenius, spectral = best_score_error(query, key, rank)
    # The ridge may cost a relative 1e-6 of what the operands could have made.
    slack = 1e-6 * np.linalg.norm(query) * np.linalg.norm(key)
    assert np.linalg.norm(left) <= frobenius + slack
    assert np.linalg.norm(left, 2) <= spectral + slack


@settings(deadline=None)
@given(operands())
def test_singular_values_match_the_full_decomposition(arrays):
    query, key = arrays
    values = score_singular_values(query, key)
    full = np.linalg.svd(query @ key.T, compute_uv=False)[: values.size]
    size = np.linalg.norm(query) * np.linalg.norm(key)
    assert values.shape == full.shape
    assert np.abs(values - full).max() <= 1e-13 * size


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_eckart_young_no_other_projection_does_better(rank):
    rng = np.random.default_rng(2)
    mix = rng.normal(size=(16, 16)) * np.logspace(0, -2, 16)
    query, key = rng.normal(size=(60, 16)) @ mix, rng.normal(size=(80, 16)) @ mix.T
    optimum, _ = best_score_error(query, key, rank)
    scores = query @ key.T
    principal = np.linalg.svd(key, full_matrices=False)[2][:rank].T
    candidates = [principal] + [np.linalg.qr(rng.normal(size=(16, rank)))[0] for _ in range(20)]
    errors = [np.linalg.norm(scores - query @ b @ (key @ b).T) for b in candidates]
    # The principal directions of the keys alone are not optimal for the scores.
    assert optimum < 0.95 * min(errors)


def test_tightness_of_the_entrywise_bound_does_not_regress():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(500, 64)), rng.normal(size=(507, 64))
    for rank, limit in ((4, 3.4), (32, 2.7), (60, 2.0)):
        factors = score_factors(query, key, rank)
        worst = np.abs(query @ key.T - factors.query_r @ factors.key_r.T).max()
        # Recorded 2026-11: 2.6, 2.0 and 1.4.
        assert factors.score_residual_upper <= limit * worst


def test_the_bound_is_attained_by_one_remaining_direction():
    query, key = np.diag([3.0, 2.0]), np.diag([1.0, 0.5])
    factors = score_factors(query, key, 1)
    assert 1.0 <= factors.score_residual_upper <= 1.0 + 1e-6


def test_full_rank_keeps_the_operands_and_leaves_nothing():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 5, 3))
    factors = score_factors(query, key, 3)
    assert (factors.query_r == query).all()
    assert (factors.key_r == key).all()
    assert factors.score_residual_upper == 0
    assert best_score_error(query, key, 3) == (0.0, 0.0)


def test_extreme_magnitudes_do_not_overflow():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 9, 6))
    huge = score_factors(query * 1e150, key * 1e140, 2)
    plain = score_factors(query, key, 2)
    assert huge.score_residual_upper == pytest.approx(plain.score_residual_upper * 1e290)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_operands_leave_an_infinite_residual(bad):
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 9, 6))
    query[3, 2] = bad
    factors = score_factors(query, key, 4)
    assert factors.score_residual_upper == math.inf
    assert not np.isfinite(factors.query_r[3]).all()


def test_heads_without_rows_or_keys():
    for query, key in (
        (np.zeros((0, 4)), np.ones((3, 4))),
        (np.ones((3, 4)), np.zeros((0, 4))),
    ):
        factors = score_factors(query, key, 2)
        assert factors.score_residual_upper == 0
        assert (len(factors.query_r), len(factors.key_r)) == (len(query), len(key))


def test_epsilon_rank_counts_what_is_needed():
    matrix = np.diag([1.0, 0.5, 0.01, 0.0])
    assert epsilon_rank(matrix, 0.05) == 2
    assert epsilon_rank(matrix, 0.0) == 3
    assert epsilon_rank(matrix, 1.0) == 0
    assert epsilon_rank(matrix, 0.5, norm="spectral") == 1
    assert epsilon_rank(np.zeros((3, 4)), 0.1) == 0
    assert epsilon_rank(np.zeros((0, 4)), 0.1) == 0


@settings(deadline=None)
@given(seeds, st.integers(1, 20), st.integers(1, 20), st.floats(0.001, 0.9))
def test_epsilon_rank_is_the_least_rank_that_suffices(seed, rows, columns, epsilon):
    matrix = np.random.default_rng(seed).standard_cauchy((rows, columns))
    values = np.linalg.svd(matrix, compute_uv=False)
    rank = epsilon_rank(matrix, epsilon)
    total = np.linalg.norm(values)
    assert np.linalg.norm(values[rank:]) <= epsilon * total * (1 + 1e-12)
    if rank:
        assert np.linalg.norm(values[rank - 1 :]) > epsilon * total * (1 - 1e-12)


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="rank"):
        score_factors(np.ones((2, 2)), np.ones((2, 2)), 0)
    with pytest.raises(ArgumentError, match="norm"):
        epsilon_rank(np.eye(2), 0.1, norm="nuclear")
    with pytest.raises(ArgumentError, match="epsilon"):
        epsilon_rank(np.eye(2), -0.1)
