"""What must hold of every answer, however hostile the call: the promises, one by one.

`judge` compares a result with the definition and raises `Lie` where a promise is broken that
binds every single call. Promises that hold with a stated probability are returned as trials,
to be counted over a run (`binomial_excess`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.budget import ErrorBudget
from adaattn_core.certificates.data import HeadCertificate
from adaattn_core.errors import AdaAttnError, BudgetInfeasibleError, CertificateViolation
from adaattn_core.formats import get_format
from adaattn_core.plan import HeadPlan
from adaattn_core.result import AttentionResult
from adaattn_core.structure import BlockSparse, Dense, Landmark, ScoreSkip
from adaattn_core.testing.hostile.calls import HostileCall, out_of
from adaattn_core.testing.hostile.definition import (
    Head,
    MaskFacts,
    Span,
    attention_of_head,
    root_mean_square,
    row_norms,
    spans,
)
from adaattn_core.testing.hostile.problems import HostileArrays, HostileProblem

Index = tuple[int, int]

LAST_BITS = 1e-13
"""Bounds may be rounded outward by one bit more or less, as the ways there differ."""
UNIT_MOVES = 2.0**-7
"""A bound's unit is the rms row: stored in bf16 twice, it moves by a rounding each time."""
LARGEST_LSE = 3.3e38
"""Beyond this an lse, which is returned in float32, may be infinite."""


class Lie(AssertionError):  # noqa: N818 -- a finding, not a fault
    """A promise was broken silently; the message says which, where and by how much."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A promise that holds with a stated probability, and whether it held this time.

    Attributes
    ----------
    law : str
    confidence : float
        Least probability of holding.
    held : bool
    """

    law: str
    confidence: float
    held: bool


@dataclass(frozen=True, slots=True)
class Located:
    """One head of the definition, and where its rows lie in the arrays."""

    index: Index
    span: Span
    exact: Head

    @property
    def where(self) -> tuple[int, int, slice]:
        """Index of the rows in an array of shape (batch, heads_q, len_q, ...)."""
        return self.span.batch, self.index[1], slice(self.span.q0, self.span.q1)


def exact_heads(problem: HostileProblem, arrays: HostileArrays) -> Iterator[Located]:
    """Every head of every sequence by the definition."""
    query, key, value, mask = arrays.query, arrays.key, arrays.value, arrays.mask
    facts = MaskFacts.of(mask)
    group = query.shape[1] // key.shape[1]
    scale = 1 / math.sqrt(query.shape[3]) if problem.scale is None else problem.scale
    sinks = problem.sinks_of_heads()
    for i, span in enumerate(spans(facts, query.shape[0], query.shape[2], key.shape[2])):
        for head in range(query.shape[1]):
            exact = attention_of_head(
                query, key, value, scale, facts, span, head, group, problem.softcap,
                -math.inf if sinks is None else float(sinks[head]),
            )  # fmt: skip
            yield Located((i, head), span, exact)


def judge(
    problem: HostileProblem, arrays: HostileArrays, call: HostileCall, result: AttentionResult
) -> list[Trial]:
    """Hold a result against every law.

    Raises
    ------
    Lie
        If a law that binds every call is broken.
    """
    out, lse = out_of(result, problem), np.asarray(result.lse)
    _same(out.shape, (*arrays.query.shape[:3], arrays.value.shape[3]), "shape of the output")
    _same(lse.shape, arrays.query.shape[:3], "shape of the lse")
    _same(out.dtype, arrays.query.dtype, "dtype of the output")
    trials: list[Trial] = []
    for located in exact_heads(problem, arrays):
        certificate = result.certificate[located.index]
        plan = result.plan[located.index]
        rows, row_lse = out[located.where], lse[located.where]
        where = f"sequence {located.index[0]}, head {located.index[1]}"
        _blind_rows(located.exact, rows, row_lse, where)
        _nonfinite_rows(problem, located.exact, plan, certificate, rows, row_lse, where)
        _log_sum_exp(problem, located.exact, plan, certificate, row_lse, where)
        trials += _certificate(located.exact, certificate, rows, where)
    if call.budget is not None:
        _budget_kept(ErrorBudget(**call.budget), result)
    return trials


def judge_refusal(call: HostileCall, error: AdaAttnError) -> None:
    """Only odd plans and enforced budgets may be refused, and that in three lines.

    Raises
    ------
    Lie
        If a call without a plan of its own, which enforces nothing, was refused.
    """
    lines = str(error).splitlines()
    if len(lines) < 3 or not (error.got and error.needed and error.do):
        raise Lie(f"an error that is not three lines: {error}")
    enforced = call.budget is not None and call.budget["on_violation"] != "report"
    if enforced and isinstance(error, BudgetInfeasibleError | CertificateViolation):
        return
    if call.how in ("exact", "budget", "entropy"):
        raise Lie(f"{type(error).__name__} for a call that leaves the choice open: {error}")


