"""Theorem 9: stochastic rounding is unbiased, and scores stay within their bound."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core.bounds import deviation_factor, stochastic_score_error
from adaattn_core.errors import ArgumentError
from adaattn_core.formats import format_spacing, stochastic_round

seeds = st.integers(0, 2**32 - 1)
EIGHT_BIT = ("i8", "e4m3")
LARGEST = {"i8": 127.0, "e4m3": 448.0}


@settings(deadline=None)
@given(seeds, st.sampled_from(EIGHT_BIT))
def test_errors_lie_within_one_step_of_neighbours(seed, name):
    rng = np.random.default_rng(seed)
    x = (rng.uniform(-1, 1, 500) * LARGEST[name]).astype(np.float32)
    rounded = stochastic_round(x, name, rng).astype(np.float64)
    assert (np.abs(rounded - x) < format_spacing(x, name)).all()
    assert (np.abs(rounded) <= LARGEST[name]).all()


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_errors_have_mean_zero(name):
    draws = 20000
    x = np.linspace(-0.99, 0.99, 97) * LARGEST[name]
    rng = np.random.default_rng(5)
    rounded = stochastic_round(np.tile(x, (draws, 1)), name, rng).astype(np.float64)
    error = (rounded - x) / format_spacing(x, name)
    # Hoeffding with a union over 97 positions: a false alarm has probability 1e-6.
    limit = math.sqrt(math.log(2 * x.size / 1e-6) / (2 * draws))
    assert np.abs(error.mean(axis=0)).max() < limit


def test_representable_numbers_are_kept():
    rng = np.random.default_rng(0)
    x = np.array([-448.0, -(2.0**-9), 0.0, 1.0, 1.125, 448.0])
    assert (stochastic_round(x, "e4m3", rng) == x).all()


def rounded_scores(rng, query, key, name):
    """Quantise per token as an executor does; return score errors and the largest steps."""
    errors, steps, hats = None, [], []
    for x in (query, key):
        unit = np.abs(x).max(axis=1, keepdims=True) / LARGEST[name]
        hats.append(stochastic_round(x / unit, name, rng).astype(np.float64) * unit)
        top = format_spacing(np.full(1, LARGEST[name]), name)[0]
        steps.append(float((unit * top).max()))
    errors = hats[0] @ hats[1].T - query @ key.T
    return errors, steps


def bound_for(query, key, steps, confidence):
    return stochastic_score_error(
        0.125,
        np.linalg.norm(query, axis=1).max(),
        np.linalg.norm(key, axis=1).max(),
        *steps,
        dim=query.shape[1],
        pairs=len(query) * len(key),
        confidence=confidence,
    )


@settings(deadline=None)
@given(seeds, st.integers(1, 96), st.sampled_from(EIGHT_BIT), st.booleans())
def test_scores_stay_within_the_bound(seed, dim, name, outliers):
    rng = np.random.default_rng(seed)
    query, key = rng.normal(size=(2, 40, dim))
    if outliers:
        query, key = query**3, key**5
    errors, steps = rounded_scores(rng, query, key, name)
    # At this confidence a violation anywhere in 10,000 examples would itself be a finding.
    assert 0.125 * np.abs(errors).max() <= bound_for(query, key, steps, 1 - 1e-9)


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_simultaneous_coverage_holds_and_is_not_vacuous(name):
    rng = np.random.default_rng(11)
    confidence, trials = 0.9, 200
    query, key = rng.normal(size=(2, 64, 64))
    if name == "i8":
        # Every coordinate half-way between two codes: the largest variance there is.
        query, key = (np.sign(x) * (np.floor(np.abs(x) * 30) + 0.5) for x in (query, key))
        query[:, 0] = key[:, 0] = 127.0
    worst = np.empty(trials)
    for trial in range(trials):
        errors, steps = rounded_scores(rng, query, key, name)
        worst[trial] = 0.125 * np.abs(errors).max()
    bound = bound_for(query, key, steps, confidence)
    assert (worst > bound).mean() <= 1 - confidence
    # Recorded 2026-11: 1.6 (i8 half-way, the extreme case), 5.9 (e4m3, whose steps are
    # measured at the top of the range).
    assert bound / np.median(worst) < {"i8": 2.2, "e4m3": 8.0}[name]


def test_it_beats_cauchy_schwarz_at_large_dimensions():
    steps, norm, dim = 0.02, 10.0, 128
    residual = steps * math.sqrt(dim / 6)
    worst_case = 2 * norm * residual
    likely = stochastic_score_error(
        1.0, norm, norm, steps, steps, dim=dim, pairs=2048**2, confidence=0.95
    )
    assert likely < 0.6 * worst_case


def test_deviation_factor_grows_with_pairs_and_confidence():
    assert deviation_factor(1, 0.5) >= math.sqrt(2 * math.log(4))
    assert (
        deviation_factor(10, 0.95) < deviation_factor(100, 0.95) < deviation_factor(100, 0.99)
    )
    for confidence in (0.0, 1.0):
        with pytest.raises(ArgumentError):
            deviation_factor(10, confidence)


def test_nothing_rounded_means_no_error():
    bound = stochastic_score_error(1.0, 5.0, 5.0, 0.0, 0.0, dim=8, pairs=9, confidence=0.9)
    assert bound == 0
