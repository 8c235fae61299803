"""Bounds at every magnitude: nothing underflows to a bound of 0, nothing hidden counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaattn_core import ErrorBudget, FixedPolicy, HeadPlan, Mask, Plan, attention
from adaattn_core.problem import AttentionProblem
from adaattn_core.stats import MeasureRequest
from adaattn_core.structure import BlockSparse, Dense, Landmark, LowRank, ScoreSkip
from adaattn_core.testing.oracles import exact_attention, rms_row_norm, row_quantile
from adaattn_reference.backend import NumpyBackend

REPORT = ErrorBudget(0.1, 1, 1, "worst_case", "report")
FORMATS = ("f32", "tf32", "f16", "bf16", "i8", "e4m3")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def worst_error(result, problem):
    """Largest row error in multiples of the rms row, as certificates count."""
    return row_quantile(result.out[0, 0], exact_attention(problem).out[0, 0], rows=1.0)


@pytest.mark.parametrize(("scales", "least"), [("token", 0.005), ("tile", 0.003)])
def test_small_visible_values_beside_large_hidden_ones(scales, least):
    """That it rounds at all is seen by the least error: blocks of a tile's shape round less."""
    x = normal(1, 1, 8, 16)
    v = (1e-25 * x).astype(np.float32)
    v[:, :, 4:] = 1
    mask, policy = Mask.boolean(np.arange(8) < 4), FixedPolicy(qk="i8", scales=scales)
    problem = AttentionProblem.from_arrays(3 * x, x, v, mask=mask)
    report = replace(REPORT, rel=0.01)
    result = attention(3 * x, x, v, mask=mask, budget=report, policy=policy)
    assert least < worst_error(result, problem) <= result.certificate[0, 0].upper < 0.5
    assert not result.certificate.holds(report)
    budget = ErrorBudget(0.01, 1, 1, "worst_case")
    again = attention(3 * x, x, v, mask=mask, budget=budget, policy=policy)
    assert worst_error(again, problem) <= again.certificate[0, 0].upper <= 0.01


@pytest.mark.parametrize("size", [1e-170, 1e-200, 1e-290])
@pytest.mark.parametrize(
    "asked", [{}, {"policy": FixedPolicy(), "budget": 0.1}, {"budget": 0.1}, {"budget": REPORT}]
)
def test_float64_values_whose_squares_vanish(size, asked):
    z = normal(1, 1, 128, 16).astype(float)
    problem = AttentionProblem.from_arrays(z, z, z * size)
    result = attention(z, z, z * size, **asked)
    assert 0 < worst_error(result, problem) <= result.certificate[0, 0].upper
    assert result.certificate[0, 0].upper < 1e-3
    assert rms_row_norm(result.out[0, 0]) > 0.01 * size


def test_a_narrow_plan_for_such_values_says_so():
    z = normal(1, 1, 128, 16).astype(float)
    budget = ErrorBudget(0.1, on_violation="report")
    result = attention(z, z, z * 1e-170, policy=FixedPolicy(), budget=budget)
    assert result.certificate[0, 0].upper == np.inf


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([*((n, m) for n in FORMATS for m in FORMATS), ("f64", "f64")]),
    st.tuples(*[st.floats(-1, 1)] * 3),
    st.booleans(),
)
def test_certificates_hold_at_every_magnitude(seed, dtype, formats, powers, smooth):
    """|q| |k| stays moderate; each of them, and |v|, goes to the ends of the dtype."""
    reach = 30 if dtype == np.float32 else 280
    rng = np.random.default_rng(seed)
    rows, keys = int(rng.integers(1, 20)), int(rng.integers(1, 40))
    sizes = (10 ** (reach * powers[0]), 10 ** (-reach * powers[0]), 10 ** (reach * powers[1]))
    q, k, v = (
        (rng.standard_normal((1, 1, n, 8)) * size * 10 ** (-4 * rng.random() * abs(powers[2])))
        for n, size in zip((rows, keys, keys), sizes, strict=True)
    )
    problem = AttentionProblem.from_arrays(*(x.astype(dtype) for x in (q, k, v)))
    plan = Plan.uniform(problem, HeadPlan(qk=formats[0], pv=formats[1], smooth_k=smooth))
    result = attention(
        problem.query, problem.key, problem.value, plan=plan, budget=REPORT, backend="numpy"
    )
    upper = result.certificate[0, 0].upper
    if not result.certificate[0, 0].nonfinite:
        assert worst_error(result, problem) <= upper * (1 + 1e-9) + 1e-13
    assert upper > 0


