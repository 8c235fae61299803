"""The definition itself: against cases worked by hand, and against the kit's float64 oracle."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from adaattn_core import Mask
from adaattn_core.testing.hostile.definition import (
    HAS_EXTENDED_RANGE,
    Head,
    MaskFacts,
    attention_of_head,
    spans,
)
from adaattn_core.testing.oracles import exact_attention
from adaattn_core.testing.strategies import ProblemSpec, problem_specs

pytestmark = pytest.mark.skipif(
    not HAS_EXTENDED_RANGE, reason="the definition needs a longdouble wider than float64"
)


def head(
    query: Any, key: Any, value: Any, mask: Mask | None = None, scale: float = 1.0
) -> Head:
    q, k, v = (np.asarray(x, np.float64)[None, None] for x in (query, key, value))
    facts = MaskFacts.of(mask or Mask.none())
    (span,) = spans(facts, 1, q.shape[2], k.shape[2])
    return attention_of_head(q, k, v, scale, facts, span, 0, 1)


def test_two_keys_by_hand() -> None:
    found = head([[1.0]], [[0.0], [np.log(3.0)]], [[4.0], [8.0]])
    assert float(found.out[0, 0]) == pytest.approx((4 + 3 * 8) / 4, abs=1e-14)
    assert float(found.lse[0]) == pytest.approx(np.log(4), abs=1e-14)


def test_scores_far_beyond_float64_are_ordinary_numbers() -> None:
    found = head([[1e200]], [[1e200], [-1e200]], [[1.0], [2.0]])
    assert found.out[0, 0] == 1
    assert not found.reached.any()


def test_rows_that_see_nothing() -> None:
    hidden = Mask.boolean(np.array([[False, False], [True, False]]))
    found = head([[np.nan], [1.0]], [[1.0], [np.nan]], [[5.0], [np.nan]], hidden)
    assert found.out.tolist() == [[0], [5]]
    assert found.lse[0] == -np.inf
    assert found.sees.tolist() == [False, True]
    assert found.reached.tolist() == [False, False]


def test_visible_nan_reaches_the_rows_that_see_it() -> None:
    found = head([[1.0]] * 3, [[1.0]] * 3, [[1.0], [np.nan], [2.0]], Mask.causal())
    assert found.reached.tolist() == [False, True, True]
    assert np.isnan(found.out[:, 0]).tolist() == [False, True, True]


@pytest.mark.parametrize("side", [sys.maxsize, 2**63, 10**40])
def test_windows_beyond_the_integers_see_every_key(side: int) -> None:
    x = np.arange(6.0)[:, None]
    found = head(x, x, x, Mask.sliding_window(side, side, "top_left"))
    assert found.visible.all()


def test_a_row_of_lowest_numbers_sees_every_key() -> None:
    bias = np.full((1, 4), np.finfo(np.float64).min)
    found = head([[0.0]], [[0.0]] * 4, [[1.0], [2.0], [3.0], [6.0]], Mask.additive(bias))
    assert float(found.out[0, 0]) == 3


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(problem_specs(values=("normal", "outliers", "needles"), storages=("contiguous",)))
def test_it_agrees_with_the_kits_oracle(spec: ProblemSpec) -> None:
    problem = spec.build()
    exact = exact_attention(problem)
    facts = MaskFacts.of(problem.mask)
    arrays = (problem.query, problem.key, problem.value)
    group = problem.group_size
    for i, span in enumerate(spans(facts, problem.batch, problem.len_q, problem.len_kv)):
        for h in range(problem.heads_q):
            found = attention_of_head(*arrays, problem.scale, facts, span, h, group)
            where = (span.batch, h, slice(span.q0, span.q1))
            off = np.abs(found.out - exact.out[where]).max(initial=0.0)
            assert off <= np.sqrt(problem.dim_v) * exact.error_upper[i, h] + 1e-300
