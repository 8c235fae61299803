"""Exact rows in both arithmetics, and sums without a maximum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core import AttentionProblem, HeadPlan, Mask
from adaattn_core.testing.oracles import exact_attention
from adaattn_reference.backend import _input_facts
from adaattn_reference.exact import errors_against
from adaattn_reference.operands import prepare_operands
from adaattn_reference.softmax import RowAccumulator
from adaattn_reference.view import ProblemViews

MASKS = {
    "causal": Mask.causal("top_left"),
    "bottom right": Mask.causal("bottom_right"),
    "window": Mask.sliding_window(300, 20, "top_left"),
    "full": Mask.none(),
}


@pytest.mark.parametrize("mask", MASKS)
@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), keys=st.sampled_from([1, 255, 1024, 1500, 2100]))
def test_exact_rows_keep_their_own_bound(mask, seed, keys):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((1, 1, 700, 16), dtype=np.float32)
    k, v = rng.standard_normal((2, 1, 1, keys, 16), dtype=np.float32)
    problem = AttentionProblem.from_arrays(q, k, v, mask=MASKS[mask])
    rows = np.sort(rng.integers(0, 700, 400))
    exact = exact_attention(problem, {(0, 0): rows})
    for dtype in (np.float64, np.float32):
        view = ProblemViews(problem, dtype).rows((0, 0), rows)
        errors = errors_against(view, exact.out[0, 0, rows], _input_facts(view), problem)
        assert np.isfinite(errors.oracle_upper)
        assert (errors.error <= errors.oracle_upper + exact.error_upper[0, 0]).all()


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 6.0))
def test_without_a_maximum_the_sums_are_the_same(seed, size):
    rng = np.random.default_rng(seed)
    q, k, v = size * rng.standard_normal((3, 1, 1, 96, 8), dtype=np.float32)
    view = ProblemViews(AttentionProblem.from_arrays(q, k, v))[0, 0]
    operands = prepare_operands(view, HeadPlan(), 0)
    results = []
    for bounded in (False, view.bounded_by(87.0)):
        tile = RowAccumulator(96, operands, bounded=bounded)
        for keys in (slice(0, 40), slice(40, 96)):
            tile.add(operands.query @ operands.key[keys].T, operands.value[keys])
        out, lse = tile.finish()
        results.append((out.copy(), lse.copy()))
    (out, lse), (plain, plain_lse) = results
    assert np.linalg.norm(plain - out) <= 2e-5 * np.linalg.norm(out)
    assert np.abs(plain_lse - lse).max() <= 2e-5 * max(np.abs(lse).max(), 1)


def test_large_scores_are_not_taken_for_bounded():
    q, k = np.full((2, 1, 1, 4, 8), 4.0, np.float32)
    view = ProblemViews(AttentionProblem.from_arrays(q, k, k, scale=1.0))[0, 0]
    assert not view.bounded_by(87.0)
    assert ProblemViews(AttentionProblem.from_arrays(q, k, k, scale=0.1))[0, 0].bounded_by(87.0)
