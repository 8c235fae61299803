"""What each adaptive part is worth: the same heads, one part after the other switched off."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_bench.policies import PARTS, Without
from adaattn_core.api import attention
from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import AdaAttnError
from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_core.report.predict import predict
from adaattn_core.report.summary import HeadRow, TrueError, head_rows
from adaattn_core.result import AttentionResult
from adaattn_core.testing.oracles import exact_attention, relative_frobenius, row_quantile

WHOLE = "everything on"


@dataclass(frozen=True, slots=True)
class Layer:
    """Heads of one layer with their truth.

    Attributes
    ----------
    name : str
    problem : AttentionProblem
    exact : ndarray of float64, shape (1, heads_q, len, dim)
    """

    name: str
    problem: AttentionProblem
    exact: NDArray[np.float64]

    @classmethod
    def of(cls, name: str, query: Any, key: Any, value: Any, scale: float | None) -> Layer:
        """Compute the truth of causal heads on the host."""
        problem = AttentionProblem.from_arrays(
            query, key, value, mask=Mask.causal(), scale=scale
        )
        return cls(name, problem, exact_attention(problem).out)

    def run(
        self, budget: ErrorBudget, policy: Any, *, target: str | None, seed: int | None
    ) -> AttentionResult:
        """Compute it within a budget, on the backend that has every part."""
        problem = self.problem
        return attention(
            problem.query, problem.key, problem.value, mask=problem.mask, scale=problem.scale,
            budget=budget, policy=policy, target=target, seed=seed, layer=self.name,
            backend="numpy",
        )  # fmt: skip

    def rows(self, result: AttentionResult) -> list[HeadRow]:
        """Return what was decided, certified and is true of every head."""
        out = np.asarray(result.out, np.float64)
        errors = {
            index: TrueError(
                relative_frobenius(out[index], self.exact[index]),
                row_quantile(out[index], self.exact[index], result.certificate[index].rows),
            )
            for index in result.plan
        }
        return head_rows(result, errors, self.name)


def ablate(
    layers: Sequence[Layer], rel: float, *, target: str, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Run everything on, then without each part of `PARTS`; yields one row each.

    Parameters
    ----------
    layers : sequence of Layer
    rel : float
        Budget; plans are chosen as if measuring and certifying cost nothing.
    target : str
        Machine that plans are for, and whose cost model predicts their time.
    seed : int
        The same for all, so that differences are not those of other probe rows.

    Yields
    ------
    dict
        ``part``, ``left`` (what is left without it), ``share``, ``seconds`` here,
        ``speedup`` predicted on the target for the plans alone (dense there over planned),
        ``speedup_whole`` with measuring and certifying, ``rows`` (largest true row error),
        ``frobenius`` (mean), ``coverage``, ``within`` (certificates within the budget),
        ``tightness`` (median of certified over true), ``escalated``, ``structures``,
        ``formats``; or ``refused``.
    """
    for part in ("", *PARTS):
        row: dict[str, Any] = {"part": part or WHOLE, "left": PARTS.get(part, "")}
        try:
            row |= _measure(layers, part, rel, target, seed)
        except AdaAttnError as error:
            row["refused"] = error.got
        yield row


def _measure(
    layers: Sequence[Layer], part: str, rel: float, target: str, seed: int
) -> dict[str, Any]:
    escalating = part != "escalation"
    budget = ErrorBudget(rel=rel, on_violation="escalate" if escalating else "report")
    heads: list[HeadRow] = []
    seconds, alone, whole, dense, escalated = 0.0, 0.0, 0.0, 0.0, 0
    for layer in layers:
        started = time.perf_counter()
        result = layer.run(budget, Without(part), target=target, seed=seed)
        seconds += time.perf_counter() - started
        heads += layer.rows(result)
        escalated += len(result.provenance.get("escalated", ()))
        found = predict(layer.problem, result, target, as_planned=True)
        alone, whole = alone + found.plan_seconds, whole + found.seconds
        dense += found.dense_seconds
    return summarise(heads, rel) | {
        "seconds": seconds,
        "speedup": dense / alone if alone else 1.0,
        "speedup_whole": dense / whole if whole else 1.0,
        "escalated": escalated,
    }


def summarise(heads: Sequence[HeadRow], rel: float) -> dict[str, Any]:
    """Shares, errors, coverage and tightness of many heads."""
    true = [row.true.rows for row in heads if row.true is not None]
    upper = [row.certificate.upper for row in heads]
    ratios = [u / t for u, t in zip(upper, true, strict=True) if t > 0 and np.isfinite(u)]
    return {
        "heads": len(heads),
        "share": statistics.fmean(row.share for row in heads),
        "rows": max(true),
        "frobenius": statistics.fmean(row.true_frobenius or 0.0 for row in heads),
        "coverage": statistics.fmean(t <= u for t, u in zip(true, upper, strict=True)),
        "within": statistics.fmean(u <= rel for u in upper),
        "tightness": statistics.median(ratios) if ratios else 1.0,
        "structures": dict(Counter(row.plan.structure.kind for row in heads)),
        "formats": dict(Counter(f"{row.plan.qk}/{row.plan.pv}" for row in heads)),
    }