def judge_same(
    first: AttentionResult, second: AttentionResult, what: str, *, certificates: bool = True
) -> None:
    """Two results agree bit for bit, their certificates up to the last bits.

    Raises
    ------
    Lie
        If they do not.
    """
    for name in ("out", "lse"):
        one, two = (np.asarray(getattr(r, name)) for r in (first, second))
        if one.tobytes() != two.tobytes():
            raise Lie(f"{what}: {name} differs, {one} and {two}")
    uppers = [r.certificate.upper for r in (first, second)]
    if certificates and not np.allclose(uppers[0], uppers[1], rtol=LAST_BITS, atol=0):
        raise Lie(f"{what}: certificates {uppers[0]} and {uppers[1]}")


def judge_same_bounds(first: AttentionResult, second: AttentionResult, what: str) -> None:
    """Bounds agree as far as rows that were computed in another order allow.

    Raises
    ------
    Lie
        If they do not.
    """
    uppers = [r.certificate.upper for r in (first, second)]
    if not np.allclose(uppers[0], uppers[1], rtol=UNIT_MOVES, atol=0):
        raise Lie(f"{what}: certificates {uppers[0]} and {uppers[1]}")


def judge_rows(
    located: Located,
    certificate: HeadCertificate,
    outs: Sequence[NDArray[Any]],
    rows: NDArray[np.bool_],
) -> None:
    """Hold some rows of a second output against the certificate of the first.

    Raises
    ------
    Lie
        If one is not, under a certificate that speaks of every row with certainty.
    """
    if certificate.upper == np.inf or min(certificate.rows, certificate.confidence) < 1:
        return
    first, second = (_wide(out[located.where]) for out in outs)
    exact = located.exact
    unit = root_mean_square(row_norms(first))
    errors = row_norms(second[rows] - exact.out[rows])
    allowed = np.longdouble(certificate.upper) * unit + exact.slack[rows]
    if not (errors <= allowed).all():
        raise Lie(f"head {located.index}: rows that do not see the change err by {errors}")


def _blind_rows(exact: Head, rows: NDArray[Any], lse: NDArray[Any], where: str) -> None:
    """Rows that see nothing give 0 and -inf, or their sink, whatever anything else holds."""
    blind = ~exact.sees
    if (rows[blind] != 0).any() or not (lse[blind] == exact.lse[blind]).all():
        raise Lie(f"{where}: rows that see nothing gave {rows[blind]} and {lse[blind]}")


def _nonfinite_rows(
    problem: HostileProblem,
    exact: Head,
    plan: HeadPlan,
    certificate: HeadCertificate,
    rows: NDArray[Any],
    lse: NDArray[Any],
    where: str,
) -> None:
    """NaN and Inf reach the rows that see them, and no others; what is there is flagged."""
    bad = ~np.isfinite(rows.astype(np.float64)).all(axis=1)
    # A float64 problem may have an lse beyond float32, in which it is returned.
    bad_lse = np.isnan(lse) | ((lse == np.inf) & ~(exact.lse > LARGEST_LSE))
    due = exact.reached & ~np.isfinite(exact.out).all(axis=1)
    if (due & ~bad).any():
        raise Lie(f"{where}: rows {_where(due & ~bad)} see NaN or Inf and are finite")
    stray = (bad | bad_lse) & ~exact.reached
    if stray.any() and not may_overflow(problem, exact, plan):
        raise Lie(f"{where}: rows {_where(stray)} see finite numbers and are not finite")
    if bad.any() != certificate.nonfinite and not (certificate.nonfinite and bad_lse.any()):
        raise Lie(f"{where}: non-finite rows {_where(bad)}, flag {certificate.nonfinite}")
    if bad_lse.any() and not certificate.nonfinite:
        raise Lie(f"{where}: lse {lse[bad_lse]}, not flagged")
    if certificate.nonfinite and certificate.upper != np.inf:
        raise Lie(f"{where}: a bound of {certificate.upper} for non-finite rows")


def may_overflow(problem: HostileProblem, exact: Head, plan: HeadPlan) -> bool:
    """Whether an intermediate number may leave the range of the plan's arithmetic.

    Then a row may be NaN or Inf, if it is flagged. The limits lie well inside the formats'
    ranges: sums, products and the smoothing of keys need room.
    """
    wide = plan.qk == plan.pv == "f64"
    room = 1e300 if wide else 1e36
    scale = 1 / math.sqrt(problem.dim_qk) if problem.scale is None else problem.scale
    dim, keys = problem.dim_qk, max(problem.len_kv, 1)
    with np.errstate(over="ignore"):
        product = np.longdouble(dim) * exact.query_max * exact.key_max
        largest = max(
            product,
            product * scale,
            np.longdouble(exact.query_max) * max(scale, 1.0),
            np.longdouble(exact.key_max) * dim,
            np.longdouble(exact.value_max) * keys,
            np.longdouble(exact.bias_max),
        )
    if largest > room or scale > room or plan.p_scale > 1e6:
        return True
    qk, pv, stored = (get_format(n) for n in (plan.qk, plan.pv, problem.dtype))
    operands = max(exact.query_max, exact.key_max)
    return (
        (not qk.is_quantised and operands > 0.9 * qk.max_finite)
        or (not pv.is_quantised and exact.value_max > 0.9 * pv.max_finite)
        or exact.value_max > 0.9 * stored.max_finite
    )


