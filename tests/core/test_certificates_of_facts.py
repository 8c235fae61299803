"""Certificates of stated facts and of samples, at the edges too; nothing runs."""

import math
import sys
from dataclasses import fields, replace

import numpy as np
import pytest

from adaattn_core.certificates.data import Certificate
from adaattn_core.certificates.sample import sampled_certificate
from adaattn_core.certificates.theorem import theorem_certificate
from adaattn_core.errors import ArgumentError
from adaattn_core.facts import Arithmetic, RowErrors, RunFacts
from adaattn_core.plan import HeadPlan
from adaattn_core.structure import BlockSparse, Dense, Landmark, LowRank

EXACT = {
    "query_residual_upper": 0.0,
    "key_residual_upper": 0.0,
    "value_residual_upper": 0.0,
    "score_residual_upper": 0.0,
    "dropped_mass_upper": 0.0,
    "bias_max_abs": 0.0,
}
"""Facts of a run that rounded no operand and left nothing out."""
FACTS = RunFacts(
    **EXACT,
    query_norm_upper=3.0,
    key_norm_upper=3.0,
    value_norm_upper=2.0,
    value_diameter_upper=1.0,
    keys_max=100,
    output_rms=1.0,
)
SIZES = {"dim_qk": 8, "dim_v": 8, "scale": 0.5, "dtype": "f32", "len_q": 10}


@pytest.mark.parametrize(
    ("facts", "plan"),
    [
        (replace(FACTS, nonfinite=True), HeadPlan()),
        (replace(FACTS, output_rms=0.0), HeadPlan()),
        (replace(FACTS, query_norm_upper=math.inf), HeadPlan()),
        (replace(FACTS, query_norm_upper=math.nan), HeadPlan()),
        (replace(FACTS, value_norm_upper=math.nan), HeadPlan()),
        (replace(FACTS, query_norm_upper=1e20, key_norm_upper=1e20), HeadPlan()),
        (replace(FACTS, bias_max_abs=3e38), HeadPlan()),
        (replace(FACTS, dropped_mass_upper=math.inf), HeadPlan(structure=BlockSparse())),
        (replace(FACTS, share=0.5), HeadPlan(structure=Landmark())),
        (FACTS, HeadPlan(pv="e4m3", p_scale=1e-4)),
    ],
)
def test_what_no_theorem_bounds_is_infinite(facts, plan):
    certificate = theorem_certificate(facts, plan, **SIZES)
    assert certificate.upper == math.inf
    assert certificate.nonfinite == facts.nonfinite


@pytest.mark.parametrize(
    ("facts", "len_q"),
    [
        (RunFacts.of_nothing(), 0),
        (FACTS, 0),
        (replace(FACTS, keys_max=0, output_rms=0.0), 10),
        (
            replace(FACTS, value_norm_upper=0.0, value_diameter_upper=0.0, output_rms=0.0),
            10,
        ),
    ],
)
def test_heads_that_must_be_exactly_right_have_bound_zero(facts, len_q):
    for plan in (HeadPlan(), HeadPlan(qk="i8", pv="e4m3"), HeadPlan(structure=Dense())):
        certificate = theorem_certificate(facts, plan, **{**SIZES, "len_q": len_q})
        assert certificate.upper == 0
        assert all(term == 0 for term in certificate.terms.values())


@pytest.mark.parametrize("field", [f.name for f in fields(RunFacts) if f.default == math.inf])
def test_what_a_backend_does_not_state_is_not_known(field):
    known = replace(FACTS, sink_abs=1.0)
    said = {f.name: getattr(known, f.name) for f in fields(RunFacts) if f.name != field}
    asked = {**SIZES, "sinks": True}
    certificate = theorem_certificate(RunFacts(**said), HeadPlan(), **asked)
    # Twice the norm bounds the diameter, and the diameter what scores can do.
    bounded = field in ("value_diameter_upper", "score_residual_upper", "sink_abs")
    assert (certificate.upper < math.inf) == bounded
    assert certificate.upper > theorem_certificate(known, HeadPlan(), **asked).upper


