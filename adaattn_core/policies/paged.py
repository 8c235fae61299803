"""PagedPolicy: read every key of a cache, and only the value pages that can matter."""

from __future__ import annotations

from collections.abc import Mapping

from adaattn_core.plan import HeadPlan
from adaattn_core.policies.base import PolicyContext, safer
from adaattn_core.problem import HeadIndex
from adaattn_core.stats import HeadStats, MeasureRequest
from adaattn_core.structure import Dense, ScoreSkip

TILE_KV = 64
"""Keys whose values are read or skipped together."""
LEAST_KEYS = 2 * TILE_KV
"""With fewer keys there is nothing to skip."""


class PagedPolicy:
    """Score-then-skip over the pages of a cache, as tight as the budget allows.

    No row is sampled: a decode step has one row, and what 8-bit pages were rounded from is
    gone. What is skipped is known exactly instead: every score was computed. Dropping a share e
    of a row's mass moves it by at most ``e * diam(V)``, and skipping below `lam` drops at most
    ``lam * keys``: so ``lam = rel / keys`` keeps within the budget where the values' diameter
    is about the output's size, and heads that miss it climb.
    """

    name = "paged"

    def request(self, context: PolicyContext) -> MeasureRequest | None:
        """Nothing is measured."""
        return None

    def decide(
        self, stats: Mapping[HeadIndex, HeadStats], context: PolicyContext
    ) -> dict[HeadIndex, HeadPlan]:
        """Return score-then-skip where the backend has it and keys are many, else dense."""
        name = context.exact_format
        rel = context.budget.rel if context.budget is not None else 0.0
        skips = "score_skip" in context.capabilities.structures and rel > 0
        plans = {}
        for index, shape in context.shapes.items():
            if skips and shape.len_kv >= LEAST_KEYS:
                lam = min(max(rel / shape.len_kv, 1e-12), 0.5)
                structure = ScoreSkip(lam=lam, tile_kv=TILE_KV)
                reason = "values of pages that carry little mass are not read"
                plans[index] = HeadPlan(structure, qk=name, pv=name, reason=reason)
            else:
                plans[index] = HeadPlan(Dense(), qk=name, pv=name, reason="few keys")
        return plans

    def escalate(
        self, plan: HeadPlan, upper: float, stats: HeadStats, context: PolicyContext
    ) -> HeadPlan | None:
        """Climb the common ladder."""
        return safer(plan, upper, stats, context)
