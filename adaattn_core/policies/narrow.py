"""Dense heads in 8 bits first: whether a device that decides should try them, and in which."""

from __future__ import annotations

import math
from dataclasses import replace

from adaattn_core.plan import HeadPlan
from adaattn_core.policies import compiling
from adaattn_core.policies.base import PolicyContext

__all__ = ["narrow_plan"]

NARROW_ERRORS = {("i8", "e4m3"): 0.042, ("i8", "bf16"): 0.014, ("i8", "f16"): 0.014}
"""What dense heads in 8 bits err by on N(0, 1), which is about the most that heads do whose
values do not cancel out: e4m3 takes 2.5% of every weight and every value."""
ROOMY_P_SCALE = 112.0
"""Factor on weights that leaves e4m3 two bits above the first maximum that a row sees: most
later ones move nothing."""


def narrow_plan(context: PolicyContext, aim: float, worthwhile: float) -> HeadPlan | None:
    """Return the cheapest dense plan in 8 bits that usual heads keep a budget with.

    Parameters
    ----------
    context : PolicyContext
        Heads of one shape.
    aim : float
        Largest error that usual heads may have.
    worthwhile : float
        Share of the cost of dense heads at the inputs' own precision that it must stay below.

    Returns
    -------
    HeadPlan or None
        None where none saves so much, the rows that certify it counted: a dense head at the
        inputs' own precision is mostly proved without any.
    """
    shape, costs, exact = compiling.one_shape(context), context.costs, context.exact_format
    best, least = None, worthwhile * costs.dense_cost(shape, exact, exact)
    whole = costs.dense_cost(shape)
    for qk, pv in context.capabilities.narrow:
        error = NARROW_ERRORS.get((qk, pv), math.inf)
        if pv not in ("e4m3", exact) or not costs.runs(qk, pv):
            continue
        plan = HeadPlan(qk=qk, pv=pv, p_scale=ROOMY_P_SCALE, error_estimate=error)
        cost = costs.head_cost(shape, plan, 1.0) + costs.certify_seconds(shape)
        if error <= aim and cost < least:
            ratio = cost / whole if whole > 0 else 1.0
            best, least = replace(plan, cost_estimate=ratio), cost
    return best
