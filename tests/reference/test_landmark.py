"""The landmark executor: exact in the limit, consistent in its accounting, replayable."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core import AttentionProblem, HeadPlan, Landmark, Mask, Plan
from adaattn_core.stats import MeasureRequest
from adaattn_core.testing.oracles import exact_attention, relative_frobenius
from adaattn_reference.backend import NumpyBackend
from adaattn_reference.farfield import GroupProbe, far_mass
from adaattn_reference.geometry import Geometry
from adaattn_reference.view import ProblemViews

BACKEND = NumpyBackend()

SHAPES = [
    (1000, 1000, Mask.causal()),
    (777, 1500, Mask.causal("bottom_right")),
    (1500, 777, Mask.causal("bottom_right")),
    (1500, 777, Mask.causal("top_left")),
    (900, 1100, Mask.none()),
    (130, 2050, Mask.none()),
    (640, 640, Mask.key_lengths([601])),
]


def problem(len_q: int, len_kv: int, mask: Mask, seed: int = 0) -> AttentionProblem:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((1, 2, len_q, 32), np.float32)
    k = rng.standard_normal((1, 1, len_kv, 32), np.float32)
    v = rng.standard_normal((1, 1, len_kv, 24), np.float32)
    return AttentionProblem.from_arrays(q, k, v, mask=mask)


def whole(p: AttentionProblem):
    oracle = exact_attention(p)
    return oracle.out, oracle.lse


def run(p: AttentionProblem, **fields: object):
    structure = Landmark(group=512, **fields)  # type: ignore[arg-type]
    return BACKEND.run(p, Plan.uniform(p, HeadPlan(structure=structure), seed=3))


@pytest.mark.parametrize(("len_q", "len_kv", "mask"), SHAPES)
@pytest.mark.parametrize("screen_rank", [0, 16])
def test_all_keys_as_landmarks_is_dense(len_q, len_kv, mask, screen_rank):
    p = problem(len_q, len_kv, mask)
    raw = run(p, tau=0.0, samples=512, screen_rank=screen_rank)
    exact, lse = whole(p)
    assert relative_frobenius(raw.out, exact) < 1e-6
    seen = np.isfinite(lse)
    rounding = 16 * np.finfo(np.float32).eps * np.abs(lse[seen]).max()
    np.testing.assert_allclose(raw.lse[seen], lse[seen], rtol=0, atol=rounding)
    assert np.array_equal(np.isfinite(raw.lse), seen)
    assert raw.facts[0, 0].share == pytest.approx(1.0, abs=0.07)


@pytest.mark.parametrize(("len_q", "len_kv", "mask"), SHAPES)
@pytest.mark.parametrize("fitted", [True, False])
def test_every_key_is_counted_once(len_q, len_kv, mask, fitted):
    """With equal scores every pool is exact, so one doubled or lost key would show."""
    p = problem(len_q, len_kv, mask)
    p.query[...] = 0
    raw = run(p, tau=0.5, band=64, fitted=fitted)
    exact, lse = whole(p)
    seen = np.isfinite(lse)
    rounding = 64 * np.finfo(np.float32).eps * np.abs(lse[seen]).max()
    np.testing.assert_allclose(raw.lse[seen], lse[seen], rtol=0, atol=rounding)
    assert relative_frobenius(raw.out, exact) < 0.2
    assert raw.facts[0, 0].share < 0.9 or len_q <= 640


def test_probes_of_a_fitted_structure_serve_no_other():
    """A run after measuring gives what a run alone gives, whatever was measured."""
    p = problem(900, 1100, Mask.none())
    measured = Landmark(group=512, tau=0.5, band=64)
    counted = dataclasses.replace(measured, fitted=False)
    request = MeasureRequest(
        rows=0.95, structures=(measured,), enough_error=0.0, formats=(), spectrum=False, seed=3
    )
    _, workspace = BACKEND.measure(p, request)
    plans = [Plan.uniform(p, HeadPlan(structure=s), seed=3) for s in (measured, counted)]
    fitted, after = (BACKEND.run(p, plan, workspace=workspace).out for plan in plans)
    alone = BACKEND.run(p, plans[1]).out
    assert np.array_equal(after, alone)
    assert not np.array_equal(after, fitted)


def test_pools_beat_dropping_and_more_landmarks_beat_fewer():
    p = problem(1500, 1500, Mask.causal(), seed=5)
    exact, _ = whole(p)
    error = {
        (tau, pool): relative_frobenius(run(p, tau=tau, pool=pool, tail=0).out, exact)
        for tau in (0.5, 0.1)
        for pool in (0, 64)
    }
    assert error[0.5, 64] < error[0.5, 0]
    assert error[0.1, 64] < error[0.5, 64]


def test_tail_rows_are_exact():
    p = problem(1000, 1000, Mask.causal())
    raw = run(p, tau=0.5)
    exact, _ = whole(p)
    assert relative_frobenius(raw.out[:, :, -128:], exact[:, :, -128:]) < 1e-6
    assert relative_frobenius(raw.out[:, :, :-192], exact[:, :, :-192]) > 1e-3


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.floats(0, 0.9))
def test_landmark_count_leaves_at_most_tau(seed, clusters, tau):
    mass = np.random.default_rng(seed).dirichlet(np.full(300, 0.05), clusters) * 0.7
    probe = GroupProbe([], np.empty((clusters, 0), np.int64), np.empty((clusters, 0)), mass)
    count = probe.landmark_count(tau)
    assert count % 64 == 0 or count == 300

    def left(keys):
        return np.mean([m.sum() - m[probe.heaviest(c, keys)].sum() for c, m in enumerate(mass)])

    rounding = 300 * np.finfo(mass.dtype).eps  # of a sum of masses, in any order
    assert left(count) <= tau + rounding
    if count > 64:
        assert left(count - 64) > tau - rounding  # no fewer would do


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 100))
def test_heaviest_keys_are_as_many_as_asked_for(seed, count):
    mass = np.random.default_rng(seed).integers(0, 4, (1, 100)).astype(np.float32)  # many ties
    probe = GroupProbe([], np.empty((1, 0), np.int64), np.empty((1, 0)), mass)
    chosen = probe.heaviest(0, count)
    assert len(chosen) == count
    assert (np.diff(chosen) > 0).all()
    others = np.delete(mass[0], chosen)
    assert mass[0, chosen].min(initial=np.inf) >= others.max(initial=-np.inf)


def test_far_mass_leaves_out_near_keys():
    p = problem(512, 512, Mask.causal())

    view = ProblemViews(p)[0, 0]
    geometry = Geometry.of(view, Landmark(group=512, band=64))
    assert geometry is not None
    rows = np.array([[10, 200], [450, 300]])
    weights = np.full((4, 512), 1 / 512, np.float32)
    start, stop = (x[..., None] for x in geometry.near_of_rows(rows))
    keys = np.arange(512)
    expected = ((keys < start) | (keys >= stop)).mean(axis=1) / 512
    np.testing.assert_allclose(far_mass(weights, rows, geometry), expected, atol=1e-7)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_values_of_any_size(size):
    """Sums without a maximum must neither overflow nor vanish."""
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((3, 1, 1, 1000, 32), dtype=np.float32)
    value = (size * v).astype(np.float32)
    small, usual = (
        AttentionProblem.from_arrays(q, k, x, mask=Mask.causal()) for x in (value, v)
    )
    assert relative_frobenius(run(small).out / np.float32(size), run(usual).out) < 1e-6


@pytest.mark.parametrize("pv", ["bf16", "f16", "e4m3", "i8"])
def test_rounded_weights_stay_below_one(pv):
    """Formats of P are scaled for weights in [0, 1], however large the scores."""
    rng = np.random.default_rng(4)
    q, k, v = rng.standard_normal((3, 1, 1, 1000, 32), dtype=np.float32)
    p = AttentionProblem.from_arrays(3 * q, k, v, mask=Mask.causal())
    structure = Landmark(band=1024, group=512, screen_rank=0)  # every key is near
    out = BACKEND.run(p, Plan.uniform(p, HeadPlan(structure=structure, qk="bf16", pv=pv))).out
    naive = BACKEND.run(p, Plan.uniform(p, HeadPlan(qk="bf16", pv=pv))).out
    exact, _ = whole(p)
    error, known = (relative_frobenius(x, exact) for x in (out, naive))
    assert error <= 2 * known
