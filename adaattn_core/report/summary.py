"""What a run says about every head and in all: the rows of tables, JSON and HTML."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaattn_core.arrays import to_numpy
from adaattn_core.certificates.data import HeadCertificate
from adaattn_core.plan import HeadPlan
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.result import AttentionResult
from adaattn_core.testing.oracles import exact_attention, relative_frobenius, row_quantile


@dataclass(frozen=True, slots=True)
class TrueError:
    """Error of one head against exact attention in float64.

    Attributes
    ----------
    frobenius : float
        ``|out - exact|_F / |exact|_F``.
    rows : float
        Quantile of ``|out_i - exact_i| / rms_i|out_i|`` at the certificate's row share.
    """

    frobenius: float
    rows: float


@dataclass(frozen=True, slots=True)
class HeadRow:
    """One head: what was chosen, what was certified and, where measured, what is true."""

    index: HeadIndex
    plan: HeadPlan
    share: float
    rank: int
    certificate: HeadCertificate
    true: TrueError | None
    layer: str = ""

    @property
    def true_frobenius(self) -> float | None:
        """True relative Frobenius error; None where not measured."""
        return None if self.true is None else self.true.frobenius

    @property
    def true_rows(self) -> float | None:
        """True row error at the certificate's share; None where not measured."""
        return None if self.true is None else self.true.rows

    @property
    def covered(self) -> bool | None:
        """Whether the true row error is at most the certified one; None where not measured."""
        return None if self.true is None else self.true.rows <= self.certificate.upper

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary (non-finite numbers as null)."""
        return {
            "batch": self.index[0],
            "head": self.index[1],
            "layer": self.layer,
            "structure": self.plan.structure.kind,
            "parameters": self.plan.structure.to_json(),
            "qk": self.plan.qk,
            "pv": self.plan.pv,
            "rank": self.rank,
            "share": self.share,
            "reason": self.plan.reason,
            "certificate": self.certificate.to_json(),
            "measured": finite_or_none(self.true_frobenius),
            "measured_rows": finite_or_none(self.true_rows),
        }


@dataclass(frozen=True, slots=True)
class Totals:
    """A run in one line.

    Attributes
    ----------
    share : float
        Mean share of the visible scores that were computed.
    seconds, dense_seconds : float, float or None
        Wall-clock of this run, and of the same backend computing exactly; None if not measured.
    coverage : float or None
        Share of heads whose true row error is at most the certified one; None if not measured.
    worst_measured : float or None
        Largest true relative Frobenius error; None if not measured.
    """

    share: float
    seconds: float
    dense_seconds: float | None
    coverage: float | None
    worst_measured: float | None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary (non-finite numbers as null)."""
        return {name: finite_or_none(getattr(self, name)) for name in self.__slots__}


def finite_or_none(value: float | None) -> float | None:
    """Return the number, or None for NaN and infinities, which JSON cannot hold."""
    return float(value) if value is not None and math.isfinite(value) else None


def true_errors(
    problem: AttentionProblem, result: AttentionResult
) -> dict[HeadIndex, TrueError]:
    """Compare every row of every head with exact attention in float64."""
    exact = exact_attention(problem).out
    out = to_numpy(result.out)
    errors = {}
    for index in problem.heads():
        span = problem.sequences[index[0]]
        where = (span.batch, index[1], slice(span.q_start, span.q_stop))
        head_out = out[where].astype(np.float64)
        errors[index] = TrueError(
            relative_frobenius(head_out, exact[where]),
            row_quantile(head_out, exact[where], result.certificate[index].rows),
        )
    return errors


def head_rows(
    result: AttentionResult, errors: Mapping[HeadIndex, TrueError] | None, layer: str = ""
) -> list[HeadRow]:
    """Gather what is known about each head of a result."""
    return [
        HeadRow(
            index=index,
            plan=result.plan[index],
            share=result.facts[index].share,
            rank=result.facts[index].rank,
            certificate=result.certificate[index],
            true=None if errors is None else errors[index],
            layer=layer,
        )
        for index in result.plan
    ]


def totals(rows: Iterable[HeadRow], seconds: float, dense_seconds: float | None) -> Totals:
    """Sum up; the heads of a run see equally many scores, so shares are averaged."""
    rows = list(rows)
    true = [row.true for row in rows if row.true is not None]
    return Totals(
        share=statistics.fmean(row.share for row in rows) if rows else 0.0,
        seconds=seconds,
        dense_seconds=dense_seconds,
        coverage=statistics.fmean(bool(row.covered) for row in rows) if true else None,
        worst_measured=max(t.frobenius for t in true) if true else None,
    )
