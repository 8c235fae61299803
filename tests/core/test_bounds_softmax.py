"""Theorem 1: softmax under perturbed scores."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core.bounds import (
    output_error,
    total_variation,
    value_diameter,
    weight_ratio_as_score_error,
)

seeds = st.integers(0, 2**32 - 1)
SLACK = 1e-12
"""Relative rounding error of the float64 softmax that the bounds are compared with."""


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def decimal_tanh(x: float) -> Decimal:
    with localcontext() as context:
        context.prec = 120
        grown = (2 * Decimal(x)).exp()
        return (grown - 1) / (grown + 1)


@settings(deadline=None)
@given(seeds, st.integers(1, 40), st.floats(0, 30), st.floats(0, 50), st.floats(-1e3, 1e3))
def test_total_variation_covers_any_perturbation(seed, keys, delta, spread, shift):
    rng = np.random.default_rng(seed)
    scores = rng.normal(scale=spread, size=keys)
    sign = rng.choice([-1.0, 1.0], size=keys)
    moved = scores + delta * sign * rng.choice([1.0, rng.random()], size=keys) + shift
    rounding = 2.0**-50 * (np.abs(scores).max() + abs(shift) + delta)
    p, q = softmax(scores), softmax(moved)
    assert 0.5 * np.abs(p - q).sum() <= total_variation(delta + rounding) + SLACK


@settings(deadline=None)
@given(st.floats(1e-9, 20))
def test_total_variation_is_attained(delta):
    weight = 1 / (1 + np.exp(delta))
    p = np.array([weight, 1 - weight])
    q = p * np.exp([delta, -delta])
    q /= q.sum()
    distance = 0.5 * np.abs(p - q).sum()
    bound = float(total_variation(delta))
    assert distance <= bound + SLACK
    assert bound <= distance * (1 + 1e-9) + SLACK


@settings(deadline=None)
@given(st.floats(1e-40, 40))
def test_total_variation_is_rounded_up(delta):
    bound = float(total_variation(delta))
    assert Decimal(bound) >= decimal_tanh(0.5 * delta) or bound == 1.0
    assert bound <= 1


@settings(deadline=None)
@given(seeds, st.integers(2, 40), st.integers(1, 8), st.floats(1e-6, 10))
def test_output_error_covers_rows_and_channels(seed, keys, dim, delta):
    rng = np.random.default_rng(seed)
    scores = rng.normal(scale=3, size=keys)
    moved = scores + delta * rng.choice([-1.0, 1.0], size=keys)
    value = rng.standard_cauchy((keys, dim))
    change = (softmax(scores) - softmax(moved)) @ value
    diameter = np.linalg.norm(value[:, None] - value, axis=2).max()
    size = np.abs(value).max()
    assert np.linalg.norm(change) <= output_error(delta, diameter) + SLACK * size * dim
    ranges = value.max(axis=0) - value.min(axis=0)
    assert (np.abs(change) <= output_error(delta, ranges) + SLACK * size).all()
    norm = np.linalg.norm(value, axis=1).max()
    assert diameter <= value_diameter(norm) * (1 + SLACK)
    assert value_diameter(norm, diameter) == min(diameter, 2 * norm)


def test_limits():
    assert total_variation(0.0) == 0
    assert total_variation(np.inf) == 1
    assert output_error(np.inf, 0.0) == 0
    assert output_error(0.0, np.inf) == 0
    assert weight_ratio_as_score_error(0.0) == 0
    assert weight_ratio_as_score_error(1.0) == np.inf


@pytest.mark.parametrize("error", [1e-12, 1e-7, 0.01, 0.5])
def test_a_relative_weight_error_is_this_score_error(error):
    bound = float(weight_ratio_as_score_error(error))
    with localcontext() as context:
        context.prec = 60
        exact = -(1 - Decimal(error)).ln()
    assert Decimal(bound) >= exact
    assert bound <= float(exact) * (1 + 1e-12)
    assert np.log1p(error) <= bound
