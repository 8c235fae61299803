"""Theorem 10: what a random sample of rows says about all rows (order statistics)."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.bounds.rounding import down
from adaattn_core.errors import ArgumentError

_TAIL_SLACK = 1.0 + 1e-9
"""Covers the relative error of SciPy's binomial tails (incomplete beta function)."""
_SAMPLE_LIMIT = 1 << 22


@lru_cache(maxsize=1024)
def order_statistic(samples: int, rows: float, confidence: float) -> int | None:
    """Return the order statistic that bounds the error of a share of the rows.

    Parameters
    ----------
    samples : int
        Rows drawn uniformly, independently, with replacement.
    rows, confidence : float
        In (0, 1).

    Returns
    -------
    int or None
        The least ``k`` such that, with at least this confidence, a share `rows` of all rows
        errs by no more than the k-th smallest sampled error; None if even the largest does not
        do.

    References
    ----------
    S. S. Wilks, Determination of sample sizes for setting tolerance limits, Ann. Math. Stat. 12
    (1941); this project, docs/math/10-order-statistic.md, theorem 10.

    Examples
    --------
    >>> order_statistic(58, 0.95, 0.95), order_statistic(59, 0.95, 0.95)
    (None, 59)
    """
    _check(rows, confidence)
    k = int(_order_statistics(np.array([samples]), rows, confidence)[0])
    return k if k <= samples else None


@lru_cache(maxsize=1024)
def minimal_sample_size(rows: float, confidence: float) -> int:
    """Return the fewest samples whose largest error bounds the error of a share of the rows.

    Examples
    --------
    >>> minimal_sample_size(0.95, 0.95), minimal_sample_size(0.95, 0.99)
    (59, 90)
    """
    _check(rows, confidence)
    size = max(1, math.floor(math.log1p(-confidence) / math.log(rows)) - 1)
    while order_statistic(size, rows, confidence) is None:
        size += 1
    return size


@lru_cache(maxsize=1024)
def sample_size(rows: float, confidence: float, tightness: float) -> int:
    """Return the fewest samples that bound a quantile without overstating it by much.

    Parameters
    ----------
    rows, confidence : float
        In (0, 1).
    tightness : float
        In [0, 1). With the same confidence the order statistic stays at or below the errors'
        quantile at ``1 - tightness (1 - rows)``: 0 asks for nothing (the minimal size), 0.5 for
        the quantile that leaves out half as many rows, and so on towards the quantile itself.

    Raises
    ------
    ArgumentError
        If a number is outside its range, or more than four million samples would be needed.

    References
    ----------
    This project, docs/math/10-order-statistic.md, corollary 10.2.
    """
    _check(rows, confidence)
    if not 0 <= tightness < 1:
        raise ArgumentError(
            got=f"tightness={tightness}",
            needed="a number in [0, 1)",
            do="0 gives the smallest sample, 0.5 halves the slack",
        )
    rows_above = 1.0 - tightness * (1.0 - rows)
    start = minimal_sample_size(rows, confidence)
    while start <= _SAMPLE_LIMIT:
        sizes = np.arange(start, start + 2048)
        k = _order_statistics(sizes, rows, confidence)
        enough = _binomial_tail(k, sizes, rows_above) >= confidence
        hits = sizes[(k <= sizes) & enough]
        if hits.size:
            return int(hits[0])
        start += 2048
    raise ArgumentError(
        got=f"rows={rows}, confidence={confidence}, tightness={tightness}",
        needed=f"a sample of at most {_SAMPLE_LIMIT} rows",
        do="ask for a smaller tightness",
    )


def _order_statistics(
    samples: NDArray[np.int64], rows: float, confidence: float
) -> NDArray[np.int64]:
    """Least k with P(Binomial(m, rows) >= k) <= 1 - confidence, for every m; m + 1 = none."""
    allowed = float(down(1.0 - confidence, 2))

    def fails(k: NDArray[Any]) -> NDArray[np.bool_]:
        excess = _binomial_tail(k, samples, rows) * _TAIL_SLACK > allowed
        return np.asarray((k <= samples) & excess)

    # The normal approximation is off by a step or two; the tail itself decides.
    spread = np.sqrt(samples * rows * (1.0 - rows))
    k = np.clip(
        samples * rows + NormalDist().inv_cdf(confidence) * spread, 1, samples + 1
    ).astype(np.int64)
    while (failing := fails(k)).any():
        k = k + failing
    while (spare := ~fails(k - 1)).any():
        k = k - spare
    return np.asarray(k, dtype=np.int64)


def _binomial_tail(
    k: NDArray[np.int64], samples: NDArray[np.int64], rows: float
) -> NDArray[np.float64]:
    """P(Binomial(samples, rows) >= k), by the incomplete beta function; 0 for k > samples.

    The same as ``scipy.stats.binom.sf(k - 1, ...)``, whose import would take longer than all of
    this package.
    """
    # Deferred on purpose: SciPy costs more than the rest of the package, and only a sampled
    # certificate asks for it.
    from scipy.special import betainc  # noqa: PLC0415

    inner = np.clip(k, 1, samples)
    tail = betainc(inner, samples - inner + 1, rows)
    return np.where(k < 1, 1.0, np.where(k > samples, 0.0, tail))


def _check(rows: float, confidence: float) -> None:
    for name, value in (("rows", rows), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ArgumentError(
                got=f"{name}={value}",
                needed="a number strictly between 0 and 1",
                do="a sample cannot speak for every row with certainty",
            )