def test_score_rules_are_charged_where_there_are_any():
    """A cap and its tanh's error, a sink and its size: each makes the bound larger."""
    facts = replace(FACTS, sink_abs=3.0)

    def upper(said=facts, **question):
        return theorem_certificate(said, HeadPlan(), **SIZES, **question).upper

    plain = upper()
    assert plain == upper(replace(FACTS, sink_abs=math.inf)), "nobody asked for a sink"
    assert plain < upper(softcap=2.0) < upper(softcap=2.0, sinks=True)
    rough = replace(facts, arithmetic=replace(facts.arithmetic, tanh_upper=2.0**-11))
    assert upper(softcap=2.0) < upper(rough, softcap=2.0) < upper(rough, softcap=50.0)
    assert upper(rough) == plain
    assert plain < upper(sinks=True) < upper(replace(facts, sink_abs=3e4), sinks=True)
    # The diameter of values that all lie to one side of 0 is no bound with a sink.
    near = replace(facts, value_diameter_upper=1e-6 * facts.value_norm_upper)
    far = replace(facts, value_diameter_upper=facts.value_norm_upper)
    assert upper(near) < upper(near, sinks=True) == upper(far, sinks=True)


@pytest.mark.parametrize("field", ["score_rel_upper", "sum_rel_upper", "exp_rel_upper"])
@pytest.mark.parametrize("plan", [HeadPlan(), HeadPlan(qk="bf16", pv="bf16")])
def test_what_a_backend_states_of_its_arithmetic_is_charged(field, plan):
    """Every stated error counts, once, as theorem 7 says; a larger one counts more."""
    uppers = []
    for error in (2.0**-20, 2.0**-12, 2.0**-6):
        stated = replace(FACTS, arithmetic=Arithmetic(**{field: error}))
        certificate = theorem_certificate(stated, plan, **SIZES)
        uppers.append(certificate.terms["accumulation"])
        assert (
            uppers[-1]
            >= {
                "score_rel_upper": math.tanh(error * 0.5 * 9 / 2),
                "sum_rel_upper": error * 2.0,
                "exp_rel_upper": math.tanh(error / 2),
            }[field]
        )
    assert uppers == sorted(set(uppers))


def test_shorter_steps_and_longer_sums_cost_more():
    def upper(**said):
        facts = replace(FACTS, keys_max=4096, arithmetic=Arithmetic(**said))
        return theorem_certificate(facts, HeadPlan(), **SIZES).upper

    assert upper(step_keys=1024) < upper(step_keys=64) == upper() < upper(step_keys=16)
    assert upper(sum_keys_max=256) < upper(sum_keys_max=1024) < upper()


def test_a_probabilistic_bound_holds_the_kernels_own_charges():
    """Steps say nothing about sums: what the arithmetic errs by is added all the same."""
    plan = HeadPlan(qk="i8", pv="f32", rounding="stochastic")
    facts = replace(
        FACTS,
        query_residual_upper=0.05,
        key_residual_upper=0.05,
        query_step_upper=0.01,
        key_step_upper=0.01,
        arithmetic=Arithmetic(score_rel_upper=0.01),
    )
    options = SIZES | {"guarantee": "probabilistic"}
    likely = theorem_certificate(facts, plan, **options)
    assert likely.guarantee == "probabilistic"
    charge = math.tanh(0.01 * 0.5 * 9 / 2)
    without = theorem_certificate(replace(facts, arithmetic=Arithmetic()), plan, **options)
    assert likely.upper >= without.upper + 0.9 * charge


def test_a_probabilistic_bound_that_says_nothing_gives_way_to_the_worst_case():
    """Both score errors saturate theorem 1: the sentence without a confidence is stronger."""
    facts = replace(
        FACTS,
        query_norm_upper=1e6,
        query_residual_upper=1e4,
        key_residual_upper=1e4,
        query_step_upper=10.0,
        key_step_upper=10.0,
    )
    plan = HeadPlan(qk="i8", rounding="stochastic")
    certificate = theorem_certificate(
        facts, plan, **SIZES, guarantee="probabilistic", confidence=0.95
    )
    assert (certificate.guarantee, certificate.confidence) == ("worst_case", 1.0)


