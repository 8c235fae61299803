"""A backend that plans on its device: one call, nothing read until somebody looks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from adaattn_core import ErrorBudget, Mask, attention, get_backend
from adaattn_core.backend import BACKEND_PARTS, Backend
from adaattn_core.certificates.data import HeadCertificate
from adaattn_core.deciding import Adapted, Decides, Repeats
from adaattn_core.errors import BudgetInfeasibleError, CertificateViolation
from adaattn_core.lazy import Later, LazyHeads, LazyNotes
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.policies import BudgetPolicy
from adaattn_core.stats import HeadStats


class OnDevice:
    """The NumPy backend behind the contract of one that decides on a device."""

    name = "pretending"

    def __init__(self, upper: float = 0.05, refuses: str = "") -> None:
        self.inner, self.upper, self.refuses = get_backend("numpy"), upper, refuses
        self.looks: list[str] = []
        self.seeds: list[int | None] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def decides(self) -> Any:
        return self.inner.capabilities()

    def adapt(
        self, problem: Any, table: Any, budget: Any, *, seed: int | None, profile: bool = False
    ) -> Adapted | str:
        if self.refuses:
            return self.refuses
        self.seeds.append(seed)
        plan = Plan.uniform(problem, HeadPlan(reason="on the device"))
        raw = self.inner.run(problem, plan)

        def look(what: str, value: Any) -> Any:
            def make() -> Mapping[Any, Any]:
                self.looks.append(what)
                return dict.fromkeys(problem.heads(), value)

            return LazyHeads(make)

        sentence = HeadCertificate("sampled", self.upper, budget.rows, budget.confidence)
        size = HeadStats(len_q=1, len_kv=1, dim_qk=1, dim_v=1, visible=1)
        return Adapted(
            raw=raw,
            seed=7 if seed is None else seed,
            plans=look("plan", HeadPlan(reason="on the device")),
            certificates=look("certificate", sentence),
            stats=look("stats", size),
            notes={"planned_on": "device", "escalated": Later(lambda: {})},
        )


@pytest.fixture
def arrays() -> Any:
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, 1, 2, 64, 16), dtype=np.float32)


def test_nothing_is_read_until_somebody_looks(arrays: Any) -> None:
    backend = OnDevice()
    assert isinstance(backend, Decides)
    result = attention(*arrays, mask=Mask.causal(), budget=0.1, backend=backend)
    assert backend.looks == []
    assert result.plan.policy == "budget"
    assert result.provenance["planned_on"] == "device"
    assert backend.looks == []
    assert (result.certificate.upper == 0.05).all()
    assert result.plan[0, 1].reason == "on the device"
    assert result.certificate.upper.shape == (1, 2)
    assert backend.looks == ["certificate", "plan"]


def test_a_seed_is_passed_on_only_if_it_was_given(arrays: Any) -> None:
    backend = OnDevice()
    drawn = attention(*arrays, budget=0.1, backend=backend)
    given = attention(*arrays, budget=0.1, backend=backend, seed=3)
    assert backend.seeds == [None, 3]
    assert (drawn.plan.seed, drawn.provenance["seed"]) == (7, 7)
    assert (given.plan.seed, given.provenance["seed"]) == (3, 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"budget": ErrorBudget(0.1, guarantee="worst_case", rows=1.0, confidence=1.0)},
            "worst",
        ),
        (
            {"policy": type("Own", (BudgetPolicy,), {"decide": BudgetPolicy.decide})()},
            "compile",
        ),
    ],
)
def test_other_guarantees_and_policies_go_the_host_way(
    arrays: Any, change: dict[str, Any], reason: str
) -> None:
    backend = OnDevice()
    result = attention(*arrays, backend=backend, **({"budget": 0.1} | change))
    assert backend.seeds == []
    assert reason in result.provenance["planned_on_host"]


def test_a_kept_table_knows_neither_layer_nor_seed(arrays: Any) -> None:
    """One table serves every call of these sizes: what it depended on would be another's."""
    seen: list[tuple[str, int]] = []

    def compile_by_layer(self: BudgetPolicy, context: Any) -> Any:
        seen.append((context.layer, context.seed))
        return BudgetPolicy.compile(self, context)

    policy = type("ByLayer", (BudgetPolicy,), {"compile": compile_by_layer})()
    for layer in ("first", "second"):
        attention(
            *arrays, budget=0.1, policy=policy, backend=OnDevice(), layer=layer, seed=len(layer)
        )
    assert seen == [("", 0)]


