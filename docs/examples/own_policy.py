"""A policy of your own: some heads stay exact, the others are left to the budget.

    python docs/examples/own_policy.py

A policy turns measured facts into a plan. It sees no array, so it can be tested on numbers
alone, and the certificate is computed after it: a bad policy costs time, not truth.
"""

from collections.abc import Mapping
from importlib.resources import as_file, files

import ml_dtypes
import numpy as np

from adaattn_core import BudgetPolicy, ErrorBudget, HeadPlan, Mask, attention
from adaattn_core.policies.base import PolicyContext
from adaattn_core.problem import HeadIndex
from adaattn_core.stats import HeadStats, MeasureRequest


class ExactHeads:
    """BudgetPolicy, but for the heads named: those are computed exactly.

    Parameters
    ----------
    heads : set of int
        Heads that look things up, say, and must not lose a key.
    """

    name = "exact_heads"

    def __init__(self, heads: set[int]) -> None:
        self.heads = heads
        self.others = BudgetPolicy()

    def request(self, context: PolicyContext) -> MeasureRequest | None:
        """What must be measured before deciding."""
        return self.others.request(context)

    def decide(
        self, stats: Mapping[HeadIndex, HeadStats], context: PolicyContext
    ) -> dict[HeadIndex, HeadPlan]:
        """Return the budget's plan, with the named heads exact."""
        plans = self.others.decide(stats, context)
        exact = HeadPlan(
            qk=context.exact_format, pv=context.exact_format, reason="this head stays exact"
        )
        return {index: exact if index[1] in self.heads else p for index, p in plans.items()}

    def escalate(
        self, plan: HeadPlan, upper: float, stats: HeadStats, context: PolicyContext
    ) -> HeadPlan | None:
        """Return a safer plan for a head that missed the budget."""
        return self.others.escalate(plan, upper, stats, context)


with as_file(files("adaattn_core").joinpath("demo_data", "smollm2_layer09.npz")) as path:
    stored = np.load(path)
query, key, value = (
    stored[name].view(ml_dtypes.bfloat16).astype(np.float32)[None] for name in "qkv"
)

result = attention(
    query,
    key,
    value,
    mask=Mask.causal(),
    scale=float(stored["scale"]),
    backend="numpy",
    budget=ErrorBudget(rel=0.1),
    policy=ExactHeads({1}),
)
print(result.plan.explain())
assert result.plan[0, 1].structure.kind == "dense"
assert (result.certificate.upper <= 0.1).all()