def test_a_halved_bound_is_caught_on_an_attaining_head():
    """Two keys, scores perturbed by exactly delta: theorem 1 leaves no room."""
    facts = RunFacts(
        **EXACT | {"score_residual_upper": 0.1},
        query_norm_upper=0.0,
        key_norm_upper=0.0,
        value_norm_upper=1.0,
        value_diameter_upper=2.0,
        keys_max=2,
        output_rms=1.0,
    )
    options = {"dim_qk": 1, "dim_v": 1, "scale": 1.0, "dtype": "f64", "len_q": 1}
    plan = HeadPlan(structure=LowRank(1), qk="f64", pv="f64")
    upper = theorem_certificate(facts, plan, **options).upper
    weight = 1 / (1 + math.exp(0.1))
    moved = weight * math.exp(0.1) / (weight * math.exp(0.1) + (1 - weight) * math.exp(-0.1))
    change = 2 * abs(moved - weight)
    assert upper / 2 < change <= upper <= change * (1 + 1e-9)


@pytest.mark.parametrize("field", ["query_residual_upper", "value_residual_upper"])
def test_residuals_enter_the_bound(field):
    base = theorem_certificate(FACTS, HeadPlan(), **SIZES)
    worse = theorem_certificate(replace(FACTS, **{field: 0.1}), HeadPlan(), **SIZES)
    assert worse.upper > base.upper + 0.04


def test_given_blocks_are_not_kept_alive():
    """What a plan is charged is remembered; its list of blocks may hold millions of numbers."""
    plan = HeadPlan(structure=BlockSparse(blocks=((0, 1), (1, 2), (0, 7))))
    blocks = plan.structure.blocks
    known = sys.getrefcount(blocks)
    theorem_certificate(FACTS, plan, **SIZES)
    assert sys.getrefcount(blocks) == known
    del plan
    assert sys.getrefcount(blocks) == known - 1


@pytest.mark.parametrize("guarantee", ["sampled", "none", "certain"])
def test_other_guarantees_are_refused(guarantee):
    with pytest.raises(ArgumentError, match="guarantee"):
        theorem_certificate(FACTS, HeadPlan(), **SIZES, guarantee=guarantee)


# -- samples ------------------------------------------------------------------------------


def row_errors(error, exact_norm=None, oracle=0.0):
    error = np.asarray(error, dtype=np.float64)
    return RowErrors(error, np.ones(error.shape) if exact_norm is None else exact_norm, oracle)


def test_a_sample_gives_its_order_statistic_in_multiples_of_the_rms():
    errors = np.random.default_rng(0).permutation(np.arange(1.0, 94.0))
    facts = replace(FACTS, output_rms=2.0)
    certificate = sampled_certificate(
        row_errors(errors, oracle=0.5), facts, rows=0.95, confidence=0.95, len_q=10**6
    )
    # 93 samples: the second largest (Wilks), 92, plus the oracle's own error.
    assert certificate.upper == pytest.approx(92.5 / 2, rel=1e-12)
    assert certificate.upper >= 92.5 / 2
    assert (certificate.rows, certificate.confidence) == (0.95, 0.95)
    assert certificate.guarantee == "sampled"
    assert certificate.estimate == pytest.approx(math.sqrt(np.mean(errors**2)))


def test_more_rounds_need_a_higher_statistic():
    errors = row_errors(np.arange(1.0, 201.0))
    options = {"rows": 0.95, "confidence": 0.95, "len_q": 10**6}
    uppers = [sampled_certificate(errors, FACTS, **options, rounds=r).upper for r in (1, 2, 4)]
    assert uppers == sorted(uppers)
    assert uppers[0] < uppers[2]
    assert sampled_certificate(errors, FACTS, **options, rounds=4).confidence == 0.95


