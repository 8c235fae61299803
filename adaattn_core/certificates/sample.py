"""Certificates from samples: errors of rows drawn after the plan was fixed."""

from __future__ import annotations

import math

import numpy as np

from adaattn_core import bounds
from adaattn_core.bounds.rounding import add_up, mul_up, up
from adaattn_core.certificates.data import HeadCertificate
from adaattn_core.errors import ArgumentError
from adaattn_core.facts import RowErrors, RunFacts

_NORM_ROUNDING = 1.0 + 2.0**-40
"""Covers the rounding of an error's norm in float64, up to a dimension of 2^12."""


def sampled_certificate(
    errors: RowErrors,
    facts: RunFacts,
    *,
    rows: float,
    confidence: float,
    len_q: int,
    complete: bool = False,
    rounds: int = 1,
) -> HeadCertificate:
    """Certify a head by exact attention of rows drawn after the plan was fixed.

    Parameters
    ----------
    errors : RowErrors
        Errors of the sampled rows (drawn uniformly with replacement), or of every row once.
    facts : RunFacts
        Its ``output_rms`` is the unit of the certificate.
    rows, confidence : float
        The sentence asked for, each in (0, 1).
    len_q : int
        Query rows of the head that see a key: the rows that are drawn from, and spoken about.
    complete : bool
        Whether `errors` holds every such row exactly once; the quantile is then exact.
    rounds : int
        Rounds of escalation that may draw afresh; the confidence is split over them, so that
        the sentence that is finally kept holds with `confidence` all the same.

    Returns
    -------
    HeadCertificate
        ``upper`` is inf when the sample is too small for the sentence or the output not finite;
        ``estimate`` is the relative Frobenius error of the sampled rows.

    Raises
    ------
    ArgumentError
        If `complete` is claimed for another number of rows than `len_q`.

    References
    ----------
    This project, docs/math/10-order-statistic.md, theorem 10.
    """
    drawn = int(errors.error.size)
    if complete and drawn != len_q:
        raise ArgumentError(
            got=f"{drawn} row errors, complete=True",
            needed=f"one for each of the {len_q} rows",
            do="evaluate every row once, or pass complete=False",
        )
    sure = 1.0 if complete else confidence
    if len_q == 0:
        return HeadCertificate("sampled", 0.0, rows, 1.0, estimate=0.0)
    if complete:
        # Smallest k with k / len_q >= rows, whatever the rounding of rows * len_q.
        shares = np.arange(1, len_q + 1) / len_q
        k: int | None = int(np.argmax(shares >= rows)) + 1
    else:
        split = 1.0 - (1.0 - confidence) / max(rounds, 1)
        k = bounds.order_statistic(drawn, rows, float(up(split)))
    upper = math.inf
    if k is not None and not facts.nonfinite:
        ordered = np.sort(np.where(np.isnan(errors.error), np.inf, errors.error))
        reached = add_up(mul_up(float(ordered[k - 1]), _NORM_ROUNDING), errors.oracle_upper)
        upper = bounds.relative_terms({"sampled": float(reached)}, facts.output_rms)["sampled"]
    return HeadCertificate(
        "sampled",
        upper,
        rows=rows,
        confidence=sure,
        estimate=_frobenius_estimate(errors),
        terms={"sampled": upper},
        nonfinite=facts.nonfinite,
    )


def _frobenius_estimate(errors: RowErrors) -> float:
    if errors.error.size == 0:
        return math.nan
    error, exact = (bounds.rms_estimate(x) for x in (errors.error, errors.exact_norm))
    return bounds.relative_terms({"error": error}, exact)["error"]
