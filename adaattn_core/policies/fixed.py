"""FixedPolicy: the same plan for every head; ExactPolicy: the input's own precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from adaattn_core.plan import HeadPlan
from adaattn_core.policies import compiling
from adaattn_core.policies.base import PolicyContext, safer
from adaattn_core.policies.table import Candidate, DecisionTable
from adaattn_core.problem import HeadIndex
from adaattn_core.stats import HeadStats, MeasureRequest
from adaattn_core.structure import Dense, Structure


class FixedPolicy:
    """Run every head the same way.

    Parameters
    ----------
    structure : Structure, optional
        Default `Dense`.
    qk, pv : str
        Operand formats.
    **fields
        Further fields of `HeadPlan` (scales, smooth_k, rounding, p_scale, flush_keys).
    """

    name = "fixed"

    def __init__(
        self,
        structure: Structure | None = None,
        qk: str = "f32",
        pv: str = "f32",
        **fields: Any,
    ) -> None:
        fields.setdefault("reason", "fixed by the caller")
        self.plan = HeadPlan(structure=structure or Dense(), qk=qk, pv=pv, **fields)

    def __repr__(self) -> str:
        plan = self.plan
        return f"{type(self).__name__}({plan.structure!r}, qk={plan.qk!r}, pv={plan.pv!r})"

    def request(self, context: PolicyContext) -> MeasureRequest | None:
        """Nothing needs to be measured."""
        return None

    def decide(
        self, stats: Mapping[HeadIndex, HeadStats], context: PolicyContext
    ) -> dict[HeadIndex, HeadPlan]:
        """Return the same plan for every head."""
        return dict.fromkeys(context.shapes, self.plan)

    def compile(self, context: PolicyContext) -> DecisionTable:
        """Return a table that holds this one plan; nothing need be measured."""
        return _only(self.plan, context)

    def escalate(
        self, plan: HeadPlan, upper: float, stats: HeadStats, context: PolicyContext
    ) -> HeadPlan | None:
        """Climb the common ladder."""
        return safer(plan, upper, stats, context)


class ExactPolicy(FixedPolicy):
    """Dense attention in the input's own format, or f32 where the machine only emulates it."""

    name = "exact"

    def decide(
        self, stats: Mapping[HeadIndex, HeadStats], context: PolicyContext
    ) -> dict[HeadIndex, HeadPlan]:
        """Return the exact plan for every head."""
        return dict.fromkeys(context.shapes, self._exact(context))

    def compile(self, context: PolicyContext) -> DecisionTable:
        """Return a table that holds the exact plan."""
        return _only(self._exact(context), context)

    def _exact(self, context: PolicyContext) -> HeadPlan:
        return _exact_plan(context.exact_format)


@cache
def _exact_plan(name: str) -> HeadPlan:
    """Return one plan per format: plans are checked when made, and exact calls are many."""
    return HeadPlan(qk=name, pv=name, reason="exact attention was asked for")


def _only(plan: HeadPlan, context: PolicyContext) -> DecisionTable:
    """Return a table that chooses `plan` whatever the head is like."""
    return DecisionTable(
        (Candidate(plan, fixed=1.0, slope=0.0),),
        compiling.dense_fallback(context),
        aim=math.inf,
        escalation_aim=0.0,
        worthwhile=math.inf,
        measured=False,
        priced=False,
    )
