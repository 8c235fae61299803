"""Tables of a policy, and what the planning kernels take of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from adaattn_core.backend import Capabilities
from adaattn_core.budget import ErrorBudget
from adaattn_core.costs import COST_MODELS
from adaattn_core.plan import HeadPlan
from adaattn_core.policies import BudgetPolicy, EntropyPolicy
from adaattn_core.policies.base import PolicyContext
from adaattn_core.policies.table import Candidate, DecisionTable
from adaattn_core.stats import HeadStats
from adaattn_core.structure import Landmark, LowRank, Structure
from adaattn_cuda.adaptive import SIZES
from adaattn_cuda.planner.levels import table_refusal


def table(*structures: Structure, qk: str = "bf16", fallback: str = "bf16") -> DecisionTable:
    plans = [HeadPlan(structure=structure, qk=qk, pv="bf16") for structure in structures]
    return DecisionTable(
        tuple(Candidate(plan, fixed=0.1, slope=1.0) for plan in plans),
        HeadPlan(qk=fallback, pv=fallback),
        aim=0.05,
        escalation_aim=0.03,
        worthwhile=0.9,
    )


def levels(*taus: float, size: Landmark = SIZES[1]) -> list[Structure]:
    return [replace(size, tau=tau) for tau in taus]


def test_levels_from_the_most_landmarks_to_the_fewest_are_taken() -> None:
    assert table_refusal(table(), "bf16", SIZES) == ""
    for size in SIZES:
        assert table_refusal(table(*levels(0.001, 0.02, 0.9, size=size)), "bf16", SIZES) == ""


@pytest.mark.parametrize("policy", [BudgetPolicy(), EntropyPolicy()])
@pytest.mark.parametrize("length", [8192, 32_768, 131_072])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_policies_own_tables_are_taken(policy: Any, length: int, dim: int) -> None:
    formats = ("f16", "bf16", "f32")
    can = Capabilities(formats, formats, ("dense", "landmark"), ("cuda",), "sm90", sizes=SIZES)
    head = HeadStats(length, length, dim, dim, length * (length + 1) // 2)
    shapes = {(0, h): head for h in range(27)}
    context = PolicyContext(
        ErrorBudget(0.1), can, COST_MODELS["sm90"], "bf16", True, shapes, 0.125, 0,
        prefix=frozenset({0}),
    )  # fmt: skip
    found = policy.compile(context)
    assert found is not None
    assert found.candidates or length < 32_768
    assert table_refusal(found, "bf16", SIZES) == ""


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (table(*levels(0.2, 0.01)), "most to the fewest"),
        (table(*levels(0.01), *levels(0.2, size=SIZES[0])), "other sizes"),
        (table(*levels(0.01, size=replace(SIZES[0], band=128))), "other sizes"),
        (table(*levels(0.01, size=replace(SIZES[0], fitted=False))), "other sizes"),
        (table(LowRank(8)), "low_rank"),
        (table(*levels(0.01), qk="i8"), "i8"),
        (table(*levels(0.01), fallback="f32"), "f32"),
    ],
)
def test_other_tables_are_refused_by_name(given: DecisionTable, reason: str) -> None:
    assert reason in table_refusal(given, "bf16", SIZES)