def test_too_small_a_sample_says_nothing():
    certificate = sampled_certificate(
        row_errors(np.zeros(58)), FACTS, rows=0.95, confidence=0.95, len_q=1000
    )
    assert certificate.upper == math.inf


def test_every_row_evaluated_gives_the_exact_quantile_for_sure():
    errors = row_errors(np.arange(20.0)[::-1], oracle=0.25)
    certificate = sampled_certificate(
        errors, FACTS, rows=0.95, confidence=0.9, len_q=20, complete=True
    )
    assert certificate.upper == pytest.approx(18.25)
    assert certificate.confidence == 1.0
    everyone = sampled_certificate(
        errors, FACTS, rows=1.0, confidence=0.9, len_q=20, complete=True
    )
    assert everyone.upper == pytest.approx(19.25)
    with pytest.raises(ArgumentError, match="complete"):
        sampled_certificate(errors, FACTS, rows=0.9, confidence=0.9, len_q=21, complete=True)


def test_nonfinite_errors_and_outputs_are_never_certified():
    options = {"rows": 0.5, "confidence": 0.9, "len_q": 10**6}
    some = np.ones(100)
    some[:5] = np.nan
    assert sampled_certificate(row_errors(some), FACTS, **options).upper == pytest.approx(1)
    most = np.full(100, np.nan)
    assert sampled_certificate(row_errors(most), FACTS, **options).upper == math.inf
    bad = replace(FACTS, nonfinite=True)
    certificate = sampled_certificate(row_errors(np.zeros(100)), bad, **options)
    assert certificate.upper == math.inf
    assert certificate.nonfinite


def test_zero_outputs_and_empty_heads():
    options = {"rows": 0.5, "confidence": 0.9, "len_q": 10**6}
    silent = replace(FACTS, output_rms=0.0)
    nothing = row_errors(np.zeros(100), np.zeros(100))
    certificate = sampled_certificate(nothing, silent, **options)
    assert (certificate.upper, certificate.estimate) == (0.0, 0.0)
    wrong = sampled_certificate(row_errors(np.ones(100), np.zeros(100)), silent, **options)
    assert (wrong.upper, wrong.estimate) == (math.inf, math.inf)
    empty = sampled_certificate(
        row_errors([]),
        RunFacts.of_nothing(),
        rows=0.95,
        confidence=0.95,
        len_q=0,
        complete=True,
    )
    assert empty.upper == 0
    none = sampled_certificate(row_errors([]), FACTS, rows=0.9, confidence=0.9, len_q=5)
    assert none.upper == math.inf
    assert math.isnan(none.estimate)


def test_sampled_coverage_over_draws_is_at_least_the_confidence():
    """Heavy-tailed row errors, fresh draws: count the false certificates."""
    rng = np.random.default_rng(1)
    population = rng.pareto(1.0, 5000)
    quantile = np.sort(population)[math.ceil(0.95 * 5000) - 1]
    trials, confidence = 1000, 0.9
    false = 0
    for _ in range(trials):
        drawn = population[rng.integers(0, 5000, 100)]
        certificate = sampled_certificate(
            row_errors(drawn), FACTS, rows=0.95, confidence=confidence, len_q=5000
        )
        false += certificate.upper < quantile
    # Hoeffding: more than this many false ones has probability below 1e-6.
    assert false <= trials * (1 - confidence) + math.sqrt(trials * math.log(1e6) / 2)


def test_a_head_without_a_certificate_claims_nothing():
    known = theorem_certificate(FACTS, HeadPlan(), **SIZES)
    found = Certificate({(0, 1): known}, (1, 3))
    assert found.upper[0, 1] == known.upper
    for missing in (0, 2):
        assert found.upper[0, missing] == math.inf
        assert found.rows[0, missing] == found.confidence[0, missing] == 0
        assert found.guarantee[0, missing] == ""
        assert not found.nonfinite[0, missing]
        assert math.isnan(found.estimate[0, missing])
