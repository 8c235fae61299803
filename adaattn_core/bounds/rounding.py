"""Float64 arithmetic for bounds: every result is rounded outward.

All operands are non-negative, so one outward step per operation keeps an upper bound an upper
bound; there is no cancellation to watch. An exact zero stays an exact zero, and zero times
infinity is zero: a residual that is exactly nought contributes nought, whatever multiplies it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Real = float | NDArray[np.float64]
"""What the bounds return: a float64 scalar, or an array of the inputs' broadcast shape."""

LIBRARY_ULPS = 4
"""Steps that cover the error of tanh, exp, log and log1p in NumPy and libm (at most 4 ulp)."""


def up(x: ArrayLike, ulps: int = 1) -> Real:
    """Return `x` moved `ulps` representable numbers towards plus infinity.

    Examples
    --------
    >>> float(up(1.0)) > 1.0
    True
    """
    out = np.asarray(x, dtype=np.float64)
    with np.errstate(over="ignore"):
        for _ in range(ulps):
            out = np.nextafter(out, np.inf)
    return out[()]


def down(x: ArrayLike, ulps: int = 1) -> Real:
    """Return `x` moved `ulps` representable numbers towards minus infinity."""
    out = np.asarray(x, dtype=np.float64)
    with np.errstate(over="ignore"):
        for _ in range(ulps):
            out = np.nextafter(out, -np.inf)
    return out[()]


def add_up(*terms: ArrayLike) -> Real:
    """Upper bound of a sum of non-negative terms; exact where at most one is not zero."""
    total = np.zeros((), dtype=np.float64)
    for term in terms:
        value = np.asarray(term, dtype=np.float64)
        inexact = (total != 0) & (value != 0)
        with np.errstate(over="ignore"):
            total = np.where(inexact, up(total + value), total + value)
    return total[()]


def mul_up(*factors: ArrayLike) -> Real:
    """Upper bound of a product of non-negative factors; zero if one is zero, even times inf."""
    product = np.ones((), dtype=np.float64)
    for factor in factors:
        value = np.asarray(factor, dtype=np.float64)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            raised = up(product * value)
        exact = np.where(value == 1, product, np.where(product == 1, value, raised))
        product = np.where((product == 0) | (value == 0), 0.0, exact)
    return product[()]


def div_up(numerator: ArrayLike, denominator: ArrayLike) -> Real:
    """Upper bound of a quotient of non-negative numbers; 0/0 is 0 and x/0 is inf."""
    a = np.asarray(numerator, dtype=np.float64)
    b = np.asarray(denominator, dtype=np.float64)
    with np.errstate(all="ignore"):
        raised = up(a / b)
    return np.where(a == 0, 0.0, np.where(b <= 0, np.inf, raised))[()]


def sub_down(a: ArrayLike, b: ArrayLike) -> Real:
    """Lower bound of ``a - b``, at least 0."""
    with np.errstate(invalid="ignore"):
        lowered = down(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64))
    return np.maximum(lowered, 0.0)[()]


def sqrt_up(x: ArrayLike) -> Real:
    """Upper bound of a square root; exact at zero."""
    value = np.asarray(x, dtype=np.float64)
    return np.where(value == 0, 0.0, up(np.sqrt(value)))[()]
