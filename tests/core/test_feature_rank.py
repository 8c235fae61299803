"""Feature maps from Gram matrices: optimal like a decomposition of the scores themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaattn_core.errors import ArgumentError, ShapeError
from adaattn_core.feature_rank import FeatureMaps, feature_maps

ROOT_EPS = 2.0**-26
"""What float64 Gram matrices resolve, relative to the largest direction."""


@st.composite
def operands(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys from well conditioned to singular, of any aspect and magnitude."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dim = draw(st.integers(1, 24))
    query = rng.normal(size=(draw(st.integers(0, 60)), dim))
    key = rng.normal(size=(draw(st.integers(0, 60)), dim))
    kind = draw(st.sampled_from(("plain", "decaying", "singular", "outlier", "zero", "tiny")))
    if kind == "decaying":
        mix = rng.normal(size=(dim, dim)) * np.logspace(0, -draw(st.integers(1, 9)), dim)
        query, key = query @ mix.T, key @ mix.T
    elif kind == "singular":
        query[:, draw(st.integers(0, dim)) :] = 0
    elif kind == "outlier":
        key[:1] *= 1e4
        query[:, 0] *= 1e3
    elif kind == "zero":
        key[:] = 0
    elif kind == "tiny":
        query, key = query * 1e-60, key * 1e80
    return query, key


def maps_of(query: np.ndarray, key: np.ndarray, rank: int) -> FeatureMaps:
    maps = feature_maps(query.T @ query, key.T @ key, rank)
    assert maps is not None
    return maps


@given(operands(), st.integers(1, 24))
def test_no_rank_does_better(arrays, rank) -> None:
    query, key = arrays
    rank = min(rank, query.shape[1])
    maps = maps_of(query, key, rank)
    scores = query @ key.T
    exact = np.zeros(query.shape[1])
    found = np.linalg.svd(scores, compute_uv=False)[: len(exact)]
    exact[: len(found)] = found
    size = np.linalg.norm(query) * np.linalg.norm(key)
    assert np.abs(maps.values - exact).max() <= 4 * ROOT_EPS * size
    left = scores - (query @ maps.to_query) @ (key @ maps.to_key).T
    assert np.linalg.norm(left) <= np.linalg.norm(exact[rank:]) + 8 * ROOT_EPS * size


@given(operands(), st.integers(1, 24))
def test_singular_vectors_make_the_same_approximation(arrays, rank) -> None:
    query, key = arrays
    maps = maps_of(query, key, min(rank, query.shape[1]))
    left, values, right = maps.singular_vectors(query, key)
    assert (np.diff(maps.values) <= 0).all()
    same = (query @ maps.to_query) @ (key @ maps.to_key).T
    size = np.linalg.norm(query) * np.linalg.norm(key)
    assert np.abs(left * values @ right.T - same).max(initial=0.0) <= 1e-12 * size
    # Vectors of directions that a Gram matrix resolves are orthonormal.
    clear = values > 1e-3 * size
    for vectors in (left[:, clear], right[:, clear]):
        assert np.abs(vectors.T @ vectors - np.eye(clear.sum())).max(initial=0.0) < 1e-4


def test_the_error_is_what_is_left() -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(16, 16)) * np.logspace(0, -2, 16)
    query, key = rng.normal(size=(200, 16)) @ mix, rng.normal(size=(300, 16)) @ mix.T
    scores = query @ key.T
    for rank in (1, 4, 16):
        maps = maps_of(query, key, rank)
        left = scores - (query @ maps.to_query) @ (key @ maps.to_key).T
        error = np.linalg.norm(left) / np.linalg.norm(scores)
        assert maps.error_estimate == pytest.approx(error, abs=1e-7)
    assert maps.error_estimate == 0.0


def test_gram_matrices_summed_in_float32_are_enough_for_a_percent() -> None:
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(64, 64)) * np.logspace(0, -1, 64)
    query, key = (
        rng.normal(size=(2000, 64)).astype(np.float32) @ m.astype(np.float32)
        for m in (mix, mix.T)
    )
    coarse, fine = (
        maps_of(query.astype(t), key.astype(t), 32) for t in (np.float32, np.float64)
    )
    scores = query @ key.T
    errors = [
        np.linalg.norm(scores - (query @ m.to_query) @ (key @ m.to_key).T)
        for m in (coarse, fine)
    ]
    assert errors[0] <= 1.01 * errors[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_has_no_maps(bad: float) -> None:
    gram = np.eye(3)
    gram[1, 2] = bad
    assert feature_maps(gram, np.eye(3), 1) is None
    assert feature_maps(np.eye(3), gram, 1) is None


def test_the_largest_numbers_overflow_nothing() -> None:
    found = feature_maps(np.eye(3) * 1.5e308, np.eye(3) * 1e-300, 2)
    assert found is not None
    assert found.values == pytest.approx(np.full(3, math.sqrt(1.5e308) * 1e-150), rel=1e-12)


def test_bad_arguments_are_refused() -> None:
    for rank in (0, 4, 1.5):
        with pytest.raises(ArgumentError):
            feature_maps(np.eye(3), np.eye(3), rank)
    for other in (np.eye(4), np.ones((3, 4)), np.ones(3)):
        with pytest.raises(ShapeError):
            feature_maps(np.eye(3), other, 1)
