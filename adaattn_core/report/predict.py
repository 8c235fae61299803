"""What a plan is predicted to take on another machine, by that machine's cost model.

A prediction, never a measurement: it adds up rates of products and softmax, and knows nothing
of launches, of the host, or of how well small problems fill a device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from adaattn_core.costs import CostModel, get_cost_model
from adaattn_core.plan import HeadPlan
from adaattn_core.problem import AttentionProblem
from adaattn_core.result import AttentionResult
from adaattn_core.stats import HeadStats, problem_shapes


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
        Format of both products: that of the inputs where the machine has it.
    seconds : float
        The plans, measuring and certifying included.
    dense_seconds : float
        The same heads dense.
    """

    target: str
    source: str
    dtype: str
    seconds: float
    dense_seconds: float

    @property
    def speedup(self) -> float:
        """Dense over planned."""
        return self.dense_seconds / self.seconds if self.seconds else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary that says what kind of figure this is."""
        return {
            "kind": "prediction by a cost model, not a measurement",
            "target": self.target,
            "source": self.source,
            "format": self.dtype,
            "seconds": self.seconds,
            "dense_seconds": self.dense_seconds,
        }

    def lines(self) -> list[str]:
        """Say it in sentences."""
        return [
            f"predicted on {self.target}, {self.dtype}: these structures and shares"
            f" {1e6 * self.seconds:.0f} us, dense {1e6 * self.dense_seconds:.0f} us"
            f" ({self.speedup:.2f}x)",
            "a prediction by that machine's cost model, not a measurement: launches, the host,"
            " and how a small problem fills the device are not in it",
        ]


def predict(problem: AttentionProblem, result: AttentionResult, target: str) -> Prediction:
    """Predict what the plan of a result takes on another machine, and dense there.

    Structures and shares are those that ran. Formats are those of the inputs there: a CPU
    computes in f32 what it only emulates, which would say nothing about the other machine.

    Parameters
    ----------
    problem : AttentionProblem
    result : AttentionResult
        Of this problem.
    target : str
        Name in `adaattn_core.costs.COST_MODELS`.

    Raises
    ------
    ArgumentError
        If there is no such target.
    """
    costs = get_cost_model(target)
    dtype = problem.dtype if costs.runs(problem.dtype, problem.dtype) else "f32"
    shapes = problem_shapes(problem)
    plan, facts = result.plan, result.facts
    pairs = [
        _head_seconds(costs, shapes[index], plan[index], facts[index].share, dtype)
        for index in plan
    ]
    return Prediction(
        costs.name, costs.source, dtype, sum(s for s, _ in pairs), sum(d for _, d in pairs)
    )


def joined(predictions: Iterable[Prediction]) -> Prediction:
    """Several layers, one after the other."""
    found = list(predictions)
    return replace(
        found[0],
        seconds=sum(p.seconds for p in found),
        dense_seconds=sum(p.dense_seconds for p in found),
    )


def _head_seconds(
    costs: CostModel, shape: HeadStats, plan: HeadPlan, share: float, dtype: str
) -> tuple[float, float]:
    there = replace(plan, qk=dtype, pv=dtype)
    return costs.head_cost(shape, there, share), costs.dense_cost(shape, dtype, dtype)
