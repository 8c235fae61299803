"""Additive masks: what is cast may not change what a row sees; weightless keys are hidden."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaattn_core import ErrorBudget, Mask, attention
from adaattn_core.policies.fixed import FixedPolicy
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.oracles import exact_attention, rms_row_norm, row_errors

LOWEST = {
    "f64": float(np.finfo(np.float64).min),
    "f32": float(np.finfo(np.float32).min),
    "f16": float(np.finfo(np.float16).min),
    "1e9": -1e9,
    "1e4": -1e4,
}


def normal(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Return standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def assert_certified(result, q, k, v, mask):
    """Every head's rows lie within its worst-case certificate of the float64 truth."""
    exact = exact_attention(AttentionProblem.from_arrays(q, k, v, mask=mask))
    for index, certificate in result.certificate.heads.items():
        rows = result.out[0, index[1]].astype(np.float64)
        error = row_errors(rows, exact.out[0, index[1]]).max(initial=0.0)
        allowed = certificate.upper * rms_row_norm(rows) + exact.error_upper[index]
        assert error <= allowed, (index, error, allowed)


# -- positions --------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [sys.maxsize, sys.maxsize - 7, 2**63, 10**30])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("len_kv", [1, 8, 13])
def test_a_window_of_any_width_holds_every_key(size, alignment, len_kv):
    q, k = normal(1, 1, 8, 16), normal(1, 1, len_kv, 16, seed=1)
    whole = attention(q, k, k)
    for sides in ((None, size), (size, None), (size, size)):
        window = attention(q, k, k, mask=Mask.sliding_window(*sides, alignment))
        np.testing.assert_array_equal(window.out, whole.out)
        np.testing.assert_array_equal(window.lse, whole.lse)


@given(
    len_q=st.integers(0, 9),
    len_kv=st.integers(0, 9),
    left=st.none() | st.integers(0, 20) | st.integers(2**62, 2**70),
    right=st.none() | st.integers(0, 20) | st.integers(2**62, 2**70),
    alignment=st.sampled_from(["top_left", "bottom_right"]),
)
def test_intervals_are_those_of_whole_numbers(len_q, len_kv, left, right, alignment):
    mask = Mask.sliding_window(left, right, alignment)
    start, stop = mask.intervals(len_q, len_kv)
    for row in range(len_q):
        position = row + (len_kv - len_q if alignment == "bottom_right" else 0)
        seen = [
            j
            for j in range(len_kv)
            if (left is None or j >= position - left)
            and (right is None or j <= position + right)
        ]
        assert list(range(start[row], stop[row])) == seen


# -- what a mask hides ------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [-1.0, 1.0])
def test_a_row_whose_mask_swallows_its_scores_is_the_mean(dtype, size):
    x = normal(1, 1, 8, 16, dtype=dtype)
    bias = np.zeros((8, 8))
    bias[3] = size * np.finfo(np.float64).max
    plain, result = attention(x, x, x), attention(x, x, x, mask=Mask.additive(bias))
    np.testing.assert_allclose(result.out[0, 0, 3], x[0, 0].mean(axis=0), rtol=1e-5, atol=1e-6)
    others = np.arange(8) != 3
    np.testing.assert_array_equal(result.out[:, :, others], plain.out[:, :, others])
    assert np.isfinite(result.lse).all()
    assert_certified(result, x, x, x, Mask.additive(bias))


@pytest.mark.parametrize("lowest", LOWEST.values(), ids=LOWEST)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("guarantee", ["worst_case", "probabilistic", "sampled"])
def test_filled_masks_hide_and_cost_nothing(lowest, dtype, guarantee):
    q, k, v = (normal(1, 2, 64, 32, seed=s, dtype=dtype) for s in range(3))
    causal = np.tril(np.ones((64, 64), bool))
    bias = np.where(causal, 0, lowest)
    rows = 1.0 if guarantee != "sampled" else 0.95
    sure = {"worst_case": 1.0}.get(guarantee, 0.95)
    budget = ErrorBudget(0.05, rows, sure, guarantee)
    filled = attention(q, k, v, mask=Mask.additive(bias), budget=budget, seed=1)
    plain = attention(q, k, v, mask=Mask.causal(), budget=budget, seed=1)
    bound = plain.certificate.upper * (1 + 1e-3)
    assert (filled.certificate.upper <= np.minimum(bound, 0.05)).all()
    np.testing.assert_allclose(filled.out, plain.out, rtol=1e-3, atol=1e-4)


@given(
    level=st.sampled_from([0.0, 3.0, -700.0, 1e4, -1e9, 1e12, 1e300, -7e307]),
    lowest=st.sampled_from([-1.0, -600.0, -800.0, -1e9, -1e308]),
    wide=st.booleans(),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**32),
)
def test_certificates_hold_whatever_the_mask(level, lowest, wide, size, seed):
    dtype = np.float64 if wide else np.float32
    q, k, v = (normal(1, 1, 12, 8, seed=seed + s, dtype=dtype) for s in range(3))
    q = q * dtype(size)
    rng = np.random.default_rng(seed)
    bias = rng.standard_normal((12, 12)) + np.where(rng.random((12, 12)) < 0.4, lowest, 0)
    bias = bias + np.where(rng.random((12, 1)) < 0.5, level, 0)
    mask = Mask.additive(bias)
    result = attention(q, k, v, mask=mask)
    exact, lse = truth(q[0, 0], k[0, 0], v[0, 0], bias)
    rows = result.out[0, 0]
    allowed = result.certificate[0, 0].upper * rms_row_norm(rows)
    assert row_errors(rows, exact).max() <= allowed + 1e-15
    limit = np.finfo(np.float32).max
    np.testing.assert_allclose(
        result.lse[0, 0], np.clip(lse, -limit, limit), rtol=1e-6, atol=1e-3
    )


