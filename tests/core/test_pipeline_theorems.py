"""Sampled budgets on a backend that measures nothing: certified by theorem, or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from adaattn_core import Dense, ErrorBudget, Landmark, Mask, attention
from adaattn_core.backend import Backend, Capabilities, Measures
from adaattn_core.errors import BudgetInfeasibleError, CertificateViolation, UnsupportedError
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.policies.base import PolicyContext
from adaattn_core.policies.budget import BudgetPolicy
from adaattn_core.policies.entropy import EntropyPolicy
from adaattn_core.policies.fixed import FixedPolicy
from adaattn_core.problem import AttentionProblem
from adaattn_core.stats import MeasureRequest
from adaattn_core.testing.oracles import exact_attention, row_quantile
from adaattn_reference.backend import NumpyBackend

FORMATS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}


class Blind:
    """The NumPy backend with native 16-bit formats and without measurements."""

    name = "blind"

    def __init__(self, *, structures: tuple[str, ...] = ("dense",)) -> None:
        self.inner = NumpyBackend()
        self.structures = structures
        self.ran: list[Plan] = []

    def capabilities(self) -> Capabilities:
        formats = ("bf16", "f16", "tf32", "f32")
        return replace(
            self.inner.capabilities(),
            qk_formats=formats,
            pv_formats=formats,
            structures=self.structures,
            target="sm90",
            emulated_formats=(),
        )

    def provenance(self) -> dict[str, str]:
        return self.inner.provenance()

    def run(self, problem: AttentionProblem, plan: Plan, **options: Any) -> Any:
        self.ran.append(plan)
        return self.inner.run(problem, plan, **options)


def draw(dtype: str = "f32", magnitude: float = 1.0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(5)
    shapes = ((1, 2, 96, 32), (1, 1, 128, 32), (1, 1, 128, 16))
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    return tuple(x.astype(FORMATS[dtype]) for x in (magnitude * q, magnitude * k, v))


@pytest.mark.parametrize("policy", [None, BudgetPolicy(), EntropyPolicy()])
@pytest.mark.parametrize("dtype", sorted(FORMATS))
def test_theorems_serve_a_sampled_budget(dtype: str, policy: Any) -> None:
    backend, budget = Blind(), ErrorBudget(rel=0.1)
    q, k, v = draw(dtype)
    result = attention(
        q, k, v, mask=Mask.causal("bottom_right"), budget=budget, policy=policy, backend=backend
    )
    assert isinstance(backend, Backend)
    assert result.certificate.holds(budget)
    assert set(result.certificate.guarantee.ravel()) == {"worst_case"}
    assert {(h.structure, h.qk, h.pv) for h in result.plan.heads.values()} == {
        (Dense(), dtype, dtype)
    }
    assert result.provenance["escalated"] == {}
    problem = AttentionProblem.from_arrays(q, k, v, mask=Mask.causal("bottom_right"))
    exact = exact_attention(problem).out
    for index in problem.heads():
        worst = row_quantile(result.out[index], exact[index], 1.0)
        assert worst <= result.certificate[index].upper


class Curious(BudgetPolicy):
    """Asks for measurements of a backend that offers none."""

    def request(self, context: PolicyContext) -> MeasureRequest | None:
        return super().request(replace(context, measures=True))


def test_a_policy_that_measures_is_told_so() -> None:
    backend = Blind(structures=("landmark",))
    assert not isinstance(backend, Measures)
    with pytest.raises(UnsupportedError, match='backend "blind", which measures nothing'):
        attention(
            *draw(), budget=0.1, policy=Curious(), backend=Blind(structures=("landmark",))
        )


class Counting(Blind):
    """Counts how often it is asked what it can do."""

    asked = 0

    def capabilities(self) -> Capabilities:
        self.asked += 1
        return super().capabilities()


def test_capabilities_are_asked_for_once_a_call() -> None:
    backend = Counting()
    attention(*draw(), budget=0.01, policy=FixedPolicy(qk="bf16", pv="bf16"), backend=backend)
    with pytest.raises(BudgetInfeasibleError):
        attention(*draw("bf16"), budget=ErrorBudget(rel=1e-6), backend=backend)
    assert backend.asked == 2


def test_narrow_formats_climb_to_wider_ones() -> None:
    # Larger scores: rounding operands to bf16 costs more than the budget, f32 does not.
    backend, budget = Blind(), ErrorBudget(rel=0.01)
    narrow = FixedPolicy(qk="bf16", pv="bf16")
    result = attention(*draw(magnitude=3.0), budget=budget, policy=narrow, backend=backend)
    assert result.certificate.holds(budget)
    for head in ((0, 0), (0, 1)):
        assert result.plan[head].qk in ("tf32", "f32")
        assert result.provenance["escalated"][f"{head[0]},{head[1]}"]
    assert len(backend.ran) > 1


def test_structures_that_no_theorem_bounds_go_straight_to_dense() -> None:
    backend = Blind(structures=("dense", "landmark"))
    budget = ErrorBudget(rel=0.1)
    far = FixedPolicy(Landmark(tau=0.5, band=16, tile=16, pool=16, group=64, samples=8, tail=0))
    result = attention(
        *draw(), mask=Mask.causal("bottom_right"), budget=budget, policy=far, backend=backend
    )
    assert result.certificate.holds(budget)
    assert [plan[0, 0].structure.kind for plan in backend.ran] == ["landmark", "dense"]


def test_beyond_the_theorems_the_error_names_the_way_out() -> None:
    with pytest.raises(BudgetInfeasibleError) as caught:
        attention(*draw("bf16"), budget=ErrorBudget(rel=1e-6), backend=Blind())
    text = str(caught.value)
    assert 'backend "blind", which samples no rows' in text
    assert 'backend="numpy"' in text
    assert "sampled guarantee" not in text, "the caller has asked for one already"
    assert 1e-6 < caught.value.best_upper < 0.1


def test_report_and_raise_do_what_they_say() -> None:
    strict = ErrorBudget(rel=1e-6, on_violation="report")
    result = attention(*draw("bf16"), budget=strict, backend=Blind())
    assert not result.certificate.holds(strict)
    assert (result.certificate.upper < 0.1).all()
    with pytest.raises(CertificateViolation):
        attention(*draw("bf16"), budget=replace(strict, on_violation="raise"), backend=Blind())


def test_a_given_plan_is_held_against_the_budget() -> None:
    q, k, v = draw("bf16")
    problem = AttentionProblem.from_arrays(q, k, v)
    plan = Plan.uniform(problem, HeadPlan(qk="bf16", pv="bf16"))
    budget = ErrorBudget(rel=0.1)
    result = attention(q, k, v, plan=plan, budget=budget, backend=Blind())
    assert result.certificate.holds(budget)
    assert dict(result.plan.heads) == dict(plan.heads)


class Unshifted(Blind):
    """A backend that adds masks as they are, as a device may: their size costs accuracy."""

    def run(self, problem: AttentionProblem, plan: Plan, **options: Any) -> Any:
        raw = super().run(problem, plan, **options)
        largest = float(np.abs(problem.mask.bias).max())
        raw.facts = {i: replace(f, bias_max_abs=largest) for i, f in raw.facts.items()}
        return raw


@pytest.mark.parametrize(
    ("do", "error"),
    [("escalate", BudgetInfeasibleError), ("raise", CertificateViolation)],
)
@pytest.mark.parametrize("size", [1e6, 3e38])
def test_the_error_names_a_mask_that_is_to_blame(do: str, error: type, size: float) -> None:
    bias = np.full((96, 128), -size, np.float32)
    budget = ErrorBudget(rel=0.1, on_violation=do)
    with pytest.raises(error) as caught:
        attention(*draw(), mask=Mask.additive(bias), budget=budget, backend=Unshifted())
    assert f"the additive mask is to blame: it adds up to {size:.3g}" in str(caught.value)
    assert "Mask.boolean" in str(caught.value)
    tight = replace(budget, rel=1e-7)
    with pytest.raises(error) as caught:
        attention(*draw(), mask=Mask.additive(bias), budget=tight, backend=Unshifted())
    assert "to blame" not in str(caught.value), "without a mask it would be missed as well"