def _log_sum_exp(
    problem: HostileProblem,
    exact: Head,
    plan: HeadPlan,
    certificate: HeadCertificate,
    lse: NDArray[Any],
    where: str,
) -> None:
    """Rows that see a key have a finite lse, near the truth where scores are hardly rounded."""
    rows = exact.sees & ~exact.reached & (abs(exact.lse) < LARGEST_LSE)
    if certificate.nonfinite or may_overflow(problem, exact, plan):
        return
    if isinstance(plan.structure, BlockSparse | Landmark):
        return  # of all that a row sees, the plan may keep nothing
    if not np.isfinite(lse[rows]).all():
        raise Lie(f"{where}: lse {lse[rows]} of rows that see a key")
    if not isinstance(plan.structure, Dense | ScoreSkip) or plan.qk not in ("f32", "f64"):
        return
    unit = 2.0**-24
    steps = problem.dim_qk + 2 * problem.len_kv + 32
    dropped = 0.0
    if isinstance(plan.structure, ScoreSkip):
        share = min(problem.len_kv * plan.structure.lam, 1 - 1e-6)
        dropped = -math.log1p(-share)
    allowed = steps * unit * (1 + exact.score_max + abs(exact.lse)) + dropped + 1e-30
    off = abs(lse[rows].astype(np.longdouble) - exact.lse[rows])
    if (off > allowed[rows]).any():
        raise Lie(f"{where}: lse {lse[rows]}, exact {exact.lse[rows]}, off by {off.max()}")


def _certificate(
    exact: Head, certificate: HeadCertificate, rows: NDArray[Any], where: str
) -> list[Trial]:
    """Hold the sentence: a share of the rows that see a key err by at most upper * rms."""
    upper = certificate.upper
    if not upper >= 0 or certificate.estimate < 0:
        raise Lie(f"{where}: upper {upper}, estimate {certificate.estimate}")
    if upper == np.inf or certificate.guarantee == "none" or not exact.sees.any():
        return []
    returned = _wide(rows)
    allowed = np.longdouble(upper) * root_mean_square(row_norms(returned))
    with np.errstate(invalid="ignore"):  # NaN: a row that is reached, and not finite
        errors = row_norms(returned - exact.out)
    held = (errors <= allowed + exact.slack)[exact.sees]
    law = f"{certificate.guarantee} certificate"
    # The allowance undoes products such as 0.07 * 100 = 7.000000000000001.
    enough = int(held.sum()) >= certificate.rows * len(held) * (1 - 1e-12)
    if certificate.confidence < 1:
        return [Trial(law, certificate.confidence, enough)]
    if not enough:
        worst = errors[exact.sees].max()
        raise Lie(
            f"{where}: {law} of {allowed:.6g} (upper {upper:.6g}) for {certificate.rows:.3g} of"
            f" the rows; it holds for {held.mean():.3g} of {len(held)}, the worst errs by"
            f" {worst:.6g} (terms {dict(certificate.terms)})"
        )
    return [Trial(law, 1.0, True)]


def _budget_kept(budget: ErrorBudget, result: AttentionResult) -> None:
    """Without an error, an enforced budget is kept; only non-finite heads may miss it."""
    if budget.on_violation == "report":
        return
    missing = [
        index
        for index, head in result.certificate.heads.items()
        if not (head.holds(budget) or head.nonfinite)
    ]
    if missing:
        raise Lie(f"heads {missing} miss the budget, and nothing was raised")


def binomial_excess(trials: int, failures: int, confidence: float) -> float:
    """Probability of at least so many failures, if each trial holds with `confidence`."""
    from scipy import stats  # noqa: PLC0415 -- slow to import, needed once a run

    return float(stats.binom.sf(failures - 1, trials, 1 - confidence)) if failures else 1.0


def _wide(x: NDArray[Any]) -> NDArray[np.longdouble]:
    return x.astype(np.float64).astype(np.longdouble)


def _same(got: Any, needed: Any, what: str) -> None:
    if got != needed:
        raise Lie(f"{what}: {got}, needed {needed}")


def _where(rows: Any) -> list[int]:
    return [int(i) for i in np.flatnonzero(rows)]
