"""Theorems 4 and 5: dropped and pooled keys."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core.bounds import (
    dropped_mass_error,
    pooled_log_mass,
    pooled_log_mass_lower,
    skipped_mass,
)

seeds = st.integers(0, 2**32 - 1)
SLACK = 1e-12


def log_sum_exp(scores):
    top = scores.max()
    return top + np.log(np.exp(scores - top).sum())


@settings(deadline=None)
@given(seeds, st.integers(2, 60), st.floats(0, 20))
def test_dropping_keys_is_covered_by_mass_times_diameter(seed, keys, spread):
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.normal(scale=spread, size=keys))
    weights /= weights.sum()
    value = rng.standard_cauchy((keys, 4))
    keep = rng.random(keys) < 0.5
    keep[np.argmax(weights)] = True
    kept = weights * keep / weights[keep].sum()
    change = np.linalg.norm((kept - weights) @ value)
    diameter = np.linalg.norm(value[:, None] - value, axis=2).max()
    bound = dropped_mass_error(weights[~keep].sum(), diameter)
    assert change <= bound + SLACK * np.abs(value).max()


def test_dropping_is_attained_by_two_keys():
    value = np.array([[0.0], [1.0]])
    weights = np.array([0.75, 0.25])
    change = abs((np.array([1.0, 0.0]) - weights) @ value)[0]
    assert dropped_mass_error(0.25, 1.0) == change


@settings(deadline=None)
@given(seeds, st.integers(1, 60), st.floats(1e-12, 0.5), st.floats(0, 10))
def test_skipped_keys_carry_no_more_than_stated(seed, keys, threshold, spread):
    rng = np.random.default_rng(seed)
    scores = rng.normal(scale=spread, size=keys)
    below = scores.max() + np.log(threshold) - rng.random(keys)
    mass = np.exp(below - scores.max()).sum()
    share = mass / (mass + np.exp(scores - scores.max()).sum())
    assert share <= skipped_mass(threshold, keys) * (1 + SLACK)


@settings(deadline=None)
@given(seeds, st.integers(2, 200), st.floats(0, 20), st.floats(1e-6, 0.9))
def test_skipping_against_the_running_sum_loses_no_heavy_key(seed, keys, spread, threshold):
    rng = np.random.default_rng(seed)
    scores = rng.normal(scale=spread, size=keys)
    running, skipped = -np.inf, []
    for j in rng.permutation(keys):
        if scores[j] <= running + np.log(threshold):
            skipped.append(j)
        else:
            running = np.logaddexp(running, scores[j])
    weights = np.exp(scores - log_sum_exp(scores))
    assert weights[skipped].max(initial=0.0) <= threshold * (1 + SLACK)
    assert weights[skipped].sum() <= skipped_mass(threshold, len(skipped)) * (1 + SLACK)


def test_unknown_mass_is_never_certified():
    assert dropped_mass_error(np.inf, 0.0) == np.inf
    assert dropped_mass_error(0.0, 5.0) == 0
    assert dropped_mass_error(3.0, 5.0) == 5.0
    assert skipped_mass(0.5, 10) == 1
    assert skipped_mass(0.5, 0) == 0


@settings(deadline=None)
@given(seeds, st.integers(1, 64), st.floats(0, 30), st.floats(-100, 100))
def test_pooling_brackets_the_mass(seed, keys, spread, centre):
    rng = np.random.default_rng(seed)
    scores = centre + spread * rng.uniform(-1, 1, keys)
    mean = scores.mean()
    exact = log_sum_exp(scores)
    slack = SLACK * (1 + abs(exact) + spread)
    assert pooled_log_mass_lower(mean, keys) <= exact + slack
    radius = np.abs(scores - mean).max()
    assert exact <= pooled_log_mass(mean, keys, radius) + slack


def test_pooling_is_attained_by_equal_scores():
    exact = 3.0 + np.log(64)
    assert exact - pooled_log_mass_lower(3.0, 64) <= 1e-14 * exact
    assert pooled_log_mass(3.0, 64, 0.0) - exact <= 1e-14 * exact
    # Two-point blocks approach the upper bound for small radii.
    gap = float(pooled_log_mass(0.0, 2, 0.01)) - float(np.log(2 * np.cosh(0.01)))
    assert 0 <= gap < 1e-8