def test_a_refusal_goes_the_host_way_and_is_named(arrays: Any) -> None:
    backend = OnDevice(refuses="dtype f32: planned on the device in 16-bit formats only")
    result = attention(*arrays, budget=0.1, backend=backend)
    assert result.provenance["planned_on_host"].startswith("dtype f32")
    assert result.certificate.holds(ErrorBudget(0.1))


def test_a_missed_budget_is_raised_where_it_is_looked_at(arrays: Any) -> None:
    result = attention(*arrays, budget=0.1, backend=OnDevice(upper=0.2))
    with pytest.raises(BudgetInfeasibleError, match=r"upper 0\.2"):
        _ = result.certificate.upper
    reported = ErrorBudget(0.1, on_violation="report")
    result = attention(*arrays, budget=reported, backend=OnDevice(upper=0.2))
    assert (result.certificate.upper == 0.2).all()


def test_who_wants_to_be_stopped_is_stopped_at_once(arrays: Any) -> None:
    budget = ErrorBudget(0.1, on_violation="raise")
    with pytest.raises(CertificateViolation):
        attention(*arrays, budget=budget, backend=OnDevice(upper=0.2))


def test_a_plan_leaves_nothing_to_decide(arrays: Any) -> None:
    backend = OnDevice()
    first = attention(*arrays, budget=0.1, backend=backend)
    attention(*arrays, plan=first.plan, backend=backend)
    assert len(backend.seeds) == 1


class Repeating(OnDevice):
    """One that also runs given plans on its device."""

    def repeat(self, problem: Any, plan: Plan, budget: Any, *, profile: bool = False) -> Any:
        return self.adapt(problem, None, budget, seed=plan.seed, profile=profile)


def test_a_given_plan_is_repeated_on_the_device(arrays: Any) -> None:
    backend = Repeating()
    assert isinstance(backend, Repeats)
    heads = {(0, h): HeadPlan(reason="decided before") for h in range(2)}
    plan = Plan(heads, seed=9, policy="budget", target="sm90", layer="a")
    result = attention(*arrays, budget=0.1, backend=backend, plan=plan)
    assert backend.seeds == [9]
    found = result.plan
    assert (found.seed, found.policy, found.target, found.layer) == (9, "budget", "sm90", "a")
    assert (result.certificate.upper == 0.05).all()
    without = attention(*arrays, backend=backend, plan=plan)  # nothing to certify by rows
    assert backend.seeds == [9]
    assert without.certificate.guarantee[0, 0] == "worst_case"


def test_a_plan_that_the_device_does_not_repeat_goes_the_host_way(arrays: Any) -> None:
    backend = Repeating(refuses="formats")
    plan = Plan({(0, h): HeadPlan() for h in range(2)}, seed=9)
    result = attention(*arrays, budget=0.1, backend=backend, plan=plan)
    assert result.provenance["planned_on_host"] == "formats"
    assert (result.certificate.upper <= 0.1).all()


def test_notes_resolve_once_and_only_when_read() -> None:
    calls: list[int] = []
    notes = LazyNotes({"now": 1, "later": Later(lambda: calls.append(1) or len(calls))})
    assert notes["now"] == 1
    assert not calls
    assert (notes["later"], notes["later"]) == (1, 1)
    assert dict(notes) == {"now": 1, "later": 1}


def test_the_parts_of_a_backend_are_those_of_the_protocol() -> None:
    declared = {*Backend.__annotations__, *(n for n in vars(Backend) if not n.startswith("_"))}
    assert declared == set(BACKEND_PARTS)