MASKS = st.sampled_from(["boolean", "additive", "window", "lengths"])
STRUCTURES = ("dense", "score_skip", "low_rank", "blocks")


@given(
    st.integers(0, 2**32 - 1),
    MASKS,
    st.sampled_from([(n, m) for n in FORMATS for m in ("f32", "f16", "i8", "e4m3")]),
    st.sampled_from([1e-30, 1e10, 1e30, np.inf, np.nan]),
    st.sampled_from(STRUCTURES),
    st.sampled_from(["token", "block"]),
)
def test_hidden_keys_enter_nothing(seed, kind, formats, size, structure, scales):
    """Output, facts and certificate are those of the same problem with hidden keys of 0."""
    rng = np.random.default_rng(seed)
    len_q, len_kv = int(rng.integers(1, 12)), int(rng.integers(16, 40))
    q = rng.standard_normal((1, 1, len_q, 8)).astype("f4")
    k, v = (rng.standard_normal((1, 1, len_kv, 8)).astype("f4") for _ in range(2))
    mask, hidden = mask_of(kind, rng, len_q, len_kv)
    blocks = (tuple(range(-(-len_kv // 4))),) * -(-len_q // 8)
    chosen = {
        "dense": Dense(),
        "score_skip": ScoreSkip(lam=0.01, tile_q=8, tile_kv=4),
        "low_rank": LowRank(3),
        "blocks": BlockSparse(tile_q=8, tile_kv=4, group=8, blocks=blocks),
    }[structure]
    results = []
    for filling in (0.0, size):
        key, value = k.copy(), v.copy()
        for x in (key, value):
            x[:, :, hidden] = x[:, :, hidden] * filling if filling else 0
        problem = AttentionProblem.from_arrays(q, key, value, mask=mask)
        plan = Plan.uniform(problem, HeadPlan(chosen, *formats, scales=scales))
        results.append(
            attention(q, key, value, mask=mask, plan=plan, budget=REPORT, backend="numpy")
        )
    clean, filled = results
    assert np.array_equal(clean.out, filled.out)
    assert np.array_equal(clean.lse, filled.lse)
    assert dict(clean.facts) == dict(filled.facts)
    assert clean.certificate.upper == filled.certificate.upper


def mask_of(kind, rng, len_q, len_kv):
    """A mask that hides some keys from every row, and which those are."""
    hidden = np.zeros(len_kv, bool)
    if kind == "lengths":
        hidden[len_kv - 3 :] = True
        return Mask.key_lengths([len_kv - 3]), hidden
    if kind == "window":
        hidden[len_q + 2 :] = True
        return Mask.sliding_window(None, 2, "top_left"), hidden
    hidden[rng.integers(0, len_kv, 4)] = True
    if kind == "boolean":
        return Mask.boolean(np.broadcast_to(~hidden, (len_q, len_kv)).copy()), hidden
    bias = np.where(hidden, -np.inf, 0.5).astype("f4")
    return Mask.additive(np.broadcast_to(bias, (len_q, len_kv)).copy()), hidden


BLOCKS = BlockSparse(tau=0.5, band=0, group=128)


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-75, 2.0**50])
def test_what_is_measured_does_not_depend_on_the_unit(size):
    q, k, v = (normal(1, 1, 512, 16, seed=s) for s in range(3))
    request = MeasureRequest(
        rows=0.95,
        structures=(Landmark(band=64, group=128, tail=64), ScoreSkip(lam=1e-2), BLOCKS),
        enough_error=0.0,
        formats=(("bf16", "bf16"),),
        spectrum=False,
        seed=0,
    )
    found = []
    for unit in (1.0, size):
        problem = AttentionProblem.from_arrays(q, k, v * np.float32(unit), mask=Mask.causal())
        found.append(NumpyBackend().measure(problem, request)[0].heads[0, 0])
    plain, scaled = found
    rms = plain.output_rms_estimate * size
    assert scaled.output_rms_estimate == pytest.approx(rms, rel=1e-3)
    for a, b in zip(plain.structures, scaled.structures, strict=True):
        assert b.row_error_estimate == pytest.approx(a.row_error_estimate, rel=1e-2, abs=1e-6)
        assert b.frobenius_estimate == pytest.approx(a.frobenius_estimate, rel=1e-2, abs=1e-6)
    key = ("bf16", "bf16")
    assert scaled.format_errors[key] == pytest.approx(plain.format_errors[key], rel=1e-2)
