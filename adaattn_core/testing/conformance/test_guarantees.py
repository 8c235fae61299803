"""Guarantees at the front door: theorems never fail, samples as rarely as they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, target
from hypothesis import strategies as st
from scipy.stats import binom

from adaattn_core.budget import ErrorBudget
from adaattn_core.certificates.data import GUARANTEE_STRENGTH
from adaattn_core.errors import BudgetInfeasibleError, CertificateViolation
from adaattn_core.plan import Plan
from adaattn_core.structure import Landmark
from adaattn_core.testing.kit import (
    Kit,
    absolute_bound,
    assert_certificate_holds,
    head_rows,
)
from adaattn_core.testing.oracles import exact_attention, row_quantile
from adaattn_core.testing.strategies import MaskSpec, ProblemSpec

PROBABILISTIC = ErrorBudget(
    rel=1e300, rows=1.0, confidence=0.99, guarantee="probabilistic", on_violation="report"
)
SAMPLED = ErrorBudget(rel=1e-300, rows=0.9, confidence=0.9, on_violation="report")
"""So tight that no theorem steps in for the sample."""
DRAWS = 80
"""Seeded draws of the rows that certify."""
FALSE_ALARM = 1e-6
"""Probability that the coverage test fails an honest backend, per test."""


@pytest.mark.parametrize("name", ["i8", "e4m3", "e5m2"])
@given(data=st.data())
def test_probabilistic_holds(kit: Kit, name: str, data: st.DataObject) -> None:
    """Stochastic rounding keeps its bound: its confidence leaves no room for a failure here."""
    kit.require(qk=name)
    plan = kit.head(qk=name, rounding="stochastic")
    spec = data.draw(kit.specs(plan))
    seed = data.draw(st.integers(0, 2**31))
    result = kit.certify(spec.build(kit.home.send), plan, PROBABILISTIC, seed=seed)
    for certificate in result.certificate.heads.values():
        assert GUARANTEE_STRENGTH[certificate.guarantee] >= GUARANTEE_STRENGTH["probabilistic"]
        assert certificate.rows == 1
    target(assert_certificate_holds(kit, result, spec.build()), label="error / certified")


@pytest.mark.parametrize(
    ("wide", "narrow"), [("f64", "f32"), ("f32", "tf32"), ("tf32", "bf16"), ("f32", "f16")]
)
@given(data=st.data())
def test_more_bits_never_certify_less(
    kit: Kit, wide: str, narrow: str, data: st.DataObject
) -> None:
    """A format that holds every number of another has no larger worst-case bound.

    The bounds are compared in the output's own unit; 1% is granted for the sizes of rounded
    operands, which may fall on either side of the true ones.
    """
    for name in (wide, narrow):
        kit.require(qk=name, pv=name)
    plans = [kit.head(qk=name, pv=name) for name in (wide, narrow)]
    both = [d for d in ("f64", "f32", "bf16") if all(kit.takes_dtype(d, p) for p in plans)]
    if not both:
        pytest.skip(f"backend {kit.name} takes no input dtype for both {wide} and {narrow}")
    spec = data.draw(kit.specs(plans[0], dtypes=both, values=("normal", "outliers")))
    results = [kit.certify(spec.build(kit.home.send), plan) for plan in plans]
    for index in spec.build().heads():
        first, second = (
            absolute_bound(r.certificate[index].upper, r.facts[index].output_rms)
            for r in results
        )
        assert first <= 1.01 * second, (
            f"head {index}: {wide} {first:.4g} > {narrow} {second:.4g}"
        )


@pytest.mark.parametrize("values", ["normal", "outliers", "needles"])
@pytest.mark.parametrize("kind", ["8-bit", "landmark"])
def test_sampled_covers(kit: Kit, values: str, kind: str) -> None:
    """Over seeded draws, the true quantile is under the certificate as often as stated."""
    kit.sampling()
    if kind == "8-bit":
        eight = [f for f in ("i8", "e4m3") if f in kit.capabilities.qk_formats]
        plan = kit.head(qk=eight[0]) if eight else kit.narrowest()
    else:
        kit.require(structure="landmark")
        far = kit.sized(Landmark(band=64, group=256, samples=16, tau=0.1))
        plan = replace(kit.head(), structure=far)
    spec = ProblemSpec(
        heads_kv=2,
        len_q=256,
        len_kv=256,
        dim_qk=64,
        dim_v=64,
        values=values,
        dtype=kit.dtype(plan),
        mask=MaskSpec(window=(None, 0), alignment="top_left"),
    )
    problem, host = spec.build(kit.home.send), spec.build()
    exact = exact_attention(host)
    covered = dict.fromkeys(host.heads(), 0)
    for seed in range(DRAWS):
        result = kit.certify(problem, plan, SAMPLED, seed=seed)
        out = kit.home.fetch(result.out).astype(np.float64)
        for index in host.heads():
            where = head_rows(host, index)
            certificate = result.certificate[index]
            assert certificate.guarantee == "sampled"
            assert certificate.rows >= SAMPLED.rows
            assert certificate.confidence >= SAMPLED.confidence
            truth = row_quantile(out[where], exact.out[where], SAMPLED.rows)
            covered[index] += truth <= certificate.upper
    for index, count in covered.items():
        chance = float(binom.cdf(count, DRAWS, SAMPLED.confidence))
        assert chance >= FALSE_ALARM / len(covered), (
            f"head {index}: covered {count} of {DRAWS} draws at confidence"
            f" {SAMPLED.confidence}; an honest one does so with probability {chance:.2g}"
        )


def _long_spec(kit: Kit) -> ProblemSpec:
    return ProblemSpec(
        heads_kv=2,
        group=2,
        len_q=640,
        len_kv=640,
        dim_qk=64,
        dim_v=64,
        values="needles",
        dtype=kit.dtype(kit.head()),
        mask=MaskSpec(window=(None, 0), alignment="top_left"),
    )


def test_a_wider_budget_costs_no_more(kit: Kit) -> None:
    """The predicted cost of every head is nonincreasing in the tolerated error."""
    kit.measuring()
    problem = _long_spec(kit).build(kit.home.send)
    previous = dict.fromkeys(problem.heads(), np.inf)
    for rel in (0.003, 0.01, 0.03, 0.1, 0.3):
        budget = ErrorBudget(rel, on_violation="report")
        plan = kit.attend(problem, budget=budget, seed=5).plan
        costs = {i: plan[i].cost_estimate for i in problem.heads()}
        for index, cost in costs.items():
            assert cost <= previous[index] * (1 + 1e-9), f"head {index} at rel={rel}"
        previous = costs


@pytest.mark.parametrize("rel", [0.3, 0.05, 0.01])
def test_escalation_keeps_the_budget(kit: Kit, rel: float) -> None:
    """With ``escalate`` the certificate holds in the end, or the budget is infeasible."""
    kit.sampling()
    problem = _long_spec(kit).build(kit.home.send)
    budget = ErrorBudget(rel)
    try:
        result = kit.attend(problem, budget=budget, seed=1)
    except BudgetInfeasibleError as error:
        if error.facts["best_upper"] <= rel:
            pytest.fail(f"called infeasible, but reached {error.facts['best_upper']:.4g}")
        return
    assert result.certificate.holds(budget)
    assert not result.certificate.violations(budget)


def test_a_theorem_keeps_the_budget(kit: Kit) -> None:
    """A worst-case budget is kept by a theorem for every row, or called infeasible."""
    problem = _long_spec(kit).build(kit.home.send)
    budget = ErrorBudget(1e-3, 1.0, 1.0, "worst_case")
    try:
        result = kit.attend(problem, budget=budget, seed=1)
    except BudgetInfeasibleError as error:
        if error.facts["best_upper"] <= budget.rel:
            pytest.fail(f"called infeasible, but reached {error.facts['best_upper']:.4g}")
        return
    assert result.certificate.holds(budget)
    assert_certificate_holds(kit, result, _long_spec(kit).build())


def test_a_violation_is_raised_or_reported(kit: Kit) -> None:
    """A plan that cannot keep the budget raises with ``raise`` and says so with ``report``."""
    head = kit.narrowest()
    problem = replace(_long_spec(kit), dtype=kit.dtype(head)).build(kit.home.send)
    plan = Plan.uniform(problem, head)
    strict = ErrorBudget(1e-300, 1.0, 1.0, "worst_case", on_violation="raise")
    with pytest.raises(CertificateViolation):
        kit.attend(problem, plan=plan, budget=strict)
    relaxed = replace(strict, on_violation="report")
    result = kit.attend(problem, plan=plan, budget=relaxed)
    assert len(result.certificate.violations(relaxed)) == len(list(problem.heads()))


def test_without_a_budget_attention_is_exact(kit: Kit) -> None:
    """No budget means dense at the input's own precision, and a theorem for it."""
    spec = _long_spec(kit)
    result = kit.attend(spec.build(kit.home.send))
    assert all(p.structure.kind == "dense" for p in result.plan.heads.values())
    assert set(result.certificate.guarantee.ravel()) == {"worst_case"}
    assert_certificate_holds(kit, result, spec.build())
