"""Errors and shares between structures that were tried."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core.policies.fitting import fitted, knob, share_of, tried, with_knob
from adaattn_core.stats import HeadStats, StructureEstimate
from adaattn_core.structure import Dense, Landmark, ScoreSkip


def stats_of(*estimates):
    return HeadStats(4096, 4096, 64, 64, visible=4096 * 4097 // 2, structures=estimates)


def estimate(structure, share, error):
    return StructureEstimate(structure, share, 0, error, error)


powers = st.tuples(st.floats(0.36, 0.99), st.floats(0.05, 0.9), st.floats(0.01, 0.5))


@settings(deadline=None)
@given(powers, st.floats(0.005, 0.2), st.sampled_from([Landmark(), ScoreSkip()]))
def test_power_laws_are_recovered(law, aim, base):
    slope, fall, scale = law
    values = (0.1, 0.02)
    stats = stats_of(
        *(
            estimate(with_knob(base, x), 0.2 * (0.1 / x) ** fall, scale * x**slope)
            for x in values
        )
    )
    found = fitted(stats, type(base), aim)
    assert found is not None
    expected = min((aim / scale) ** (1 / slope), 0.9)
    assert knob(found[0]) == pytest.approx(expected, rel=1e-6)
    assert found[1] == pytest.approx(min(1.0, 0.2 * (0.1 / expected) ** fall), rel=1e-6) or (
        found[1] > 0.2 * (0.1 / expected) ** fall  # never below what the structure must keep
    )


def test_what_no_row_noticed_is_not_fitted():
    """The threshold that a theorem allows errs by nothing: no power law goes through it."""
    safe = estimate(ScoreSkip(lam=1e-6), 0.9, 0.0)
    stats = stats_of(
        estimate(ScoreSkip(lam=0.01), 0.1, 0.2), estimate(ScoreSkip(lam=0.002), 0.15, 0.1), safe
    )
    assert safe not in tried(stats, ScoreSkip)
    found = fitted(stats, ScoreSkip, 0.06)
    assert found is not None
    assert 2e-4 < knob(found[0]) < 0.002
    assert 0.15 < found[1] < 0.3


def test_nothing_tried_nothing_fitted():
    assert fitted(stats_of(), Landmark, 0.1) is None
    assert 0 < share_of(Landmark(), stats_of()) < 1
    with pytest.raises(TypeError, match="dense has no knob"):
        knob(Dense())


@pytest.mark.parametrize("aim", [5e-324, 1e-300, 1e300, 1.7e308])
@pytest.mark.parametrize("kind", [Landmark, ScoreSkip])
def test_budgets_at_the_ends_of_float64_are_fitted(aim, kind):
    name = "lam" if kind is ScoreSkip else "tau"
    stats = stats_of(*(estimate(kind(**{name: x}), 0.1, 0.3 * x) for x in (0.2, 0.1)))
    structure, share = fitted(stats, kind, aim)
    assert 0 < knob(structure) <= 0.9
    assert 0 < share <= 1


def test_estimates_without_a_logarithm_say_nothing():
    """Exact rows of zeros make every error infinite: no power goes through that."""
    loose, tight = Landmark(tau=0.3), Landmark(tau=0.1)
    lost = stats_of(estimate(loose, 0.1, math.inf), estimate(tight, 0.2, math.inf))
    assert fitted(lost, Landmark, 0.05) is None
    assert 0 < share_of(tight, lost) <= 1
    for odd in (estimate(loose, 0.0, 0.5), estimate(loose, 0.1, math.nan)):
        found = fitted(stats_of(odd, estimate(tight, 0.2, 0.1)), Landmark, 0.05)
        assert found is not None
        assert 0 < found[1] <= 1
