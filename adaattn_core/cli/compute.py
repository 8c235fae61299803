"""One timed run on arrays that were read, and on request the truth beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from adaattn_core.api import attention
from adaattn_core.cli.inputs import Inputs
from adaattn_core.mask import Mask
from adaattn_core.plugins.registry import get_backend
from adaattn_core.problem import AttentionProblem
from adaattn_core.report.predict import Prediction, predict
from adaattn_core.report.summary import HeadRow, Totals, head_rows, totals, true_errors
from adaattn_core.result import AttentionResult


@dataclass(frozen=True, slots=True)
class Outcome:
    """A result, what is known about each head, and the sums."""

    result: AttentionResult
    rows: list[HeadRow]
    totals: Totals
    prediction: Prediction | None = None


def compute(
    inputs: Inputs,
    *,
    mask: Mask,
    measure: bool,
    backend: str = "auto",
    layer: str = "",
    predicted_on: str | None = None,
    **choices: Any,
) -> Outcome:
    """Run attention and time it.

    Parameters
    ----------
    inputs : Inputs
    mask : Mask
    measure : bool
        Also compute every row exactly (float64) and time the same backend on the exact problem.
        Both come after the timed run, so they cannot warm anything up for it.
    backend : str
        By name. It is imported before the clock starts.
    layer : str
        Name of the layer, kept in the plan and in tables.
    predicted_on : str, optional
        Target whose cost model predicts what the plan would take there.
    **choices
        Passed on to `adaattn_core.attention`: budget, policy, plan, target, seed.
    """
    q, k, v = inputs.query, inputs.key, inputs.value
    problem = AttentionProblem.from_arrays(q, k, v, mask=mask, scale=inputs.scale)
    get_backend(backend, problem.device)  # imports it
    shared: dict[str, Any] = {"mask": mask, "scale": inputs.scale}
    start = time.perf_counter()
    result = attention(q, k, v, **shared, backend=backend, layer=layer, **choices)
    seconds = time.perf_counter() - start
    errors, dense_seconds = None, None
    if measure:
        errors = true_errors(problem, result)
        start = time.perf_counter()
        attention(q, k, v, **shared, backend=result.provenance["backend"])
        dense_seconds = time.perf_counter() - start
    rows = head_rows(result, errors, layer)
    prediction = None if predicted_on is None else predict(problem, result, predicted_on)
    return Outcome(result, rows, totals(rows, seconds, dense_seconds), prediction)
