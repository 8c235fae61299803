"""Dense heads in 8 bits first: when a policy asks for them, and what is launched; no device."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from adaattn_core.backend import Capabilities
from adaattn_core.budget import ErrorBudget
from adaattn_core.costs import COST_MODELS
from adaattn_core.lazy import Later
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.policies import BudgetPolicy
from adaattn_core.policies.base import PolicyContext
from adaattn_core.policies.table import CHOICE, FALLBACK, DecisionTable
from adaattn_core.problem import AttentionProblem
from adaattn_core.stats import HeadStats
from adaattn_core.structure import Landmark
from adaattn_cuda.adaptive import NARROW, SIZES
from adaattn_cuda.planner.frozen import frozen
from adaattn_cuda.planner.layout import CERTIFICATE, DECISION
from adaattn_cuda.planner.levels import table_refusal
from adaattn_cuda.planner.sequence import Packer
from adaattn_cuda.reading import Whole
from adaattn_cuda.work.far import WIDE

BOTH = HeadPlan(qk="i8", pv="e4m3", p_scale=112.0)


def compiled(
    length: int,
    dim: int,
    rel: float,
    *,
    causal: bool = False,
    policy: BudgetPolicy | None = None,
    **options: Any,
) -> DecisionTable:
    formats = ("f16", "bf16", "f32")
    options = {"narrow": NARROW} | options
    can = Capabilities(formats, formats, ("dense",), ("cuda",), "sm90", sizes=SIZES, **options)
    visible = length * (length + 1) // 2 if causal else length**2
    head = HeadStats(length, length, dim, dim, visible)
    context = PolicyContext(
        ErrorBudget(rel), can, COST_MODELS["sm90"], "bf16", True,
        {(0, h): head for h in range(8)}, 0.1, 0, prefix=frozenset({0}),
    )  # fmt: skip
    found = (policy or BudgetPolicy()).compile(context)
    assert found is not None
    assert table_refusal(found, "bf16", SIZES) == ""
    return found


@pytest.mark.parametrize("causal", [False, True])
def test_long_wide_heads_run_in_8_bits_first_where_the_budget_has_room(causal: bool) -> None:
    table = compiled(65_536, 128, 0.1, causal=causal)
    assert table.narrow is not None
    assert replace(table.narrow, cost_estimate=1.0, error_estimate=0.0) == BOTH
    assert table.narrow.cost_estimate < 0.82 * table.fallback.cost_estimate
    assert table.narrow.error_estimate <= 0.065
    near = BudgetPolicy(narrow_worthwhile=0.95)
    found = compiled(65_536, 128, 0.05, causal=causal, policy=near).narrow
    assert found is not None
    assert (found.qk, found.pv) == ("i8", "bf16")  # of f16 there is nothing to multiply


@pytest.mark.parametrize(
    ("length", "dim", "rel", "options"),
    [
        (16_384, 64, 0.1, {}),  # as fast as 16 bits
        (16_384, 128, 0.1, {}),  # what is saved does not pay for heads that would run again
        (65_536, 128, 0.02, {}),  # i8 alone takes a percent
        (65_536, 128, 0.1, {"narrow": ()}),
    ],
)
def test_elsewhere_dense_heads_stay_in_16_bits(
    length: int, dim: int, rel: float, options: dict[str, Any]
) -> None:
    assert compiled(length, dim, rel, **options).narrow is None


def test_a_head_without_a_candidate_is_what_runs_first() -> None:
    table = compiled(32_768, 128, 0.1)
    choice = np.zeros((), CHOICE)
    choice["candidate"] = FALLBACK
    assert table.head_plan(choice).qk == "i8"
    assert replace(table, narrow=None).head_plan(choice).qk == "bf16"


def plan_of(*heads: HeadPlan) -> tuple[Plan, AttentionProblem]:
    x = np.zeros((1, len(heads), 256, 128), ml_dtypes.bfloat16)
    problem = AttentionProblem.from_arrays(x, x, x)
    return Plan({(0, h): head for h, head in enumerate(heads)}), problem


def test_a_plan_with_8_bit_heads_is_run_again_on_the_device() -> None:
    landmark = HeadPlan(replace(SIZES[0], tau=0.1), qk="bf16", pv="bf16")
    wide = HeadPlan(qk="bf16", pv="bf16")
    assert isinstance(landmark.structure, Landmark)
    found = frozen(*plan_of(replace(BOTH, reason="why"), landmark, BOTH, wide), SIZES)
    assert not isinstance(found, str)
    assert found.table.narrow == BOTH
    assert found.decided == (FALLBACK, 0, FALLBACK, WIDE)
    without = frozen(*plan_of(landmark, wide), SIZES)
    assert not isinstance(without, str)
    assert without.decided == (0, FALLBACK)


@pytest.mark.parametrize(
    "heads",
    [
        (BOTH, HeadPlan(qk="bf16", pv="bf16")),  # one ran again: nothing to plan beside
        (BOTH, replace(BOTH, p_scale=448.0)),
        (replace(BOTH, scales="token"),),
        (replace(BOTH, pv="f16"),),
        (HeadPlan(replace(SIZES[0], tau=0.1), qk="i8", pv="e4m3"),),
    ],
)
def test_other_plans_with_8_bit_heads_go_the_hosts_way(heads: tuple[HeadPlan, ...]) -> None:
    assert isinstance(frozen(*plan_of(*heads), SIZES), str)


class Named(Packer):
    """A sequence whose launches are names alone."""

    def __init__(self, *, levels: int, narrow: bool) -> None:
        self.launch = SimpleNamespace(  # type: ignore[assignment]
            levels=levels, narrow=narrow, proves=not levels and not narrow, decided=None
        )
        self.at = {"decision": 5}
        self.out: list[Any] = []

    def __getattribute__(self, name: str) -> Any:
        helpers = ("_zero", "_copy", "_exact", "_norms", "_probe_judged", "_judge", "_prove",
                   "_quantise", "_attend_narrow", "_attend", "_certify")  # fmt: skip
        if name not in (*helpers, "_plan", "_list", "_attend_exact"):
            return super().__getattribute__(name)

        def note(*given: Any, **options: Any) -> Any:
            own = given[0] if name in ("_list", "_attend_exact", "_attend") else name[1:]
            own = f"quantise {given[0]}" if name == "_quantise" else own
            self.out.append(f"{own} again" if options.get("second") else own)
            return (0, 0) if name == "_plan" else len(self.out) - 1

        return note


def steps(**of: Any) -> list[str]:
    return Named(**of).steps()  # type: ignore[return-value]


def test_what_runs_in_8_bits_is_certified_and_runs_again_in_16_where_that_fails() -> None:
    alone = steps(levels=0, narrow=True)
    assert alone[-6:] == ["quantise 0", "attend_narrow", "certify", "list_again", "escalate",
                          "certify again"]  # fmt: skip
    assert "prove" not in alone  # no theorem speaks about what was rounded there
    beside = steps(levels=3, narrow=True)
    assert beside.index("plan") < beside.index("quantise 5") < beside.index("attend_narrow")
    assert "attend_exact" in beside  # heads whose scores are too large for i8
    assert beside[-4:] == alone[-4:]


def test_without_8_bits_nothing_changes() -> None:
    assert "prove" in steps(levels=0, narrow=False)
    planned = steps(levels=3, narrow=False)
    assert "attend_exact" in planned
    assert not {"attend_narrow", "quantise 5"} & set(planned)


def test_the_host_says_which_heads_ran_in_8_bits_and_which_again() -> None:
    """A head in 8 bits, one that ran again, one whose entropy was too small for them."""
    _, problem = plan_of(BOTH, BOTH, BOTH)
    table = replace(compiled(16_384, 128, 0.1), narrow=BOTH)
    certificates = np.zeros((1, 3), CERTIFICATE)
    certificates["rounds"], certificates["first_upper"] = [[1, 2, 1]], 0.25
    decisions = np.zeros((1, 3), DECISION)
    decisions["choice"]["candidate"] = FALLBACK
    read = SimpleNamespace(
        certificates=certificates, decisions=decisions,
        decision=np.array([[FALLBACK, FALLBACK, WIDE]], np.int32),
    )  # fmt: skip
    said = Whole(problem, table, ErrorBudget(0.1), Later(lambda: read), None)  # type: ignore[arg-type, return-value]
    plans = said.plans()
    assert [plans[0, head].qk for head in range(3)] == ["i8", "bf16", "bf16"]
    assert "dense i8/e4m3 certified 0.25" in plans[0, 1].reason
    assert "too large for i8" in plans[0, 2].reason
    read.decisions = read.decision = None  # nothing was measured: all of them began in 8 bits
    plans = said.plans()
    assert [plans[0, head].qk for head in range(3)] == ["i8", "bf16", "i8"]
