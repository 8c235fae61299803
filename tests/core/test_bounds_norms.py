"""Norms lie on their side of the truth at every magnitude that the format has."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaattn_core.bounds import (
    largest_norm_upper,
    rms_estimate,
    rms_norm_estimate,
    rms_norm_lower,
    row_norms_estimate,
    row_norms_upper,
)

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@st.composite
def matrices(draw):
    """Rows of any format whose entries span its whole range, zeros and subnormals included."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    rows, dim = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    info = ml_dtypes.finfo(dtype)
    low = float(np.log2(float(info.smallest_subnormal)))
    high = float(np.log2(float(info.max)))
    exponent = st.floats(low, high - 1e-9) | st.sampled_from([low, -0.5 * high, 0.0, high - 1])
    numbers = exponent.map(lambda e: 2.0**e) | st.just(0.0)
    entries = draw(st.lists(numbers, min_size=rows * dim, max_size=rows * dim))
    signs = draw(st.lists(st.sampled_from([-1, 1]), min_size=rows * dim, max_size=rows * dim))
    x = np.array(entries).reshape(rows, dim) * np.array(signs).reshape(rows, dim)
    return np.clip(x, -float(info.max), float(info.max)).astype(dtype)


def squares(x):
    """Exact sums of squares of rows."""
    return [sum(Fraction(float(e)) ** 2 for e in row) for row in x]


@given(matrices())
def test_upper_bounds_are_above_and_near(x):
    for upper, exact in zip(row_norms_upper(x), squares(x), strict=True):
        if exact == 0:
            assert upper == 0
        elif upper == math.inf:
            assert exact > Fraction(np.finfo(np.float64).max) ** 2 * Fraction(999, 1000)
        else:
            assert Fraction(upper) ** 2 >= exact
            near = Fraction(upper) - Fraction(2, 2**1074)
            assert near <= 0 or near**2 <= exact * Fraction(10001, 10000)
    assert largest_norm_upper(x) == row_norms_upper(x).max()


@given(matrices())
def test_estimates_are_near(x):
    for near, exact in zip(row_norms_estimate(x), squares(x), strict=True):
        if near < math.inf:
            step = Fraction(1, 2**1074)
            for side, sign in ((Fraction(near) + step, 1), (Fraction(near) - step, -1)):
                scaled = max(side, Fraction(0)) ** 2 * (1 + sign * Fraction(1, 10**6))
                assert sign * (scaled - exact) >= 0 or exact == 0


@given(matrices())
def test_the_rms_is_below_and_near(x):
    lower, exact = rms_norm_lower(x), sum(squares(x), Fraction(0)) / len(x)
    assert Fraction(lower) ** 2 <= exact
    least = Fraction(lower) + Fraction(4, 2**1074)
    assert least**2 * Fraction(1001, 1000) >= exact or lower >= np.finfo(np.float64).max
    assert lower <= rms_norm_estimate(x) * (1 + 1e-9)
    assert (rms_norm_estimate(x) == 0) == (exact == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_or_not_there(dtype):
    x = np.array([[1, 2], [np.nan, 1], [np.inf, 0], [np.inf, np.nan]]).astype(dtype)
    assert list(row_norms_upper(x)[1:]) == [np.inf] * 3
    assert np.isnan(row_norms_estimate(x)[1])
    assert row_norms_estimate(x)[2] == np.inf
    assert not np.isfinite(rms_norm_lower(x))
    nothing = x[:0]
    assert largest_norm_upper(nothing) == rms_norm_lower(nothing) == rms_norm_estimate(nothing)
    assert rms_estimate(np.array([])) == 0
    assert list(row_norms_upper(np.zeros((2, 0), dtype))) == [0, 0]


@pytest.mark.parametrize("size", [1e-320, 1e-200, 1e-25, 1.0, 1e200])
def test_one_large_row_hides_no_small_one(size):
    x = np.ones((3, 4))
    x[1] = size
    assert row_norms_upper(x)[1] == pytest.approx(2 * size, rel=1e-3)
    assert rms_estimate(x[1]) == pytest.approx(size, rel=1e-3)