def truth(q, k, v, bias):
    """Attention of one head in extended precision, the largest entry taken off each row."""
    q, k, v, bias = (x.astype(np.longdouble) for x in (q, k, v, bias))
    top = bias.max(axis=1, keepdims=True)
    scores = q @ k.T / np.sqrt(np.longdouble(q.shape[1]))
    scores[np.abs(top)[:, 0] > 1e20] = 0  # what float64 leaves of score + mask
    scores = scores + (bias - top)
    shift = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - shift)
    total = weights.sum(axis=1, keepdims=True)
    lse = (top + shift + np.log(total))[:, 0]
    return (weights / total @ v).astype(np.float64), lse.astype(np.float64)


def test_hidden_by_weight_enters_no_bound():
    q, k, v = (normal(1, 1, 16, 8, seed=s) for s in range(3))
    k[:, :, 8:], v[:, :, 8:] = 1e6, 1e8
    bias = np.where(np.arange(16) < 8, 0, np.finfo(np.float32).min).astype(np.float32)
    result = attention(q, k, v, mask=Mask.additive(bias))
    same = attention(q, k[:, :, :8], v[:, :, :8])
    assert result.facts[0, 0].key_norm_upper == same.facts[0, 0].key_norm_upper
    assert result.facts[0, 0].value_norm_upper == same.facts[0, 0].value_norm_upper
    np.testing.assert_allclose(result.out, same.out, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nonfinite_mask_entry_reaches_the_rows_that_see_it(bad):
    x = normal(1, 1, 8, 16)
    bias = np.zeros((8, 8), np.float32)
    bias[3, 2] = bias[0, 5] = bad
    mask = Mask.causal() & Mask.additive(bias)
    result = attention(x, x, x, mask=mask)
    lost = ~np.isfinite(result.out[0, 0]).all(axis=1)
    assert lost.tolist() == [i == 3 for i in range(8)]
    assert result.certificate[0, 0].nonfinite


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("hiding", [-np.inf, LOWEST["f32"]])
@pytest.mark.parametrize("bad_head", [0, 1])
def test_a_nonfinite_entry_leaves_other_rows_hidden_keys_hidden(bad, hiding, bad_head):
    x = normal(1, 2, 8, 16)
    bias = np.zeros((1, 2, 8, 8), np.float32)
    bias[0, :, 1, 2] = bias[0, :, 5, 0] = hiding
    plain = attention(x, x, x, mask=Mask.additive(bias))
    odd = bias.copy()
    odd[0, bad_head, 3, 2] = bad
    result = attention(x, x, x, mask=Mask.additive(odd))
    lost = ~np.isfinite(result.out[0]).all(axis=2)
    assert np.argwhere(lost).tolist() == [[bad_head, 3]]
    np.testing.assert_array_equal(result.out[0][~lost], plain.out[0][~lost])
    np.testing.assert_array_equal(result.lse[0][~lost], plain.lse[0][~lost])


@pytest.mark.parametrize("form", ["boolean", "additive"])
@pytest.mark.parametrize("qk", ["f32", "bf16", "i8", "e4m3"])
def test_a_row_that_sees_nothing_counts_nowhere(form, qk):
    q, k, v = (normal(1, 1, 8, 16, seed=s) for s in range(3))
    allowed = np.ones((8, 8), bool)
    allowed[2] = False
    mask = (
        Mask.boolean(allowed)
        if form == "boolean"
        else Mask.additive(np.where(allowed, 0, -np.inf))
    )
    clean = q.copy()
    clean[:, :, 2] = 0
    for bad in (np.nan, np.inf, 1e30):
        q[:, :, 2] = bad
        result = attention(q, k, v, mask=mask, policy=FixedPolicy(qk=qk, pv="f32"), seed=0)
        same = attention(clean, k, v, mask=mask, policy=FixedPolicy(qk=qk, pv="f32"), seed=0)
        assert (result.out[0, 0, 2] == 0).all()
        assert result.lse[0, 0, 2] == -np.inf
        assert not result.certificate[0, 0].nonfinite
        assert result.certificate[0, 0].upper == same.certificate[0, 0].upper
        np.testing.assert_array_equal(result.out, same.out)


def test_entries_that_no_row_sees_may_be_anything():
    x = normal(1, 1, 8, 16)
    plain = attention(x, x, x, mask=Mask.causal())
    for odd in (np.nan, np.inf, 1e300, -1e300):
        bias = np.where(np.tril(np.ones((8, 8), bool)), 0, odd)
        result = attention(x, x, x, mask=Mask.causal() & Mask.additive(bias))
        np.testing.assert_array_equal(result.out, plain.out)
        np.testing.assert_array_equal(result.lse, plain.lse)
        np.testing.assert_allclose(result.certificate.upper, plain.certificate.upper)
