"""Outward rounding against exact rational arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core.bounds import compose, relative_terms
from adaattn_core.bounds.rounding import (
    add_up,
    div_up,
    down,
    mul_up,
    sqrt_up,
    sub_down,
    tanh_up,
    up,
)

finite = st.floats(0.0, 1e100, allow_subnormal=True)
positive = st.floats(1e-300, 1e100)


@settings(deadline=None)
@given(st.lists(finite, min_size=1, max_size=6))
def test_a_sum_is_never_understated_and_at_most_one_step_per_addition_over(terms):
    exact = sum(map(Fraction, terms))
    bound = Fraction(float(add_up(*terms)))
    assert (
        exact <= bound <= exact * (1 + Fraction(2 * len(terms), 2**52)) + Fraction(5e-324) * 6
    )


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 1e40), min_size=1, max_size=6))
def test_a_product_is_never_understated(factors):
    exact = math.prod(map(Fraction, factors))
    bound = float(mul_up(*factors))
    assert Fraction(bound) >= exact
    if exact == 0:
        assert bound == 0


@settings(deadline=None)
@given(finite, positive)
def test_a_quotient_is_never_understated(a, b):
    bound = float(div_up(a, b))
    assert bound == math.inf or Fraction(bound) >= Fraction(a) / Fraction(b)


@settings(deadline=None)
@given(finite, finite)
def test_a_difference_is_never_overstated(a, b):
    assert Fraction(float(sub_down(a, b))) <= max(Fraction(a) - Fraction(b), 0)


@settings(deadline=None)
@given(finite)
def test_a_root_is_never_understated(x):
    assert Fraction(float(sqrt_up(x))) ** 2 >= Fraction(x)


def test_exact_zeros_stay_zero_and_infinities_stay_infinite():
    assert mul_up(0.0, np.inf) == 0
    assert div_up(0.0, 0.0) == 0
    assert div_up(1.0, 0.0) == np.inf
    assert add_up(0.0, 0.0) == 0
    assert add_up(0.0, 0.1) == 0.1
    assert add_up(1.0, np.inf) == np.inf
    assert mul_up(1.0, 0.1, 1.0) == 0.1
    assert mul_up(1e200, 1e200) == np.inf
    assert mul_up(1e-300, 1e-300) > 0
    assert up(1.0, 3) == 1 + 3 * 2.0**-52
    assert down(1.0) == 1 - 2.0**-53
    assert down(np.finfo(np.float64).max) < np.finfo(np.float64).max


def test_operations_broadcast():
    assert mul_up(2.0, np.ones(3)).tolist() == [2.0, 2.0, 2.0]
    assert np.shape(add_up(np.ones((2, 1)), np.ones(3))) == (2, 3)
    assert div_up(np.array([0.0, 1.0]), np.array([0.0, 0.0])).tolist() == [0.0, np.inf]


def test_terms_compose_and_unknowns_are_infinite():
    assert compose({}) == 0
    assert compose({"a": 0.5, "b": 0.0}) == 0.5
    assert compose({"a": 0.1, "b": 0.2}) >= Fraction(0.1) + Fraction(0.2)
    assert compose({"a": math.nan, "b": 0.0}) == math.inf
    terms = relative_terms({"none": 0.0, "some": 1.0, "nan": math.nan}, 0.0)
    assert terms == {"none": 0.0, "some": math.inf, "nan": math.inf}


@pytest.mark.parametrize("unit", [1e-3, 3.0])
def test_relative_terms_are_rounded_up(unit):
    assert Fraction(relative_terms({"a": 0.7}, unit)["a"]) >= Fraction(0.7) / Fraction(unit)


@settings(deadline=None)
@given(finite | st.just(math.inf), finite | st.just(math.inf))
def test_scalars_and_arrays_round_alike(a, b):
    for operation in (add_up, mul_up, div_up, sub_down):
        if operation is div_up and a == b == math.inf:
            continue
        assert operation(a, b) == operation(np.array([a]), np.array([b]))[0]
    assert up(a, 3) == up(np.array([a]), 3)[0]
    assert down(a) == down(np.array([a]))[0]
    # NumPy and the C library round tanh differently, each within what both allow for.
    assert tanh_up(a) == pytest.approx(tanh_up(np.array([a]))[0], rel=1e-14)


def test_numpy_scalars_overflow_in_silence():
    big = np.float64(1e300)
    assert mul_up(big, big) == np.inf
    assert add_up(big * 1e8, big * 1e8) == np.inf
