"""Theorem 10: order statistics, checked with exact binomial sums."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core.bounds import minimal_sample_size, order_statistic, sample_size
from adaattn_core.errors import ArgumentError

shares = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99])
confidences = st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999])


def at_most(k: int, m: int, p: float) -> Decimal:
    """P(Binomial(m, p) <= k) to 50 digits."""
    with localcontext() as context:
        context.prec = 60
        chance = Decimal(p)
        if chance >= 1:
            return Decimal(int(k >= m))
        term = (1 - chance) ** m
        total = term
        for j in range(min(k, m)):
            term = term * (m - j) / (j + 1) * chance / (1 - chance)
            total += term
        return total if k >= 0 else Decimal(0)


@settings(deadline=None)
@given(st.integers(1, 120), shares, confidences)
def test_the_order_statistic_is_the_least_that_covers(samples, rows, confidence):
    k = order_statistic(samples, rows, confidence)
    c = Decimal(confidence)
    if k is None:
        assert at_most(samples - 1, samples, rows) < c + Decimal("1e-8")
        return
    assert 1 <= k <= samples
    assert at_most(k - 1, samples, rows) >= c
    assert at_most(k - 2, samples, rows) < c + Decimal("1e-8")


def test_published_values():
    # Wilks' tolerance limits: one-sided, 95/95 and 95/99, first and second largest.
    assert minimal_sample_size(0.95, 0.95) == 59
    assert minimal_sample_size(0.95, 0.99) == 90
    assert order_statistic(92, 0.95, 0.95) == 92
    assert order_statistic(93, 0.95, 0.95) == 92
    assert order_statistic(124, 0.95, 0.95) == 122


@settings(deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 4), st.integers(59, 110), st.sampled_from([0.8, 0.95])
)
def test_coverage_of_a_finite_head_with_ties(distinct, repeats, samples, rows):
    """Exact probability over all draws that a share `rows` errs by at most the statistic."""
    errors = np.repeat(np.arange(distinct), repeats)
    count = len(errors)
    k = order_statistic(samples, rows, 0.95)
    covering = [x for x in range(distinct) if np.sum(errors <= x) >= rows * count]
    below = int(np.sum(errors < min(covering)))
    assert at_most(k - 1, samples, below / count) >= Decimal("0.95")


@pytest.mark.parametrize("tightness", [0.0, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("rows", [0.9, 0.95])
def test_the_sample_size_covers_and_is_tight(rows, tightness):
    confidence = 0.95
    size = sample_size(rows, confidence, tightness)
    above = 1.0 - tightness * (1.0 - rows)

    def both(m):
        k = order_statistic(m, rows, confidence)
        return k is not None and 1 - at_most(k - 1, m, above) >= Decimal(confidence)

    assert both(size)
    assert not any(both(m) for m in range(max(1, size - 5), size))


def test_no_tightness_is_the_minimal_sample_and_more_needs_more():
    assert sample_size(0.95, 0.95, 0.0) == minimal_sample_size(0.95, 0.95)
    sizes = [sample_size(0.95, 0.95, t) for t in (0.0, 0.25, 0.5, 0.75)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("rows", "confidence", "tightness"),
    [(1.0, 0.9, 0.5), (0.0, 0.9, 0.5), (0.9, 1.0, 0.5), (0.9, 0.0, 0.5), (0.9, 0.9, 1.0)],
)
def test_impossible_samples_are_refused(rows, confidence, tightness):
    with pytest.raises(ArgumentError):
        sample_size(rows, confidence, tightness)


def test_a_sample_beyond_the_limit_is_refused():
    with pytest.raises(ArgumentError, match="smaller tightness"):
        sample_size(0.999999, 0.95, 0.5)
