"""Rows that certify: as many as a budget needs, and sentences that hold together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core.budget import ErrorBudget
from adaattn_cuda.planner.drawing import certifying_orders, certifying_rows
from adaattn_cuda.planner.specs import ROWS_MAX

LOG_FACTORIAL = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, ROWS_MAX + 1)))])


def binomial_below(k: int, count: int, share: float) -> float:
    """P(Binomial(count, share) < k), by the definition."""
    i = np.arange(k)
    log = LOG_FACTORIAL[count] - LOG_FACTORIAL[i] - LOG_FACTORIAL[count - i]
    return float(np.exp(log + i * np.log(share) + (count - i) * np.log1p(-share)).sum())


@settings(deadline=None)
@given(
    st.floats(0.5, 0.99), st.floats(0.5, 0.999), st.booleans(), st.sampled_from([2048, 1 << 17])
)
def test_sentences_on_the_same_rows_hold_together(
    rows: float, confidence: float, retried: bool, len_q: int
) -> None:
    budget = ErrorBudget(0.1, rows=rows, confidence=confidence)
    drawn = certifying_rows(len_q, budget, retried=retried)
    if drawn is None:
        assert certifying_orders(ROWS_MAX, budget, retried=retried) is None
        return
    orders = certifying_orders(drawn, budget, retried=retried)
    assert orders is not None
    assert len(orders) == 1 + retried
    failing = sum(1 - binomial_below(k, drawn, rows) for k in orders)
    assert failing <= (1 - confidence) * (1 + 1e-9) + 1e-12


def test_longer_heads_are_certified_nearer_to_the_budgets_quantile() -> None:
    budget = ErrorBudget(0.1)
    shares = []
    for length in (8192, 32_768):
        drawn = certifying_rows(length, budget, retried=True)
        assert drawn is not None
        orders = certifying_orders(drawn, budget, retried=True)
        assert orders is not None
        shares.append(orders[0] / drawn)
    assert shares == sorted(shares, reverse=True)
    assert shares[1] == pytest.approx(0.967, abs=2e-3)
    assert certifying_rows(8192, budget, retried=False) == 128


def test_a_sentence_that_too_few_rows_could_carry_is_refused() -> None:
    assert certifying_rows(8192, ErrorBudget(0.1, rows=0.999), retried=False) is None
