"""Policies for experiments: the default one as if measuring were free, or without one part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adaattn_core.plan import HeadPlan
from adaattn_core.policies.base import PolicyContext
from adaattn_core.policies.budget import BudgetPolicy
from adaattn_core.problem import HeadIndex
from adaattn_core.stats import HeadStats, MeasureRequest
from adaattn_core.structure import Landmark, Structure

PARTS = {
    "precision": "operands stay in the inputs' own format",
    "structure": "every head runs dense",
    "landmarks": "no near field with landmarks and pools",
    "skip rule": "no score-then-skip",
    "pools": "keys beyond the landmarks are dropped, not pooled",
    "fitted bias": "pools count their keys, nothing is fitted",
    "smoothing": "8-bit keys keep their mean",
    "escalation": "heads that miss the budget stay as they are",
}
"""Adaptive parts that can be switched off one at a time, and what is left then."""
STRUCTURE_WITHOUT: dict[str, dict[str, Any]] = {
    "pools": {"pool": 0},
    "fitted bias": {"fitted": False},
}
"""What landmarks are without a part of theirs."""


@dataclass(frozen=True, slots=True)
class Without:
    """The default policy without one part, as if measuring and certifying cost nothing.

    At a few thousand tokens they take longer than a dense head on a CPU, so the default policy
    runs everything dense there and nothing that is switched off would be missed.

    Attributes
    ----------
    part : str
        A key of `PARTS`; "" for the whole policy.
    base : BudgetPolicy
    """

    part: str = ""
    base: BudgetPolicy = field(default_factory=BudgetPolicy)

    @property
    def name(self) -> str:
        """Name in plans."""
        return f"unhurried without {self.part}" if self.part else "unhurried"

    def request(self, context: PolicyContext) -> MeasureRequest | None:
        """Ask for what is left."""
        request = self.base.request(self._seen(context))
        if request is None:
            return None
        return replace(
            request, structures=tuple(_less(s, self.part) for s in request.structures)
        )

    def decide(
        self, stats: Mapping[HeadIndex, HeadStats], context: PolicyContext
    ) -> dict[HeadIndex, HeadPlan]:
        """Choose among what is left."""
        plans = self.base.decide(stats, self._seen(context))
        return {index: self._changed(plan) for index, plan in plans.items()}

    def escalate(
        self, plan: HeadPlan, upper: float, stats: HeadStats, context: PolicyContext
    ) -> HeadPlan | None:
        """Climb the same way."""
        step = self.base.escalate(plan, upper, stats, self._seen(context))
        return None if step is None else self._changed(step)

    def _seen(self, context: PolicyContext) -> PolicyContext:
        able = context.capabilities
        if self.part == "precision":
            own = (context.dtype, context.exact_format)
            able = replace(able, qk_formats=own, pv_formats=own)
        hidden = {"landmarks": {"landmark", "block_sparse"}, "skip rule": {"score_skip"}}
        kinds = tuple(k for k in able.structures if k not in hidden.get(self.part, ()))
        kinds = ("dense",) if self.part == "structure" else kinds
        rates = {"rows": 1e9, "landmark": 1.0, "score_skip": 1.0}
        costs = replace(
            context.costs, head_seconds=0.0, key_seconds=0.0, call_seconds=0.0,
            efficiency={**context.costs.efficiency, **rates},
        )  # fmt: skip
        return replace(context, capabilities=replace(able, structures=kinds), costs=costs)

    def _changed(self, plan: HeadPlan) -> HeadPlan:
        if self.part == "smoothing":
            plan = replace(plan, smooth_k=False)
        return replace(plan, structure=_less(plan.structure, self.part))


def unhurried() -> Without:
    """Return the default policy, as if measuring and certifying took no time."""
    return Without()


def _less(structure: Structure, part: str) -> Structure:
    changes = STRUCTURE_WITHOUT.get(part, {})
    return replace(structure, **changes) if isinstance(structure, Landmark) else structure
