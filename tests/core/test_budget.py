"""ErrorBudget admits exactly the sentences that somebody could certify."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaattn_core.budget import ErrorBudget
from adaattn_core.certificates.data import HeadCertificate
from adaattn_core.errors import ArgumentError

SHARES = st.floats(0.0, 1.0, exclude_min=True, exclude_max=True)


def test_defaults() -> None:
    budget = ErrorBudget(0.1)
    assert (budget.rows, budget.confidence) == (0.95, 0.95)
    assert (budget.guarantee, budget.on_violation) == ("sampled", "escalate")


@pytest.mark.parametrize(
    "changed",
    [
        {"rel": 0.0},
        {"rel": -0.1},
        {"rel": math.inf},
        {"rel": math.nan},
        {"rel": "0.1"},
        {"rows": 0.0},
        {"rows": 1.1},
        {"rows": math.nan},
        {"confidence": 0.0},
        {"confidence": 2.0},
        {"confidence": None},
        {"guarantee": "certain"},
        {"on_violation": "ignore"},
        {"rows": 1.0},
        {"confidence": 1.0},
        {"guarantee": "probabilistic", "confidence": 1.0},
    ],
)
def test_inadmissible_numbers_and_words(changed: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError) as caught:
        ErrorBudget(**({"rel": 0.1} | changed))
    assert str(caught.value).count("\n") == 2


def test_theorems_speak_for_every_row() -> None:
    ErrorBudget(0.1, rows=1.0, confidence=1.0, guarantee="worst_case")
    ErrorBudget(0.1, rows=1.0, confidence=0.99, guarantee="probabilistic")


def test_numpy_numbers_are_numbers() -> None:
    assert ErrorBudget(np.float32(0.5), rows=np.float64(0.9)).rel == 0.5


@given(rel=st.floats(1e-9, 1e9), rows=SHARES, confidence=SHARES)
def test_a_certificate_of_the_same_numbers_holds(
    rel: float, rows: float, confidence: float
) -> None:
    budget = ErrorBudget(rel, rows, confidence)
    same = HeadCertificate("sampled", rel, rows, confidence)
    assert same.holds(budget)
    for weaker in (
        HeadCertificate("sampled", math.nextafter(rel, math.inf), rows, confidence),
        HeadCertificate("sampled", rel, math.nextafter(rows, 0.0), confidence),
        HeadCertificate("sampled", rel, rows, math.nextafter(confidence, 0.0)),
        HeadCertificate("none", rel, rows, confidence),
        HeadCertificate("sampled", math.nan, rows, confidence),
    ):
        assert not weaker.holds(budget)
    for stronger in ("probabilistic", "worst_case"):
        assert HeadCertificate(stronger, rel, 1.0, 1.0).holds(budget)
    theorem = ErrorBudget(rel, rows, confidence, "worst_case")
    assert not HeadCertificate("probabilistic", rel, 1.0, 1.0).holds(theorem)
