"""What a plan is predicted to take on another machine, by that machine's cost model.

A prediction, never a measurement: it adds up rates of products and softmax and what planning
was fitted to cost, and knows nothing of the host or of how well small problems fill a device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from adaattn_core.costs import get_cost_model
from adaattn_core.problem import AttentionProblem
from adaattn_core.result import AttentionResult
from adaattn_core.stats import problem_shapes


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted seconds of heads on a machine that may not be here.

    Attributes
    ----------
    target : str
        Name of the cost model.
    source : str
        Where its figures come from.
    dtype : str
        Format of dense there, and of both products of the plans unless they keep their own.
    plan_seconds : float
        The plans alone, as if they were known.
    seconds : float
        The same with measuring, deciding and certifying.
    dense_seconds : float
        The same heads dense.
    """

    target: str
    source: str
    dtype: str
    plan_seconds: float
    seconds: float
    dense_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary that says what kind of figure this is."""
        return {
            "kind": "prediction by a cost model, not a measurement",
            "target": self.target,
            "source": self.source,
            "format": self.dtype,
            "plan_seconds": self.plan_seconds,
            "seconds": self.seconds,
            "dense_seconds": self.dense_seconds,
        }


def prediction_lines(found: dict[str, Any]) -> list[str]:
    """Say `Prediction.to_json` in sentences."""
    dense = found["dense_seconds"]
    times = [
        f"{what} {1e6 * s:.0f} us ({dense / s if s else 1.0:.2f}x)"
        for what, s in (
            ("these plans alone", found["plan_seconds"]),
            ("with measuring and certifying", found["seconds"]),
        )
    ]
    return [
        f"predicted on {found['target']}, {found['format']}: dense {1e6 * dense:.0f} us,"
        f" {', '.join(times)}",
        "a prediction by that machine's cost model, not a measurement: the host, and how a"
        " small problem fills the device, are not in it",
    ]


def predict(
    problem: AttentionProblem,
    result: AttentionResult,
    target: str,
    *,
    as_planned: bool = False,
) -> Prediction:
    """Predict what the plan of a result takes on another machine, and dense there.

    Structures and shares are those that ran.

    Parameters
    ----------
    problem : AttentionProblem
    result : AttentionResult
        Of this problem.
    target : str
        Name in `adaattn_core.costs.COST_MODELS`.
    as_planned : bool
        Whether formats are the plan's own, made for that machine. By default they are those of
        the inputs there: a CPU computes in f32 what it only emulates, which would say nothing
        about the other machine.

    Raises
    ------
    ArgumentError
        If there is no such target.
    """
    costs = get_cost_model(target)
    dtype = problem.dtype if costs.runs(problem.dtype, problem.dtype) else "f32"
    shapes = problem_shapes(problem)
    alone = extra = dense = 0.0
    for index in result.plan:
        shape, plan = shapes[index], result.plan[index]
        there = plan if as_planned else replace(plan, qk=dtype, pv=dtype)
        more = costs.extra_seconds(shape, there.structure)
        alone += costs.head_cost(shape, there, result.facts[index].share) - more
        extra += more
        dense += costs.dense_cost(shape, dtype, dtype)
    # What the heads of a call share is paid where anything was measured, whatever was decided.
    call = costs.call_seconds if result.stats is not None else 0.0
    return Prediction(costs.name, costs.source, dtype, alone, alone + extra + call, dense)


def joined(predictions: Iterable[Prediction]) -> Prediction:
    """Several layers, one after the other."""
    found = list(predictions)
    return replace(
        found[0],
        plan_seconds=sum(p.plan_seconds for p in found),
        seconds=sum(p.seconds for p in found),
        dense_seconds=sum(p.dense_seconds for p in found),
    )
